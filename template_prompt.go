package mesh

import (
	"regexp"
	"slices"
)

// slot is where a variable's value goes.
var slot = regexp.MustCompile(`\{\{[ \t]*([A-Za-z0-9_]+)[ \t]*\}\}`)

// compiledPrompt is a template's messages as JSON, cut at the slots.
type compiledPrompt struct {
	pieces   []promptPiece
	messages int
	media    bool // it has parts other than text
	slots    []string
}

// promptPiece is JSON, and the slot that follows it inside a string.
type promptPiece struct {
	json string
	slot string // empty at the end
}

// promptWriter compiles.
type promptWriter struct {
	compiledPrompt
	buf []byte // the piece at hand
}

// compile makes the messages of a template that was checked.
func (t *Template) compile() *compiledPrompt {
	w := new(promptWriter)
	if t.System != "" {
		w.message("system", appendString(nil, t.System))
	}
	for _, m := range t.Messages {
		w.message(m.Role, m.Content)
	}
	w.cut("")
	return &w.compiledPrompt
}

func (w *promptWriter) cut(slot string) {
	w.pieces = append(w.pieces, promptPiece{string(w.buf), slot})
	w.buf = w.buf[:0]
	if slot != "" && !slices.Contains(w.slots, slot) {
		w.slots = append(w.slots, slot)
	}
}

func (w *promptWriter) message(role string, content []byte) {
	if w.messages++; w.messages > 1 {
		w.buf = append(w.buf, ',')
	}
	w.buf = appendString(append(w.buf, `{"role":`...), role)
	w.buf = append(w.buf, `,"content":`...)
	done := 0
	for _, s := range w.texts(content) {
		w.buf = append(w.buf, content[done:s.from]...)
		w.text(s.of(content))
		done = s.to
	}
	w.buf = append(append(w.buf, content[done:]...), '}')
}

// texts returns where the strings of a content stand that may have slots.
func (w *promptWriter) texts(content []byte) (spans []span) {
	c := cursor{data: content, maxDepth: maxRequestDepth}
	if c.peek() == '"' {
		return []span{c.skip()}
	}
	c.eachOf(func() {
		var text span
		isText := false
		c.eachMember(func(name []byte) {
			at := c.pos
			c.peek()
			at = max(at, c.pos)
			value := c.skip()
			switch string(name) {
			case "type":
				isText = string(value.of(content)) == `"text"`
			case "text":
				text = span{at, value.to}
			}
		})
		if isText && text.to > 0 {
			spans = append(spans, text)
		}
		w.media = w.media || !isText
	})
	return spans
}

// text writes a JSON string, cut at its slots.
func (w *promptWriter) text(quoted []byte) {
	raw := quoted[1 : len(quoted)-1]
	text := unescape(raw)
	w.buf = append(w.buf, '"')
	done := 0
	for _, at := range slot.FindAllSubmatchIndex(text, -1) {
		w.buf = appendInner(w.buf, string(text[done:at[0]]))
		w.cut(string(text[at[2]:at[3]]))
		done = at[1]
	}
	w.buf = append(appendInner(w.buf, string(text[done:])), '"')
}

// appendInner appends a JSON string without its quotes.
func appendInner(b []byte, s string) []byte {
	quoted := appendString(nil, s)
	return append(b, quoted[1:len(quoted)-1]...)
}

// missing returns the slots that have no value.
func (c *compiledPrompt) missing(values map[string]string) (names []string) {
	for _, name := range c.slots {
		if _, ok := values[name]; !ok {
			names = append(names, name)
		}
	}
	return names
}

// size returns how long the messages are, at least, with their values.
func (c *compiledPrompt) size(values map[string]string) (n int64) {
	for _, p := range c.pieces {
		n += int64(len(p.json) + len(values[p.slot]))
	}
	return n
}

// render returns the messages as JSON, separated by commas, each slot with its value. A value is plain text: what looks
// like a slot in it stays as it is.
func (c *compiledPrompt) render(values map[string]string) []byte {
	var out []byte
	for _, p := range c.pieces {
		out = append(out, p.json...)
		if p.slot != "" {
			out = appendInner(out, values[p.slot])
		}
	}
	return out
}
