package mesh

import (
	"fmt"
	"strings"
	"testing"
)

func TestEveryMemberAcceptsWhatTheContractNames(t *testing.T) {
	good := map[string][]string{
		"model":             {`"a/b"`, `""`, `"\ud800"`},
		"session_id":        {`""`, `"s"`, `"` + strings.Repeat("é", 256) + `"`},
		"stream":            {`true`, `false`},
		"stream_options":    {`{}`, `{"include_usage":true}`, `{"include_usage":null}`, `{"x":5}`},
		"temperature":       {`0`, `2`, `0.0`, `2.0`, `20e-1`, `-0`, `1e-999`},
		"max_tokens":        {`1`, `1.0`, `1e2`, `100e-2`, `99999999999999999999`},
		"top_p":             {`0`, `1`, `0.5`},
		"frequency_penalty": {`-2`, `2`, `0`},
		"presence_penalty":  {`-2.0`, `2.0`},
		"stop":              {`"a"`, `[]`, `["a","b"]`},
		"seed":              {`-5`, `0`, `12345678901234567890`, `1.0`, `1e2`, `-1E+2`, "1" + strings.Repeat("0", 400)},
		"tools": {`[]`, `[{"type":"function","function":{"name":"f"}}]`,
			`[{"type":"function","x":1,"function":{"name":"f","description":"d","parameters":{"a":[]},"strict":null}}]`,
			`[{"function":{"description":null,"parameters":null,"name":"f"},"type":"function"}]`},
		"tool_choice": {`"auto"`, `{"type":"function"}`, `{}`},
		"user":        {`""`, `"` + strings.Repeat("😀", 256) + `"`, `"` + strings.Repeat(`\ud83d\ude00`, 256) + `"`},
		"modality":    {`"text"`, `"tex\u0074"`, `"image"`},
		"modalities":  {`[]`, `["text","audio","image"]`},
		"audio":       {`{}`, `{"voice":"alloy","format":"wav"}`, `{"voice":{"id":"v"},"format":"pcm16"}`, `{"format":null,"x":1}`},
		"timeout":     {`1`, `0.001`, `1e300`},
		"cache":       {`true`, `false`},
		"variables":   {`{}`},
		"models":      {`[]`},
		"transforms":  {`[]`, `["middle-out"]`},
		"image":       {`{}`, `{"n":null,"size":null,"style":null}`, `{"n":10,"size":"1x1","quality":"hd","response_format":"b64_json"}`},
		"async_mode":  {`false`, `true`},

		"async_callback_url": {},

		// not the gateway's: anything goes
		"response_format": {`{"type":"json_object"}`, `5`}, "n": {`1`, `"x"`}, "max_completion_tokens": {`0`}, "metadata": {`[1]`},
		"logprobs": {`true`}, "reasoning_effort": {`"high"`}, "parallel_tool_calls": {`false`}, "Temperature": {`"hot"`},
	}
	for _, name := range chatNames {
		if name != "messages" && name != "template" && good[name] == nil {
			t.Errorf("no good value for %s", name)
		}
		if name != "messages" {
			good[name] = append(good[name], "null")
		}
	}
	for name, values := range good {
		rest := msgs
		if name == "audio" {
			rest = `"modalities":["audio"],` + msgs
		}
		for _, value := range values {
			expectFaults(t, `{"`+name+`":`+value+`,`+rest+`}`)
			expectFaults(t, "{"+rest+", \""+name+"\" :\n"+value+" }")
		}
	}
}

