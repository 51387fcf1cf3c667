package mesh

import (
	"bytes"
	"cmp"
	"slices"
	"unicode/utf8"
)

const middleOut = "middle-out"

// turn is a run of messages that stay together: one, with the results of the tools that it calls.
type turn struct {
	from, to int  // of the messages
	system   bool // one of them is the system's or the developer's
	user     bool
	tokens   int64
}

// promptMessage is a message of the request.
type promptMessage struct {
	span
	role   string
	calls  []string // ids of the tool calls it makes
	result string   // id of the one whose result it is
	text   span     // its content without the quotes, if that is a string
	size   promptSize
	tokens int64
}

const (
	// maxCounted is how much text is counted in tokens to find out what fits; the rest goes by the rule of thumb.
	maxCounted = 256 << 10

	// minShortened is how many bytes are left of a text that is cut in its middle.
	minShortened = 256

	cutMark = "…"
)

// wantsMiddleOut reports whether messages may be left out for a candidate.
func (r *chatRequest) wantsMiddleOut(c *candidate) bool {
	if c.context == 0 {
		return false
	}
	if r.transforms != nil {
		return *r.transforms
	}
	return c.middleOut
}

// middleOutEdits returns what takes messages out of the middle of the conversation, or shortens them, so that it fits a
// candidate's context; nothing where that is not wanted, or not needed. The system's and the developer's messages stay,
// and so do the first turn and all from the last message of the user on. Tokens are an estimate: a twentieth of the context
// is kept free. What cannot be made to fit is left as short as it can be.
func (r *chatRequest) middleOutEdits(c *candidate) []edit {
	if !r.wantsMiddleOut(c) {
		return nil
	}
	room := c.context - c.context/20 - r.maxTokens - int64(r.added)/bytesPerToken
	if room <= 0 || int64(len(r.body))+int64(r.prompt.messages)*maxTokensPerMessage < room {
		return nil // nothing would fit; or all of it does, as no text has more tokens than bytes
	}
	messages := r.readMessages()
	turns := takeTurns(messages)
	excess := tokensPerAnswer + int64(r.tools.to-r.tools.from)/bytesPerToken - room
	for _, t := range turns {
		excess += t.tokens
	}
	if excess <= 0 {
		return nil
	}
	dropped := make([]bool, len(turns))
	for _, i := range droppable(turns) {
		if excess <= 0 {
			break
		}
		dropped[i] = true
		excess -= turns[i].tokens
	}
	edits := dropEdits(messages, turns, dropped)
	return append(edits, r.shortenEdits(messages, turns, dropped, excess)...)
}

// readMessages reads the messages once more, each for itself. They have passed every check.
func (r *chatRequest) readMessages() (messages []promptMessage) {
	c := cursor{data: r.body, pos: r.messages.from, maxDepth: maxRequestDepth}
	counted := 0
	c.eachOf(func() {
		c.peek()
		m := promptMessage{span: span{from: c.pos}}
		m.size.messages = 1
		c.eachMember(func(name []byte) { c.promptMember(string(name), &m) })
		m.to = c.pos
		if counted += m.size.sampled; counted < maxCounted {
			m.tokens = m.size.estimate(r.body) - tokensPerAnswer
		} else {
			m.tokens = m.size.quickEstimate() - tokensPerAnswer
		}
		messages = append(messages, m)
	})
	return messages
}

func (c *cursor) promptMember(name string, m *promptMessage) {
	switch {
	case name == "role" && c.peek() == '"':
		m.role = c.textValue()
	case name == "tool_call_id" && c.peek() == '"':
		m.result = c.textValue()
	case name == "tool_calls":
		from := c.pos
		c.eachOf(func() {
			c.eachMember(func(name []byte) {
				if string(name) == "id" && c.peek() == '"' {
					m.calls = append(m.calls, c.textValue())
					return
				}
				c.skip()
			})
		})
		m.size.add(span{from, c.pos})
	case name == "content" && c.peek() == '"':
		at := c.skip()
		m.text = span{at.from + 1, at.to - 1}
		m.size.add(m.text)
	case name == "content":
		c.eachOf(func() { c.promptPart(m) })
	default:
		c.skip()
	}
}

// promptPart counts a part of a message: text by its length, and anything else as an image.
func (c *cursor) promptPart(m *promptMessage) {
	hasText := false
	c.eachMember(func(name []byte) {
		if string(name) == "text" && c.peek() == '"' {
			at := c.skip()
			m.size.add(span{at.from + 1, at.to - 1})
			hasText = true
			return
		}
		c.skip()
	})
	if !hasText {
		m.size.images++
	}
}

