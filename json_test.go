package mesh

import (
	"encoding/json"
	"strings"
	"testing"
)

// cursorErr walks text as one JSON value of any kind.
func cursorErr(text []byte, maxDepth int) error {
	c := cursor{data: text, maxDepth: maxDepth}
	c.skip()
	c.end()
	return c.err
}

// jsonTexts are the corners of RFC 8259's grammar, valid and not.
var jsonTexts = []string{
	// literals
	`true`, `false`, `null`, `tru`, `True`, `nul`, `nulll`, `truefalse`, `t`, `NaN`, `Infinity`, `-Infinity`, `undefined`,
	// numbers
	`0`, `-0`, `1`, `10`, `-1`, `0.0`, `0.10`, `1e5`, `1E5`, `1e+5`, `1E-5`, `0e0`, `-0.0e-0`, `12345678901234567890`, `1e999`,
	``, `-`, `+1`, `01`, `-01`, `00`, `.5`, `1.`, `1.e5`, `1e`, `1e+`, `--1`, `1-`, `0x10`, `1_000`, `1,`, `1 2`, `0-`, `- 1`, `1e5.5`,
	// strings
	`""`, `"a"`, `"é😀"`, `"\""`, `"\\"`, `"\/\b\f\n\r\t"`, `"\u00e9"`, `"\uD83D\uDE00"`, `"\ud800"`, `"\udc00\ud800"`, "\"\x7f\"",
	`"`, `"a`, `"\"`, `"\`, `"\x"`, `"\u"`, `"\u12"`, `"\u123"`, `"\u123g"`, `"\u12 4"`, `"\U0041"`, `"\'"`, `'a'`, "\"\n\"", "\"\x00\"",
	"\"\x1f\"", "\"\t\"", "\"\x20\"", `"a""b"`, `"12345678\"`, `"1234567\"8"`,
	// a backslash, a quote, or a control character at every place of an eight-byte word is below
	// arrays
	`[]`, `[ ]`, `[1]`, `[1,2]`, ` [ 1 , 2 ] `, `[[],[[]]]`, `[`, `]`, `[1`, `[1,`, `[1,]`, `[,]`, `[,1]`, `[1 2]`, `[1}`, `[}`, `[1,,2]`,
	// objects
	`{}`, `{ }`, `{"a":1}`, `{"a":1,"b":[{}]}`, ` { "a" : 1 , "a" : 2 } `, `{"":0}`, `{`, `}`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,`, `{"a":1,}`,
	`{,}`, `{"a"}`, `{"a",1}`, `{a:1}`, `{1:1}`, `{"a":1 "b":2}`, `{"a":1]`, `{]`, `{"a"::1}`, `{"a":}`, `{null:1}`, `{"a":1,,"b":2}`,
	// white space
	" \t\r\n1\n", "\v1", "\f1", "\u00a01", "\u20281", "1\x00", "\x001", "\x00", " ", "[\u00a0]", "// c\n1", "/**/1", "1//",
	// more than one value, byte order mark
	`{}{}`, `[] []`, `1true`, `""""`, "\ufeff{}", "{}\ufeff",
}

func TestCursorAcceptsWhatEncodingJSONAccepts(t *testing.T) {
	texts := jsonTexts
	for _, special := range []string{`\n`, `\`, `"`, "\n", "\x00", "\x1f", "é", "\x7f", "!", "#", "[", "]"} {
		for before := range 70 {
			texts = append(texts, `"`+strings.Repeat("a", before)+special+strings.Repeat("b", 70-before)+`"`)
		}
	}
	for _, text := range texts {
		err := cursorErr([]byte(text), 1000)
		if valid := json.Valid([]byte(text)); valid != (err == nil) {
			t.Errorf("%q: encoding/json says valid=%v, cursor says %v", text, valid, err)
		}
	}
}

func FuzzCursorAgreesWithEncodingJSON(f *testing.F) {
	for _, text := range jsonTexts {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		err := cursorErr(text, 9_000) // encoding/json stops at 10,000
		if err != nil && strings.Contains(err.Error(), "levels deep") {
			return
		}
		if valid := json.Valid(text); valid != (err == nil) {
			t.Fatalf("encoding/json says valid=%v, cursor says %v", valid, err)
		}
	})
}

func TestCursorReturnsValuesInTheirOwnBytes(t *testing.T) {
	for _, value := range []string{`1e-7`, `-0`, `"a\u0062"`, `[1 , 2]`, `{"a" :1}`, `null`, `true`} {
		c := cursor{data: []byte(" \n" + value + " \t"), maxDepth: 10}
		if got := string(c.skip().of(c.data)); got != value || c.err != nil {
			t.Errorf("skip over %q returned %q, %v", value, got, c.err)
		}
	}
}

func TestCursorUnescapesMemberNames(t *testing.T) {
	names := map[string]string{
		`"model"`:         "model",
		`"mod\u0065l"`:    "model",
		`"\u006dodel"`:    "model",
		`"a\"\\\/b\n"`:    "a\"\\/b\n",
		`"\ud83d\ude00"`:  "😀",
		`"\ud800"`:        "\ufffd",
		`"model\u0000"`:   "model\x00",
		`""`:              "",
		`"caf\u00e9 bar"`: "café bar",
	}
	for written, want := range names {
		c := cursor{data: []byte(`{` + written + ` : 1}`), maxDepth: 1}
		c.enter('{')
		if got := string(c.name()); got != want || c.err != nil {
			t.Errorf("the name of %s is %q, %v; want %q", written, got, c.err, want)
		}
	}
}

func TestCursorStopsAtTheFirstFaultAndSaysWhere(t *testing.T) {
	faults := map[string]string{
		`{"a":1,}`:      `unexpected character '}', expected a member name at byte 7`,
		`{"a" 1}`:       `unexpected character '1', expected ':' at byte 5`,
		`{"a":1 "b":2}`: `unexpected character '"', expected ',' or '}' at byte 7`,
		`[1}`:           `unexpected character '}', expected ',' or ']' at byte 2`,
		`[nil]`:         `unexpected character 'n', expected a value at byte 1`,
		`[é]`:           `unexpected character 'é', expected a value at byte 1`,
		"\ufeff{}":      `unexpected character '\ufeff', expected a value at byte 0`,
		"{}\x00":        `unexpected character '\x00', expected the end at byte 2`,
		`{} 1`:          `unexpected character '1', expected the end at byte 3`,
		`1.x`:           `unexpected character 'x', expected a digit at byte 2`,
		`1.`:            `unexpected end of JSON, expected a digit at byte 2`,
		``:              `unexpected end of JSON, expected a value at byte 0`,
		`["a`:           `unexpected end of JSON in string at byte 3`,
		`"a\qb"`:        `invalid escape in string at byte 2`,
		"\"ab\nc\"":     `unescaped control character in string at byte 3`,
	}
	for text, want := range faults {
		if err := cursorErr([]byte(text), 10); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestCursorDoesNothingAfterAFault(t *testing.T) {
	c := cursor{data: []byte(`[1 x {"a":"b"}]`), maxDepth: 10}
	c.skip()
	first, pos := c.err, c.pos
	if c.enter('{') || c.next('}') || c.name() != nil || c.peek() != 0 {
		t.Error("a step was taken after a fault")
	}
	c.skip()
	c.str()
	c.number()
	c.end()
	if c.err != first || c.pos != pos {
		t.Errorf("after the fault %v at %d: %v at %d", first, pos, c.err, c.pos)
	}
}

func TestCursorRefusesMoreThanItsDepth(t *testing.T) {
	arrays := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	objects := func(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }
	for name, nest := range map[string]func(int) string{"arrays": arrays, "objects": objects} {
		if err := cursorErr([]byte(nest(200)), 200); err != nil {
			t.Errorf("200 %s: %v", name, err)
		}
		if err := cursorErr([]byte(nest(201)), 200); err == nil || !strings.Contains(err.Error(), "nested more than 200 levels deep") {
			t.Errorf("201 %s: %v", name, err)
		}
		// side by side is not deep
		if err := cursorErr([]byte("["+strings.Repeat(nest(199)+",", 300)+"1]"), 200); err != nil {
			t.Errorf("300 times 199 %s side by side: %v", name, err)
		}
	}
	if err := cursorErr([]byte(strings.Repeat("[", 5_000_000)), 200); err == nil {
		t.Error("five million opening brackets were accepted")
	}
}
