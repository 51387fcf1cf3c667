package mesh

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
	"strings"
	"unicode/utf8"
)

// cursor walks one JSON text (RFC 8259) from front to back, checks its grammar as it goes, and copies nothing.
// The first fault stops it: from then on every method does nothing and err says what was wrong and where.
//
// Objects and arrays are walked by their owner:
//
//	for more := c.enter('{'); more; more = c.next('}') {
//		name := c.name()
//		… // consume exactly one value
//	}
type cursor struct {
	data     []byte
	pos      int // offset of the next unread byte
	depth    int // open objects and arrays
	maxDepth int
	err      error
}

// span is a half-open range of bytes.
type span struct{ from, to int }

func (s span) of(data []byte) []byte { return data[s.from:s.to] }

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf(format+" at byte %d", append(args, c.pos)...)
	}
}

// peek returns the first byte of the next token, or 0 at the end of the text or after a fault.
func (c *cursor) peek() byte {
	if c.err != nil {
		return 0
	}
	for c.pos < len(c.data) {
		switch b := c.data[c.pos]; b {
		case ' ', '\t', '\n', '\r':
			c.pos++
		default:
			return b
		}
	}
	return 0
}

// unexpected fails at the next byte.
func (c *cursor) unexpected(want string) {
	if c.pos >= len(c.data) {
		c.fail("unexpected end of JSON, expected %s", want)
		return
	}
	r, _ := utf8.DecodeRune(c.data[c.pos:])
	c.fail("unexpected character %q, expected %s", r, want)
}

// enter consumes the opening bracket of an object or array and reports whether there is anything in it.
func (c *cursor) enter(open byte) bool {
	if c.peek() != open {
		c.unexpected("'" + string(open) + "'")
		return false
	}
	if c.depth++; c.depth > c.maxDepth {
		c.fail("nested more than %d levels deep", c.maxDepth)
		return false
	}
	c.pos++
	if c.peek() == open+2 { // in ASCII both closing brackets stand two after their opening ones
		c.pos++
		c.depth--
		return false
	}
	return c.err == nil
}

// next consumes the comma before a further member or element, or the closing bracket.
func (c *cursor) next(closing byte) bool {
	switch c.peek() {
	case ',':
		c.pos++
		return true
	case closing:
		c.pos++
		c.depth--
	default:
		c.unexpected("',' or '" + string(closing) + "'")
	}
	return false
}

// name consumes a member's name and the colon behind it, and returns the name unescaped.
func (c *cursor) name() []byte {
	if c.peek() != '"' {
		c.unexpected("a member name")
		return nil
	}
	raw, escaped := c.str()
	if c.peek() != ':' {
		c.unexpected("':'")
		return nil
	}
	c.pos++
	if escaped {
		return unescape(raw)
	}
	return raw
}

// str consumes a string and returns what stands between its quotes, and whether that has escapes in it.
func (c *cursor) str() (raw []byte, escaped bool) {
	if c.peek() != '"' {
		c.unexpected("a string")
		return nil, false
	}
	start := c.pos + 1
	i := start
	for {
		i += plainLen(c.data[i:])
		if i == len(c.data) {
			c.pos = i
			c.fail("unexpected end of JSON in string")
			return nil, false
		}
		switch c.data[i] {
		case '"':
			c.pos = i + 1
			return c.data[start:i], escaped
		case '\\':
			escaped = true
			n := escapeLen(c.data[i:])
			if n == 0 {
				c.pos = i
				c.fail("invalid escape in string")
				return nil, false
			}
			i += n
		default:
			c.pos = i
			c.fail("unescaped control character in string")
			return nil, false
		}
	}
}