func TestEveryMemberNamesWhatIsWrongWithIt(t *testing.T) {
	// %s is the member's name
	cases := []struct{ member, value, fault string }{
		{"model", `5`, "string_type %s: " + notString},
		{"model", `["a"]`, "string_type %s: " + notString},
		{"session_id", `5`, "string_type %s: " + notString},
		{"session_id", `"` + strings.Repeat("a", 257) + `"`, "string_too_long %s: String should have at most 256 characters"},
		{"stream", `"true"`, "bool_type %s: " + notBool},
		{"stream", `1`, "bool_type %s: " + notBool},
		{"stream_options", `[]`, "dict_type %s: " + notDict},
		{"stream_options", `true`, "dict_type %s: " + notDict},
		{"stream_options", `{"include_usage":1}`, "bool_type %s.include_usage: " + notBool},
		{"stream_options", `{"include_usage":true,"x":1,"includ\u0065_usage":false}`, inside(twiceMsg, ".include_usage")},
		{"stream_options", `{"include_usage":null,"include_usage":null}`, inside(twiceMsg, ".include_usage")},
		{"stream_options", `{"Include_Usage":true,"include_usage":false}`, inside(twinMsg, ".include_usage")},

		{"temperature", `"1"`, "float_type %s: " + notNumber},
		{"temperature", `true`, "float_type %s: " + notNumber},
		{"temperature", `[1]`, "float_type %s: " + notNumber},
		{"temperature", `-0.1`, atLeast + "0"},
		{"temperature", `-1e-300`, atLeast + "0"},
		{"temperature", `2.0000001`, atMost + "2"},
		{"temperature", `3`, atMost + "2"},
		{"temperature", `1e999`, atMost + "2"},
		{"temperature", `-1e999`, atLeast + "0"},
		{"top_p", `"x"`, "float_type %s: " + notNumber},
		{"top_p", `-1`, atLeast + "0"},
		{"top_p", `1.01`, atMost + "1"},
		{"frequency_penalty", `{}`, "float_type %s: " + notNumber},
		{"frequency_penalty", `-2.01`, atLeast + "-2"},
		{"frequency_penalty", `2.01`, atMost + "2"},
		{"presence_penalty", `false`, "float_type %s: " + notNumber},
		{"presence_penalty", `-3`, atLeast + "-2"},
		{"presence_penalty", `1e1`, atMost + "2"},

		{"max_tokens", `"1"`, "int_type %s: " + notInteger},
		{"max_tokens", `true`, "int_type %s: " + notInteger},
		{"max_tokens", `0`, atLeast + "1"},
		{"max_tokens", `0.0`, atLeast + "1"},
		{"max_tokens", `-5`, atLeast + "1"},
		{"max_tokens", `1.5`, fractional},
		{"max_tokens", `5e-1`, fractional},
		{"max_tokens", `1e999`, infinite},
		{"max_tokens", `-1e999`, infinite},
		{"max_tokens", "-1" + strings.Repeat("0", 400), atLeast + "1"},
		{"seed", `"1"`, "int_type %s: " + notInteger},
		{"seed", `0.5`, fractional},
		{"seed", `1e999`, infinite},
		{"seed", `-1.0e999`, infinite},

		{"stop", `5`, "value_error %s: Value error, stop should be a string or a list of strings"},
		{"stop", `{}`, "value_error %s: Value error, stop should be a string or a list of strings"},
		{"stop", `["a",5]`, "string_type %s[1]: " + notString},
		{"stop", `[null]`, "string_type %s[0]: " + notString},

		{"tools", `{}`, "list_type %s: " + notList},
		{"tools", `"f"`, "list_type %s: " + notList},
		{"tools", `["f"]`, "dict_type %s[0]: " + notDict},
		{"tools", `[null]`, "dict_type %s[0]: " + notDict},
		{"tools", `[{"function":{"name":"f"}}]`, "missing %s[0].type: Field required"},
		{"tools", `[{"type":null,"function":{"name":"f"}}]`, "missing %s[0].type: Field required"},
		{"tools", `[{"type":"custom","function":{"name":"f"}}]`, "literal_error %s[0].type: Input should be 'function'"},
		{"tools", `[{"type":"function"}]`, "missing %s[0].function: Field required"},
		{"tools", `[{"type":"function","function":"f"}]`, "dict_type %s[0].function: " + notDict},
		{"tools", `[{"type":"function","function":{}}]`, "missing %s[0].function.name: Field required"},
		{"tools", `[{"type":"function","function":{"name":5}}]`, "string_type %s[0].function.name: " + notString},
		{"tools", `[{"type":"function","function":{"name":"f","description":5}}]`, "string_type %s[0].function.description: " + notString},
		{"tools", `[{"type":"function","function":{"name":"f","parameters":[]}}]`, "dict_type %s[0].function.parameters: " + notDict},
		{"tools", `[{"type":"function","function":{"name":"f","name":"g"}}]`, "value_error %s[0].function.name: Value error, the member is given twice"},
		{"tools", `[{"type":"function","function":{"name":"f","NAME":"g"}}]`, "value_error %s[0].function.name: Value error, the member is given again in another letter case"},

		{"tool_choice", `5`, "value_error %s: Value error, tool_choice should be a string or an object"},
		{"tool_choice", `["auto"]`, "value_error %s: Value error, tool_choice should be a string or an object"},
		{"user", `5`, "string_type %s: " + notString},
		{"user", `"` + strings.Repeat("é", 257) + `"`, "string_too_long %s: String should have at most 256 characters"},
		{"user", `"` + strings.Repeat(`\ud83d\ude00`, 257) + `"`, "string_too_long %s: String should have at most 256 characters"},
		{"modality", `"audio"`, "literal_error %s: Input should be 'text' or 'image'"},
		{"modality", `5`, "string_type %s: " + notString},
		{"modalities", `"text"`, "list_type %s: " + notList},
		{"modalities", `["text","smell"]`, "literal_error %s[1]: Input should be 'text', 'audio' or 'image'"},
		{"modalities", `[5]`, "string_type %s[0]: " + notString},
		{"audio", `"wav"`, "dict_type %s: " + notDict},
		{"audio", `{"format":"aac"}`, "literal_error %s.format: Input should be 'wav', 'mp3', 'flac', 'opus' or 'pcm16'"},
		{"audio", `{"voice":"a","voice":"b"}`, "value_error %s.voice: Value error, the member is given twice"},
		{"timeout", `"5"`, "float_type %s: " + notNumber},
		{"timeout", `0`, above + "0"},
		{"timeout", `-0.0`, above + "0"},
		{"timeout", `1e-999`, above + "0"},
		{"timeout", `-1`, above + "0"},
		{"timeout", `-1e999`, above + "0"},
		{"timeout", `1e999`, infinite},
		{"timeout", "1" + strings.Repeat("0", 400), infinite},
		{"cache", `"no"`, "bool_type %s: " + notBool},
		{"cache", `0`, "bool_type %s: " + notBool},

		{"template", `5`, "string_type %s: " + notString},
		{"variables", `[]`, "dict_type %s: " + notDict},
		{"models", `"a/b"`, "list_type %s: " + notList},
		{"transforms", `"middle-out"`, "list_type %s: " + notList},
		{"image", `[]`, "dict_type %s: " + notDict},
		{"image", `{"n":11}`, "less_than_equal %s.n: Input should be less than or equal to 10"},
		{"image", `{"n":1.5}`, inside(fractional, ".n")},
		{"image", `{"size":"1x1","n":1,"n":2}`, inside(twiceMsg, ".n")},
		{"image", `{"quality":5}`, "string_type %s.quality: " + notString},
		{"image", `{"style":"vivid"}`, "extra_forbidden %s.style: Extra inputs are not permitted"},
		{"async_mode", `1`, "bool_type %s: " + notBool},
		{"async_callback_url", `"http://10.0.0.1/"`, "value_error %s: Value error, results are not sent to URLs: ask for the job until it has ended"},
	}
	tested := map[string]bool{"messages": true, "n": true, "max_completion_tokens": true} // the upstream checks those two
	for _, c := range cases {
		tested[c.member] = true
		want, rest := fmt.Sprintf(c.fault, c.member), msgs
		if c.member == "audio" {
			rest = `"modalities":["audio"],` + msgs
		}
		expectFaults(t, `{"`+c.member+`":`+c.value+`,`+rest+`}`, want)
		expectFaults(t, "{"+rest+",\n\""+c.member+"\" :\t"+c.value+" }", want)
	}
	for _, name := range chatNames {
		if !tested[name] {
			t.Errorf("no bad value for %s", name)
		}
	}
}

