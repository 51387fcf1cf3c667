package mesh

import (
	"fmt"
	"strings"
	"testing"
)

// faultsOf are the faults of a body, one a line: the type, where, and the message.
func faultsOf(t *testing.T, body string) (lines []string) {
	t.Helper()
	req, refused := parseChat([]byte(body))
	if refused == nil {
		if req == nil {
			t.Fatalf("neither a request nor a refusal for %s", body)
		}
		return nil
	}
	if req != nil || refused.status != 422 || refused.code != "validation_error" {
		t.Fatalf("%s\nwas refused with %v", body, refused)
	}
	for _, f := range refused.details {
		if f.Loc[0] != "body" {
			t.Errorf("a fault that is not in the body: %v", f.Loc)
		}
		var where strings.Builder
		for _, step := range f.Loc[1:] {
			switch step := step.(type) {
			case string:
				where.WriteString("." + step)
			case int:
				fmt.Fprintf(&where, "[%d]", step)
			default:
				t.Errorf("a step of type %T in %v", step, f.Loc)
			}
		}
		lines = append(lines, f.Type+" "+strings.TrimPrefix(where.String(), ".")+": "+f.Msg)
	}
	return lines
}

func expectFaults(t *testing.T, body string, want ...string) {
	t.Helper()
	got := faultsOf(t, body)
	if g, w := strings.Join(got, "\n  "), strings.Join(want, "\n  "); g != w {
		t.Errorf("%.300s\nhas the faults\n  %s\nwant\n  %s", body, g, w)
	}
}

// pydantic's words
const (
	notString  = "Input should be a valid string"
	notBool    = "Input should be a valid boolean"
	notNumber  = "Input should be a valid number"
	notInteger = "Input should be a valid integer"
	notList    = "Input should be a valid list"
	notDict    = "Input should be a valid dictionary"
	fractional = "int_from_float %s: Input should be a valid integer, got a number with a fractional part"
	infinite   = "finite_number %s: Input should be a finite number"
	atLeast    = "greater_than_equal %s: Input should be greater than or equal to "
	atMost     = "less_than_equal %s: Input should be less than or equal to "
	above      = "greater_than %s: Input should be greater than "
	twiceMsg   = "value_error %s: Value error, the member is given twice"
	twinMsg    = "value_error %s: Value error, the member is given again in another letter case"
)

// inside is a fault at a member of the one it is said of.
func inside(fault, member string) string { return strings.Replace(fault, "%s", "%s"+member, 1) }

func TestMemberGivenTwiceIsRefused(t *testing.T) {
	values := map[string]string{"messages": `[{"role":"user","content":"x"}]`}
	for _, name := range chatNames {
		value, ok := values[name]
		if !ok {
			value = "null"
		}
		first := `"` + name + `":` + value
		again := fmt.Sprintf(`"\u%04x%s":%s`, name[0], name[1:], value)
		rest := "," + msgs
		if name == "messages" {
			rest = ""
		}
		for _, body := range []string{
			`{` + first + `,` + first + rest + `}`,
			`{` + first + rest + `,"x":1,` + again + `}`,
		} {
			expectFaults(t, body, fmt.Sprintf(twiceMsg, name))
		}
	}
	expectFaults(t, `{"logprobs":1,"logprobs":2,"metadata":{"a":1,"a":2},`+msgs+`}`) // not the gateway's
}

func TestMemberBesideItsTwinInAnotherLetterCaseIsRefused(t *testing.T) {
	for _, name := range chatNames {
		value, rest := "null", ","+msgs
		if name == "messages" {
			value, rest = `[{"role":"user","content":"x"}]`, ""
		}
		for _, twin := range []string{strings.ToUpper(name), strings.ToUpper(name[:1]) + name[1:], `\u00` + fmt.Sprintf("%02x", name[0]-0x20) + name[1:]} {
			exact, other := `"`+name+`":`+value, `"`+twin+`":5`
			expectFaults(t, `{`+exact+`,`+other+rest+`}`, fmt.Sprintf(twinMsg, name))
			expectFaults(t, `{`+other+rest+`,`+exact+`}`, fmt.Sprintf(twinMsg, name))
		}
	}
	// letters beyond ASCII that fold to one in it, as Go's encoding/json has it
	expectFaults(t, `{"\u017ftream":true,"stream":false,`+msgs+`}`, fmt.Sprintf(twinMsg, "stream"))
	expectFaults(t, `{"max_to\u212aens":1,"max_tokens":1,`+msgs+`}`, fmt.Sprintf(twinMsg, "max_tokens"))
}