// plainLen returns how many bytes at the front of b stand for themselves in a string: they are no quote, no
// backslash and no control character.
func plainLen(b []byte) (n int) {
	for len(b)-n >= 8 {
		if found := notPlain(b[n:]); found != 0 {
			return n + bits.TrailingZeros64(found)/8
		}
		n += 8
		// what goes on for this long is likely to go on for longer: most of a large body is one string
		for n >= 32 && len(b)-n >= 32 {
			w := b[n : n+32 : n+32]
			if notPlain(w)|notPlain(w[8:])|notPlain(w[16:])|notPlain(w[24:]) != 0 {
				break
			}
			n += 32
		}
	}
	for n < len(b) && b[n] >= 0x20 && b[n] != '"' && b[n] != '\\' {
		n++
	}
	return n
}

// notPlain sets the high bit of each of the first eight bytes of b that does not stand for itself. Bits above the
// lowest one set may be false.
func notPlain(b []byte) uint64 {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	w := binary.LittleEndian.Uint64(b)
	// Subtracting k from each byte sets the high bit of those less than k, and of some above the first that had
	// to borrow. A quote and a backslash become 0 here, the only byte less than 1.
	return ((w - ones*0x20) | ((w ^ ones*'"') - ones) | ((w ^ ones*'\\') - ones)) &^ w & highs
}

// escapeLen returns the length of the escape sequence at the front of b, or 0 if it is not one.
func escapeLen(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	switch b[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		if len(b) < 6 {
			return 0
		}
		for _, h := range b[2:6] {
			if !isDigit(h) && (h|0x20 < 'a' || h|0x20 > 'f') {
				return 0
			}
		}
		return 6
	}
	return 0
}

// unescape returns the text of a string that was checked by str.
func unescape(raw []byte) []byte {
	quoted := make([]byte, 0, len(raw)+2)
	quoted = append(append(append(quoted, '"'), raw...), '"')
	var s string
	if err := json.Unmarshal(quoted, &s); err != nil {
		return raw
	}
	return []byte(s)
}

func isDigit(b byte) bool { return '0' <= b && b <= '9' }

// digits consumes a run of at least one digit.
func (c *cursor) digits() {
	from := c.pos
	for c.pos < len(c.data) && isDigit(c.data[c.pos]) {
		c.pos++
	}
	if c.pos == from {
		c.unexpected("a digit")
	}
}

// nextIn reports whether the next byte is one of set.
func (c *cursor) nextIn(set string) bool {
	return c.err == nil && c.pos < len(c.data) && strings.IndexByte(set, c.data[c.pos]) >= 0
}

// number consumes a number and returns its text.
func (c *cursor) number() []byte {
	c.peek()
	from := c.pos
	if c.nextIn("-") {
		c.pos++
	}
	if c.nextIn("0") {
		c.pos++
	} else {
		c.digits()
	}
	if c.nextIn(".") {
		c.pos++
		c.digits()
	}
	if c.nextIn("eE") {
		c.pos++
		if c.nextIn("+-") {
			c.pos++
		}
		c.digits()
	}
	return c.data[from:c.pos]
}

// literal consumes true, false or null.
func (c *cursor) literal(word string) {
	if !bytes.HasPrefix(c.data[c.pos:], []byte(word)) {
		c.unexpected("a value")
		return
	}
	c.pos += len(word)
}

// skip consumes one value of any kind and returns where it stood.
func (c *cursor) skip() span {
	first := c.peek()
	from := c.pos
	switch {
	case first == '"':
		c.str()
	case first == '{':
		for more := c.enter('{'); more; more = c.next('}') {
			c.name()
			c.skip()
		}
	case first == '[':
		for more := c.enter('['); more; more = c.next(']') {
			c.skip()
		}
	case first == 't':
		c.literal("true")
	case first == 'f':
		c.literal("false")
	case first == 'n':
		c.literal("null")
	case first == '-' || isDigit(first):
		c.number()
	default:
		c.unexpected("a value")
	}
	return span{from, c.pos}
}

// end checks that nothing but white space is left.
func (c *cursor) end() {
	if c.peek() != 0 || c.err == nil && c.pos < len(c.data) {
		c.unexpected("the end")
	}
}