func TestMembersInsideOfMembersAreChecked(t *testing.T) {
	expectFaults(t, `{"image":{"n":0,"size":5,"response_format":"gif"},"variables":{"a":1,"b":null},"models":[1],"transforms":["x"],`+msgs+`}`,
		"greater_than_equal image.n: Input should be greater than or equal to 1",
		"string_type image.size: "+notString,
		"literal_error image.response_format: Input should be 'url' or 'b64_json'",
		"string_type variables.a: "+notString,
		"string_type variables.b: "+notString,
		"string_type models[0]: "+notString,
		"literal_error transforms[0]: Input should be 'middle-out'")
}

func TestMessagesAreRequired(t *testing.T) {
	for body, want := range map[string]string{
		`{}`:                           "missing messages: Field required",
		`{ "model":"x" }`:              "missing messages: Field required",
		`{"cache":true}`:               "missing messages: Field required",
		`{"cache":true,"stream":true}`: "missing messages: Field required",
		`{"Messages":[]}`:              "missing messages: Field required",
		`{"messages":null}`:            "list_type messages: " + notList,
		`{"messages":{}}`:              "list_type messages: " + notList,
		`{"messages":"hi"}`:            "list_type messages: " + notList,
		`{"messages":[]}`:              "too_short messages: List should have at least 1 item after validation, not 0",
		`{"messages":[ ]}`:             "too_short messages: List should have at least 1 item after validation, not 0",
		`{"messages":["hi"]}`:          "dict_type messages[0]: " + notDict,
		`{"messages":[null]}`:          "dict_type messages[0]: " + notDict,
	} {
		expectFaults(t, body, want)
	}
}