func TestTwinOfAMemberThatTheGatewayAddsIsRefused(t *testing.T) {
	expectFaults(t, `{"Model":"x",`+msgs+`}`, fmt.Sprintf(twinMsg, "model"))
	expectFaults(t, `{"Stream_Options":{},"stream":true,`+msgs+`}`, fmt.Sprintf(twinMsg, "stream_options"))
	expectFaults(t, `{"stream":true,"stream_options":{"Include_Usage":false},`+msgs+`}`, fmt.Sprintf(twinMsg, "stream_options.include_usage"))
	expectFaults(t, `{"stream_options":{"Include_Usage":false},"stream":true,`+msgs+`}`, fmt.Sprintf(twinMsg, "stream_options.include_usage"))

	// where the gateway adds nothing, a lone one is unknown and passes
	expectFaults(t, `{"Stream_Options":{},`+msgs+`}`)
	expectFaults(t, `{"stream_options":{"Include_Usage":false},`+msgs+`}`)
	expectFaults(t, `{"Temperature":"hot","Timeout":5,`+msgs+`}`)
}

func TestAllFaultsAreReportedInOrderOfAppearance(t *testing.T) {
	const body = `{"temperature":3,"stream":"yes","messages":[{"role":"robot","content":5},{"role":"tool"}],"Top_p":1,"max_tokens":1.5,` +
		`"template":7,"top_p":-1,"stop":[1],"max_tokens":2}`
	expectFaults(t, body,
		"less_than_equal temperature: Input should be less than or equal to 2",
		"bool_type stream: "+notBool,
		"literal_error messages[0].role: Input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
		"value_error messages[0].content: Value error, content should be a string, a list of parts, or null",
		"missing messages[1].tool_call_id: Field required",
		"missing messages[1].content: Field required",
		fmt.Sprintf(fractional, "max_tokens"),
		"string_type template: "+notString,
		"greater_than_equal top_p: Input should be greater than or equal to 0",
		"string_type stop[0]: "+notString,
		fmt.Sprintf(twiceMsg, "max_tokens"),
		fmt.Sprintf(twinMsg, "top_p"),
	)
	_, refused := parseChat([]byte(body))
	if want := "temperature: Input should be less than or equal to 2 (and 11 more)"; refused.message != want || refused.param != "temperature" {
		t.Errorf("%s, %s", refused.message, refused.param)
	}
}

func TestNoMoreThanAHundredFaultsAreReported(t *testing.T) {
	for n, want := range map[int]int{99: 99, 100: 100, 101: 100, 5000: 100} {
		body := `{"messages":[` + strings.TrimSuffix(strings.Repeat(`5,`, n), ",") + `]}`
		got := faultsOf(t, body)
		if len(got) != want || got[want-1] != fmt.Sprintf("dict_type messages[%d]: %s", want-1, notDict) {
			t.Errorf("of %d faults %d were reported, the last %s", n, len(got), got[len(got)-1])
		}
	}
}

func TestFaultsDoNotChangeEachOthersPlace(t *testing.T) {
	_, refused := parseChat([]byte(`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":1,"detail":2}},5]}]}`))
	want := "[{string_type [body messages 0 content 0 image_url url] Input should be a valid string}" +
		" {string_type [body messages 0 content 0 image_url detail] Input should be a valid string}" +
		" {dict_type [body messages 0 content 1] Input should be a valid dictionary}]"
	if got := fmt.Sprint(refused.details); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
