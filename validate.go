package mesh

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// maxFaults bounds how many faults one answer lists.
const maxFaults = 100

// parser checks a chat request against api.md while the cursor walks it. A value of the wrong type is a fault, not
// an error: the walk goes on behind it. Explicit null means the same as absent.
type parser struct {
	cursor
	req    *chatRequest
	path   []any // of the value at hand, without "body"
	faults []fault

	options struct {
		null, empty bool
		include     span // the value of include_usage
	}
}

// at steps down to a member (string) or an element (int) of the value at hand; up steps back.
func (p *parser) at(step any) *parser {
	p.path = append(p.path, step)
	return p
}

func (p *parser) up() { p.path = p.path[:len(p.path)-1] }

func (p *parser) faultf(kind, msg string) {
	if len(p.faults) < maxFaults {
		loc := append(make([]any, 0, len(p.path)+1), "body")
		p.faults = append(p.faults, fault{Type: kind, Loc: append(loc, p.path...), Msg: msg})
	}
}

// wrongType is a fault at the value at hand, which is passed over.
func (p *parser) wrongType(kind, msg string) {
	p.skip()
	if p.err == nil {
		p.faultf(kind, msg)
	}
}

// unbuilt refuses a member that is valid but that this version gives no meaning yet.
func (p *parser) unbuilt(used bool) {
	if used && p.err == nil {
		p.faultf("value_error", "Value error, this version of the gateway does not support it yet")
	}
}

// known checks the value of a member of chatMembers.
func (p *parser) known(i int) {
	m := &chatMembers[i]
	p.at(m.name)
	defer p.up()
	if p.peek() == 'n' {
		p.skip()
		switch i {
		case memberMessages:
			p.faultf("list_type", "Input should be a valid list")
		case memberStreamOptions:
			p.options.null = true
		}
		return
	}
	m.check(p)
}

// peekSpan returns an empty span at the start of the next value.
func (p *parser) peekSpan() span {
	p.peek()
	return span{p.pos, p.pos}
}

// text consumes a string and returns its text.
func (p *parser) text() (s string, ok bool) {
	if p.peek() != '"' {
		p.wrongType("string_type", "Input should be a valid string")
		return "", false
	}
	raw, escaped := p.str()
	if escaped && p.err == nil {
		raw = unescape(raw)
	}
	return string(raw), p.err == nil
}

// rawText consumes a string and returns where it stands, without its quotes.
func (p *parser) rawText() (s span, ok bool) {
	if p.peek() != '"' {
		p.wrongType("string_type", "Input should be a valid string")
		return span{}, false
	}
	from := p.pos + 1
	raw, _ := p.str()
	return span{from, from + len(raw)}, p.err == nil
}

func (p *parser) shortText(limit int) string {
	s, _ := p.text()
	if utf8.RuneCountInString(s) > limit {
		p.faultf("string_too_long", "String should have at most "+strconv.Itoa(limit)+" characters")
	}
	return s
}

func (p *parser) oneOf(allowed ...string) string {
	s, ok := p.text()
	if !ok {
		return ""
	}
	for _, a := range allowed {
		if s == a {
			return s
		}
	}
	list := "'" + strings.Join(allowed, "', '") + "'"
	if i := strings.LastIndex(list, ", "); i >= 0 {
		list = list[:i] + " or " + list[i+2:]
	}
	p.faultf("literal_error", "Input should be "+list)
	return ""
}

func (p *parser) boolean() (v, ok bool) {
	switch p.peek() {
	case 't', 'f':
		v = p.peek() == 't'
		p.skip()
		return v, p.err == nil
	}
	p.wrongType("bool_type", "Input should be a valid boolean")
	return false, false
}

// rule is what a number must keep to. Bounds are inclusive unless above is set.
type rule struct {
	integer  bool
	above    bool // greater than min, not equal
	min, max float64
}

func between(low, high float64) rule { return rule{min: low, max: high} }