func TestMessageKeepsToItsRules(t *testing.T) {
	const (
		noContent  = "missing messages[0].content: Field required"
		nullAlone  = "value_error messages[0].content: Value error, content may be null only beside tool_calls"
		notContent = "value_error messages[0].content: Value error, content should be a string, a list of parts, or null"
		roles      = "literal_error messages[0].role: Input should be 'system', 'developer', 'user', 'assistant' or 'tool'"
	)
	for message, want := range map[string]string{ // one fault at most
		`{"role":"system","content":"x"}`:                                              "",
		`{"role":"developer","content":"x"}`:                                           "",
		`{"role":"user","content":"x"}`:                                                "",
		`{"role":"user","content":""}`:                                                 "",
		`{"role":"user","content":[]}`:                                                 "",
		`{"role":"user","content":"x","name":"n"}`:                                     "",
		`{"role":"user","content":"x","name":null,"tool_calls":null,"x":{"role":1}}`:   "",
		`{"content":"x","role":"us\u0065r"}`:                                           "",
		`{"role":"assistant","content":"x"}`:                                           "",
		`{"role":"assistant","content":"x","tool_calls":[]}`:                           "",
		`{"role":"assistant","content":"x","refusal":null,"audio":null}`:               "",
		`{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}`:                "",
		`{"tool_calls":[{"id":"1"}],"content":null,"role":"assistant"}`:                "",
		`{"role":"assistant","tool_calls":[{"id":"1"}]}`:                               "",
		`{"role":"assistant","content":null,"refusal":"no"}`:                           "",
		`{"role":"assistant","content":null,"audio":{"id":"a"}}`:                       "",
		`{"role":"assistant","content":null,"function_call":{"name":"f"}}`:             "",
		`{"role":"tool","tool_call_id":"1","content":"x"}`:                             "",
		`{"role":"tool","content":[{"type":"text","text":"x"}],"tool_call_id":"1"}`:    "",
		`{"role":"assistant","content":null}`:                                          nullAlone,
		`{"role":"assistant","content":null,"tool_calls":null}`:                        nullAlone,
		`{"role":"assistant","content":null,"tool_calls":[]}`:                          nullAlone,
		`{"role":"assistant","content":null,"refusal":null}`:                           nullAlone,
		`{"role":"assistant"}`:                                                         noContent,
		`{"role":"user","tool_calls":[]}`:                                              noContent,
		`{"role":"user","Content":"x"}`:                                                noContent,
		`{"role":"user","content":5}`:                                                  notContent,
		`{"role":"user","content":{"type":"text"}}`:                                    notContent,
		`{"role":"user","content":true}`:                                               notContent,
		`{"content":"x"}`:                                                              "missing messages[0].role: Field required",
		`{"content":"x","role":null}`:                                                  "missing messages[0].role: Field required",
		`{"role":"function","content":"x"}`:                                            roles,
		`{"role":"User","content":"x"}`:                                                roles,
		`{"role":"","content":"x"}`:                                                    roles,
		`{"role":5,"content":"x"}`:                                                     "string_type messages[0].role: " + notString,
		`{"role":"user","content":"x","name":5}`:                                       "string_type messages[0].name: " + notString,
		`{"role":"tool","content":"x"}`:                                                "missing messages[0].tool_call_id: Field required",
		`{"role":"tool","content":"x","tool_call_id":null}`:                            "missing messages[0].tool_call_id: Field required",
		`{"role":"tool","content":"x","tool_call_id":5}`:                               "string_type messages[0].tool_call_id: " + notString,
		`{"role":"assistant","content":"x","tool_calls":{}}`:                           "list_type messages[0].tool_calls: " + notList,
		`{"role":"assistant","content":"x","tool_calls":["f"]}`:                        "dict_type messages[0].tool_calls[0]: " + notDict,
		`{"role":"user","content":"x","content":"y"}`:                                  fmt.Sprintf(twiceMsg, "messages[0].content"),
		`{"role":"user","content":"x","cont\u0065nt":null}`:                            fmt.Sprintf(twiceMsg, "messages[0].content"),
		`{"role":"user","role":"system","content":"x"}`:                                fmt.Sprintf(twiceMsg, "messages[0].role"),
		`{"role":"assistant","content":null,"content":null,"tool_calls":[{"id":"1"}]}`: fmt.Sprintf(twiceMsg, "messages[0].content"),
		`{"role":"user","content":"x","Role":"system"}`:                                fmt.Sprintf(twinMsg, "messages[0].role"),
		`{"CONTENT":"x","role":"user","content":"y"}`:                                  fmt.Sprintf(twinMsg, "messages[0].content"),
	} {
		body := `{"messages":[` + message + `]}`
		if want == "" {
			expectFaults(t, body)
		} else {
			expectFaults(t, body, want)
		}
	}
}

