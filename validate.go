package mesh

import (
	"bytes"
	"math"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxFaults bounds how many faults one answer lists.
const maxFaults = 100

// parser checks a chat request against the API while the cursor walks it. A value of the wrong type is a fault, not
// an error: the walk goes on behind it. Explicit null means the same as absent.
type parser struct {
	cursor
	req    *chatRequest
	path   []step // to the value at hand
	faults []fault

	noMessages      bool // the list of messages is there, and empty
	noStreamOptions bool // these are not sent upstream
	wantsAudio      bool // the member audio is there

	options struct { // stream_options
		value   span // nothing where it was not given
		null    bool
		empty   bool
		include span // the value of include_usage; nothing where it was not given
		twin    bool // include_usage in another letter case was given
	}
}

// wholeObject consumes the whole body, which has to be an object, and hands that to object. The faults it finds are left to
// the caller.
func (p *parser) wholeObject(object func(*parser)) *apiError {
	if !utf8.Valid(p.data) {
		return errorf(http.StatusBadRequest, "invalid_request", "The request body is not valid UTF-8.")
	}
	isObject := p.peek() == '{'
	if isObject {
		object(p)
	} else {
		p.skip()
	}
	p.end()
	switch {
	case p.err != nil:
		return errorf(http.StatusBadRequest, "invalid_request", "The request body is not valid JSON: %s.", p.err)
	case !isObject:
		return errorf(http.StatusBadRequest, "invalid_request", "The request body must be a JSON object.")
	}
	return nil
}

// step leads from a value to one in it: to a member, or to an element where element is not negative.
type step struct {
	member  string
	element int
}

// at steps down to a member of the value at hand; up steps back.
func (p *parser) at(member string) *parser {
	p.path = append(p.path, step{member, -1})
	return p
}

func (p *parser) up() { p.path = p.path[:len(p.path)-1] }

func (p *parser) faultf(kind, msg string) {
	if p.err != nil || len(p.faults) == maxFaults {
		return
	}
	loc := append(make([]any, 0, len(p.path)+1), "body")
	for _, s := range p.path {
		if s.element < 0 {
			loc = append(loc, s.member)
		} else {
			loc = append(loc, s.element)
		}
	}
	p.faults = append(p.faults, fault{Type: kind, Loc: loc, Msg: msg})
}

func (p *parser) missing(name string) {
	p.at(name).faultf("missing", "Field required")
	p.up()
}

// twice is a fault at a member that was given before; its value is passed over.
func (p *parser) twice(name string) {
	p.at(name).faultf("value_error", "Value error, the member is given twice")
	p.up()
	p.skip()
}

// twins is a fault for each of names whose bit is set: it stands beside one that differs only in letter case. A
// parser that ignores case, as Go's does, would read another request than the gateway.
func (p *parser) twins(names []string, bits uint64) {
	for i, name := range names {
		if bits&bitOf(i) != 0 {
			p.at(name).faultf("value_error", "Value error, the member is given again in another letter case")
			p.up()
		}
	}
}

// bitOf returns the bit that stands for a place in a list of names, and none for -1.
func bitOf(i int) uint64 {
	if i < 0 {
		return 0
	}
	return 1 << i
}

// lookup returns the place in known of a name, and whether it is the exact name or only one that a parser which
// ignores case would take for it. The place of an unknown name is -1.
func lookup(known []string, name []byte) (i int, exact bool) {
	for i := range known {
		if string(name) == known[i] {
			return i, true
		}
	}
	for i := range known {
		if bytes.EqualFold(name, []byte(known[i])) {
			return i, false
		}
	}
	return -1, false
}

// wrongType is a fault at the value at hand, which is passed over.
func (p *parser) wrongType(kind, msg string) {
	p.skip()
	p.faultf(kind, msg)
}

// start returns where the next token begins.
func (p *parser) start() int {
	p.peek()
	return p.pos
}

// text consumes a string and returns its text, which may be part of the body.
func (p *parser) text() (text []byte, ok bool) {
	if p.peek() != '"' {
		p.wrongType("string_type", "Input should be a valid string")
		return nil, false
	}
	text, escaped := p.str()
	if escaped {
		text = unescape(text)
	}
	return text, p.err == nil
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
	text, _ := p.text()
	if utf8.RuneCount(text) > limit {
		p.faultf("string_too_long", "String should have at most "+strconv.Itoa(limit)+" characters")
		return ""
	}
	return string(text)
}

func (p *parser) oneOf(allowed ...string) string {
	text, ok := p.text()
	if !ok {
		return ""
	}
	for _, a := range allowed {
		if string(text) == a {
			return a
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
	v, _ = strconv.ParseFloat(string(text), 64) // infinite where it is out of range
	bound := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	switch {
	case r.integer && math.IsInf(v, 0) && bytes.ContainsAny(text, ".eE"):
		p.faultf("finite_number", "Input should be a finite number")
	case r.integer && v != math.Trunc(v):
		p.faultf("int_from_float", "Input should be a valid integer, got a number with a fractional part")
	case r.above && v <= r.min:
		p.faultf("greater_than", "Input should be greater than "+bound(r.min))
	case v < r.min:
		p.faultf("greater_than_equal", "Input should be greater than or equal to "+bound(r.min))
	case v > r.max:
		p.faultf("less_than_equal", "Input should be less than or equal to "+bound(r.max))
	case !r.integer && math.IsInf(v, 0):
		p.faultf("finite_number", "Input should be a finite number")
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
		p.path = append(p.path, step{element: n})
		check(p)
		p.up()
		n++
	}
	return n
}

// fields consumes an object and hands each member that known names to check, as its place in known. It returns which
// of them were given and which were explicitly null, one bit each; null is not handed to check. A known member that
// comes twice, or once more in another letter case, is a fault.
func (p *parser) fields(known []string, check func(i int)) (given, null uint64, ok bool) {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return 0, 0, false
	}
	var folded uint64
	for more := p.enter('{'); more; more = p.next('}') {
		i, exact := lookup(known, p.name())
		switch bit := bitOf(i); {
		case !exact:
			folded |= bit
			p.skip()
		case (given|null)&bit != 0:
			p.twice(known[i])
		case p.peek() == 'n':
			null |= bit
			p.skip()
		default:
			given |= bit
			p.at(known[i])
			check(i)
			p.up()
		}
	}
	p.twins(known, (given|null)&folded)
	return given, null, p.err == nil
}

// require is a fault for each of the first n of known that was not given.
func (p *parser) require(known []string, n int, given uint64) {
	for i, name := range known[:n] {
		if given&bitOf(i) == 0 {
			p.missing(name)
		}
	}
}

func (p *parser) textMap() (m map[string]string) {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return nil
	}
	m = make(map[string]string)
	for more := p.enter('{'); more; more = p.next('}') {
		name := string(p.name())
		p.at(name)
		text, _ := p.text()
		m[name] = string(text)
		p.up()
	}
	return m
}