func (p *parser) number(r rule) (v float64, ok bool) {
	if b := p.peek(); b != '-' && !isDigit(b) {
		if r.integer {
			p.wrongType("int_type", "Input should be a valid integer")
		} else {
			p.wrongType("float_type", "Input should be a valid number")
		}
		return 0, false
	}
	text := p.cursor.number()
	if p.err != nil {
		return 0, false
	}
	v, err := strconv.ParseFloat(string(text), 64) // an error is a value out of range: ±Inf, and caught below
	bound := strconv.FormatFloat
	switch {
	case r.integer && strings.ContainsAny(string(text), ".eE") && (err != nil || v != math.Trunc(v)):
		p.faultf("int_from_float", "Input should be a valid integer, got a number with a fractional part")
	case r.above && v <= r.min:
		p.faultf("greater_than", "Input should be greater than "+bound(r.min, 'g', -1, 64))
	case v < r.min:
		p.faultf("greater_than_equal", "Input should be greater than or equal to "+bound(r.min, 'g', -1, 64))
	case v > r.max || err != nil && !r.integer && math.IsInf(v, 0):
		if math.IsInf(r.max, 0) {
			p.faultf("finite_number", "Input should be a finite number")
			break
		}
		p.faultf("less_than_equal", "Input should be less than or equal to "+bound(r.max, 'g', -1, 64))
	default:
		return v, true
	}
	return 0, false
}

// list consumes an array, each element with check, and returns its length.
func (p *parser) list(check func(*parser)) (n int) {
	if p.peek() != '[' {
		p.wrongType("list_type", "Input should be a valid list")
		return 0
	}
	for more := p.enter('['); more; more = p.next(']') {
		p.at(n)
		check(p)
		p.up()
		n++
	}
	return n
}

// fields consumes an object and hands each member that known names to check, as its place in known. It returns which
// of them were given and which were explicitly null, one bit each; null is not handed to check. A known member that
// comes twice is a fault.
func (p *parser) fields(known []string, check func(i int)) (given, null uint, ok bool) {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return 0, 0, false
	}
	for more := p.enter('{'); more; more = p.next('}') {
		i := slices.Index(known, string(p.name()))
		if i < 0 {
			p.skip()
			continue
		}
		p.at(known[i])
		if bit := uint(1) << i; (given|null)&bit != 0 {
			p.faultf("value_error", "Value error, the member is given twice")
			p.skip()
		} else if p.peek() == 'n' {
			null |= bit
			p.skip()
		} else {
			given |= bit
			check(i)
		}
		p.up()
	}
	return given, null, p.err == nil
}

// require is a fault for each of the first n of known that was not given.
func (p *parser) require(known []string, n int, given uint) {
	for i, name := range known[:n] {
		if given&(1<<i) == 0 {
			p.missing(name)
		}
	}
}

func (p *parser) missing(name string) {
	p.at(name).faultf("missing", "Field required")
	p.up()
}

func (p *parser) textMap() (n int) {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return 0
	}
	for more := p.enter('{'); more; more = p.next('}') {
		p.at(string(p.name()))
		p.text()
		p.up()
		n++
	}
	return n
}

func (p *parser) messages() {
	isList := p.peek() == '['
	if n := p.list((*parser).message); n == 0 && isList && p.err == nil {
		p.faultf("too_short", "List should have at least 1 item after validation, not 0")
	}
}

var messageFields = []string{"role", "content", "name", "tool_call_id", "tool_calls", "function_call", "audio", "refusal"}

// message checks one of the conversation. Content may be null or absent beside tool_calls, and, because OpenAI's
// own API returns such messages for the client to send back, beside function_call, audio and refusal.
func (p *parser) message() {
	const role, content, toolCallID, toolCalls = 1 << 0, 1 << 1, 1 << 3, 1 << 4
	var kind string
	noCalls := false
	given, null, ok := p.fields(messageFields, func(i int) {
		switch i {
		case 0:
			kind = p.oneOf("system", "developer", "user", "assistant", "tool")
		case 1:
			p.content()
		case 2, 3:
			p.text()
		case 4:
			noCalls = p.list(func(p *parser) { p.fields(nil, nil) }) == 0
		default:
			p.skip()
		}
	})
	if !ok {
		return
	}
	p.req.prompt.messages++
	if noCalls {
		given &^= toolCalls
	}
	p.require(messageFields, 1, given)
	if kind == "tool" && given&toolCallID == 0 {
		p.missing("tool_call_id")
	}
	switch {
	case given&content != 0 || given>>4 != 0: // tool_calls and what follows it
	case null&content != 0:
		p.at("content").faultf("value_error", "Value error, content may be null only beside tool_calls")
		p.up()
	default:
		p.missing("content")
	}
}

func (p *parser) content() {
	switch p.peek() {
	case '"':
		s, _ := p.rawText()
		p.req.prompt.add(s)
	case '[':
		p.list((*parser).part)
	default:
		p.wrongType("value_error", "Value error, content should be a string, a list of parts, or null")
	}
}