func TestPartKeepsToTheRulesOfItsType(t *testing.T) {
	for part, want := range map[string]string{ // %s is the part; one fault at most
		`{"type":"text","text":""}`:                                        "",
		`{"text":"x","type":"text","x":1}`:                                 "",
		`{"type":"t\u0065xt","text":"x"}`:                                  "",
		`{"type":"image_url","image_url":{"url":"u"}}`:                     "",
		`{"image_url":{"detail":"low","url":"u"},"type":"image_url"}`:      "",
		`{"type":"image_url","image_url":{"url":"u","detail":null}}`:       "",
		`{"type":"image_url","image_url":{"url":"u","detail":"auto"}}`:     "",
		`{"type":"image_url","image_url":{"url":"u","detail":"high"}}`:     "",
		`{"type":"input_audio","input_audio":{"data":"d","format":"wav"}}`: "",
		`{"type":"input_audio","input_audio":{"url":"d","format":"mp3"}}`:  "",
		`{"type":"input_audio","input_audio":{"uri":"d","format":"x"}}`:    "",
		`{"type":"video_url","video_url":{"url":"u"}}`:                     "",
		`{"type":"file","file":{"file_id":"f"}}`:                           "",
		`{"type":"file"}`:                                                  "",
		`{"type":"hologram","hologram":5}`:                                 "",
		`{"type":"hologram","text":5,"image_url":"u","input_audio":[]}`:    "",
		`{"text":5,"image_url":"u","type":"hologram"}`:                     "",
		`{"type":"type"}`: "",
		`{"type":""}`:     "",
		`{"type":"text","text":"x","image_url":null}`: "",
		`"x"`:                                        "dict_type %s: " + notDict,
		`null`:                                       "dict_type %s: " + notDict,
		`{"text":"x"}`:                               "missing %s.type: Field required",
		`{"type":null,"text":"x"}`:                   "missing %s.type: Field required",
		`{"type":5}`:                                 "string_type %s.type: " + notString,
		`{"type":"text"}`:                            "missing %s.text: Field required",
		`{"type":"text","text":null}`:                "missing %s.text: Field required",
		`{"type":"text","text":5}`:                   "string_type %s.text: " + notString,
		`{"text":5,"type":"text"}`:                   "string_type %s.text: " + notString,
		`{"type":"image_url"}`:                       "missing %s.image_url: Field required",
		`{"type":"image_url","image_url":"u"}`:       "dict_type %s.image_url: " + notDict,
		`{"image_url":"u","type":"image_url"}`:       "dict_type %s.image_url: " + notDict,
		`{"type":"image_url","image_url":{}}`:        "missing %s.image_url.url: Field required",
		`{"type":"image_url","image_url":{"url":5}}`: "string_type %s.image_url.url: " + notString,
		`{"type":"image_url","image_url":{"url":"u","detail":"full"}}`: "literal_error %s.image_url.detail: Input should be 'auto', 'low' or 'high'",
		`{"image_url":{"url":"u","detail":"full"},"type":"image_url"}`: "literal_error %s.image_url.detail: Input should be 'auto', 'low' or 'high'",
		`{"type":"input_audio"}`:                                            "missing %s.input_audio: Field required",
		`{"type":"input_audio","input_audio":{"data":"d"}}`:                 "missing %s.input_audio.format: Field required",
		`{"type":"input_audio","input_audio":{"format":"wav"}}`:             "missing %s.input_audio.data: Field required",
		`{"type":"input_audio","input_audio":{"format":"wav","data":null}}`: "missing %s.input_audio.data: Field required",
		`{"type":"input_audio","input_audio":{"data":5,"format":"wav"}}`:    "string_type %s.input_audio.data: " + notString,
		`{"type":"input_audio","input_audio":{"data":"d","format":5}}`:      "string_type %s.input_audio.format: " + notString,
		`{"type":"video_url"}`:                                              "missing %s.video_url: Field required",
		`{"type":"video_url","video_url":{}}`:                               "missing %s.video_url.url: Field required",
		`{"type":"text","text":"x","text":"y"}`:                             inside(twiceMsg, ".text"),
		`{"type":"text","type":"hologram","text":"x"}`:                      inside(twiceMsg, ".type"),
		`{"type":"image_url","image_url":{"url":"u","url":"v"}}`:            inside(twiceMsg, ".image_url.url"),
		`{"type":"text","text":"x","Text":"y"}`:                             inside(twinMsg, ".text"),
	} {
		body := `{"messages":[{"role":"user","content":[{"type":"text","text":"x"},` + part + `,{"type":"x"}]}]}`
		if want == "" {
			expectFaults(t, body)
		} else {
			expectFaults(t, body, fmt.Sprintf(want, "messages[0].content[1]"))
		}
	}
}

func TestPartCheckedAfterItsTypeLeavesTheWalkWhereItWas(t *testing.T) {
	req, refused := parseChat([]byte(`{"messages":[{"role":"user","content":[{"image_url":{"url":"u"},"text":"x","type":"text"},` +
		`{"text":"y","type":"text"}],"name":"n"}],"session_id":"s"}`))
	if refused != nil {
		t.Fatal(refused.details)
	}
	if got := string(req.prompt.text(req.body)); got != "xy" || req.sessionID != "s" || req.prompt.images != 0 {
		t.Errorf("%q, %+v", got, req)
	}
}