// textValue consumes a string and returns its text.
func (c *cursor) textValue() string {
	raw, escaped := c.str()
	if escaped {
		raw = unescape(raw)
	}
	return string(raw)
}

// takeTurns puts messages together that must not be separated: calls of tools, their results, and what is between.
func takeTurns(messages []promptMessage) (turns []turn) {
	calledBy := make(map[string]int) // the message that makes a call
	for i, m := range messages {
		if m.role != "tool" || len(turns) == 0 {
			turns = append(turns, turn{from: i})
		} else if caller, ok := calledBy[m.result]; ok {
			for turns[len(turns)-1].from > caller {
				turns = turns[:len(turns)-1]
			}
		}
		turns[len(turns)-1].to = i + 1
		for _, id := range m.calls {
			calledBy[id] = i
		}
	}
	for i := range turns {
		t := &turns[i]
		for _, m := range messages[t.from:t.to] {
			t.system = t.system || m.role == "system" || m.role == "developer"
			t.user = t.user || m.role == "user"
			t.tokens += m.tokens
		}
	}
	return turns
}

// droppable returns the turns that may go, from the middle of the conversation outwards.
func droppable(turns []turn) (order []int) {
	first := slices.IndexFunc(turns, func(t turn) bool { return !t.system })
	last := len(turns) - 1
	for i := last; i > first; i-- { // where an agent works on the one thing it was asked, its last step
		if turns[i].user {
			last = i
			break
		}
	}
	for i := first + 1; first >= 0 && i < last; i++ {
		if !turns[i].system {
			order = append(order, i)
		}
	}
	middle := first + last // twice
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Compare(max(2*a-middle, middle-2*a), max(2*b-middle, middle-2*b))
	})
	return order
}

// dropEdits takes out turns, each with the comma before it. The first is never one of them.
func dropEdits(messages []promptMessage, turns []turn, dropped []bool) (edits []edit) {
	for i, t := range turns {
		if !dropped[i] {
			continue
		}
		gone := span{messages[t.from-1].to, messages[t.to-1].to}
		if n := len(edits); n > 0 && edits[n-1].to == gone.from {
			edits[n-1].to = gone.to
			continue
		}
		edits = append(edits, edit{span: gone})
	}
	return edits
}

// shortenEdits cuts the longest texts that are left in their middle, until what is too much is gone.
func (r *chatRequest) shortenEdits(messages []promptMessage, turns []turn, dropped []bool, excess int64) (edits []edit) {
	var left []*promptMessage
	for i, t := range turns {
		for k := t.from; k < t.to && !dropped[i]; k++ {
			if m := &messages[k]; m.role != "system" && m.role != "developer" && m.text.to-m.text.from > minShortened {
				left = append(left, m)
			}
		}
	}
	slices.SortStableFunc(left, func(a, b *promptMessage) int { return cmp.Compare(b.tokens, a.tokens) })
	for _, m := range left {
		if excess <= 0 {
			break
		}
		length := int64(m.text.to - m.text.from)
		keep := max(minShortened, length-(excess+1)*length/max(1, m.tokens)-bytesPerToken)
		gone := middleOf(m.text.of(r.body), int(keep))
		excess -= int64(gone.to-gone.from) * m.tokens / length
		edits = append(edits, edit{span: span{m.text.from + gone.from, m.text.from + gone.to}, with: cutMark})
	}
	return edits
}

// middleOf returns what is to be cut out of a JSON string so that at most keep bytes stay. No character and no escape
// sequence is split.
func middleOf(raw []byte, keep int) (gone span) {
	for at := 0; at < len(raw); {
		if at <= keep/2 {
			gone.from = at
		}
		if gone.to = at; at >= len(raw)-keep/2 {
			return gone
		}
		at += characterLen(raw[at:])
	}
	gone.to = len(raw)
	return gone
}

// characterLen returns how long the character at the front of a JSON string is; a pair of surrogates is one.
func characterLen(raw []byte) int {
	if raw[0] != '\\' {
		_, n := utf8.DecodeRune(raw)
		return n
	}
	n := escapeLen(raw)
	if n == 6 && isSurrogate(raw, "89abAB") && len(raw) >= 12 && raw[6] == '\\' && escapeLen(raw[6:]) == 6 && isSurrogate(raw[6:], "cdefCDEF") {
		return 12
	}
	return max(1, n)
}

// isSurrogate reports whether a \u escape is that of a surrogate whose second digit is one of those given.
func isSurrogate(escape []byte, second string) bool {
	return bytes.EqualFold(escape[2:3], []byte("d")) && bytes.ContainsAny(escape[3:4], second)
}