var (
	partFields  = []string{"type", "text", "image_url", "input_audio", "video_url"}
	imageFields = []string{"url", "detail"}
	audioFields = []string{"format", "data", "url", "uri"}
)

// part checks one part of a message's content. Which member it needs depends on its type, which may come last.
func (p *parser) part() {
	var kind string
	given, _, ok := p.fields(partFields, func(i int) {
		switch i {
		case 0:
			kind, _ = p.text()
		case 1:
			s, _ := p.rawText()
			p.req.prompt.add(s)
		case 2:
			p.req.prompt.images++
			p.urlObject()
		case 3:
			p.inputAudio()
		case 4:
			p.urlObject()
		}
	})
	if !ok {
		return
	}
	p.require(partFields, 1, given)
	if i := slices.Index(partFields[1:], kind); i >= 0 && given&(2<<i) == 0 {
		p.missing(kind)
	}
}

// urlObject checks {url, detail?}.
func (p *parser) urlObject() {
	given, _, ok := p.fields(imageFields, func(i int) {
		if i == 0 {
			p.rawText()
		} else {
			p.oneOf("auto", "low", "high")
		}
	})
	if ok {
		p.require(imageFields, 1, given)
	}
}

func (p *parser) inputAudio() {
	given, _, ok := p.fields(audioFields, func(int) { p.rawText() })
	if ok && given>>1 == 0 {
		p.missing("data")
	}
	if ok {
		p.require(audioFields, 1, given)
	}
}

func (p *parser) stop() {
	switch p.peek() {
	case '"':
		p.skip()
	case '[':
		p.list(func(p *parser) { p.text() })
	default:
		p.wrongType("value_error", "Value error, stop should be a string or a list of strings")
	}
}

func (p *parser) toolChoice() {
	switch p.peek() {
	case '"', '{':
		p.skip()
	default:
		p.wrongType("value_error", "Value error, tool_choice should be a string or an object")
	}
}

var (
	toolFields        = []string{"type", "function"}
	functionFields    = []string{"name", "description", "parameters"}
	outputAudioFields = []string{"format"}
	imageOptionFields = []string{"n", "size", "quality", "response_format"}
)

func (p *parser) tools() {
	from := p.peekSpan().from
	p.list(func(p *parser) {
		given, _, ok := p.fields(toolFields, func(i int) {
			if i == 0 {
				p.oneOf("function")
			} else {
				p.function()
			}
		})
		if ok {
			p.require(toolFields, 2, given)
		}
	})
	p.req.prompt.add(span{from, p.pos})
}

func (p *parser) function() {
	given, _, ok := p.fields(functionFields, func(i int) {
		if i == 2 {
			p.fields(nil, nil)
		} else {
			p.rawText()
		}
	})
	if ok {
		p.require(functionFields, 1, given)
	}
}

func (p *parser) modalityName() { p.oneOf("text", "audio", "image") }

func (p *parser) audio() {
	p.fields(outputAudioFields, func(int) { p.oneOf("wav", "mp3", "flac", "opus", "pcm16") })
}

func (p *parser) image() bool {
	_, _, ok := p.fields(imageOptionFields, func(i int) {
		switch i {
		case 0:
			p.number(rule{integer: true, min: 1, max: 10})
		case 3:
			p.oneOf("url", "b64_json")
		default:
			p.text()
		}
	})
	return ok
}

// timeout is in seconds. More than a day is as good as a day.
func (p *parser) timeout() {
	v, ok := p.number(rule{above: true, min: 0, max: math.Inf(1)})
	if ok {
		p.req.timeout = max(time.Nanosecond, time.Duration(min(v, 24*60*60)*float64(time.Second)))
	}
}

// streamOptions is the upstream's, but for include_usage, which the gateway must know.
func (p *parser) streamOptions() {
	p.options.empty = true
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return
	}
	seen := false
	for more := p.enter('{'); more; more = p.next('}') {
		p.options.empty = false
		if string(p.name()) != "include_usage" {
			p.skip()
			continue
		}
		p.at("include_usage")
		if seen {
			p.faultf("value_error", "Value error, the member is given twice")
		}
		seen = true
		p.options.include = p.peekSpan()
		if p.peek() == 'n' {
			p.skip()
		} else {
			p.req.includeUsage, _ = p.boolean()
		}
		p.options.include.to = p.pos
		p.up()
	}
}
