package mesh

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// msgs is the member that no request can do without.
const msgs = `"messages":[{"role":"user","content":"hi"}]`

// upstreamBytes is the body that an upstream receives for body, when its name for the model is gpt-4o.
func upstreamBytes(t *testing.T, body string) string {
	t.Helper()
	req, refused := parseChat([]byte(body))
	if refused != nil {
		t.Fatalf("%s\nwas refused: %v %v", body, refused, refused.details)
	}
	parts, size := req.segments("gpt-4o")
	joined := bytes.Join(parts, nil)
	if int64(len(joined)) != size {
		t.Errorf("%s\nsize is said to be %d, is %d", body, size, len(joined))
	}
	return string(joined)
}

func TestUpstreamReceivesTheClientsOwnBytes(t *testing.T) {
	// what stands between model and messages here is not the gateway's
	for _, members := range []string{
		`"temperature":0.10`,
		`"temperature":1e-7`,
		`"temperature":-0`,
		`"top_p":1E+0`,
		`"seed":12345678901234567890`,
		`"seed":-98765432109876543210987654321098765432109876543210`,
		`"seed":1e2`,
		`"seed" : -5.0`,
		`"n":1.0,"logit_bias":{"50256":-100}`,
		`"max_completion_tokens":1E+2`,
		`"x":123456789012345678901234567890.10`,
		`"x":"\u00e9\/\ud83d\ude00\t"`,
		`"x":"\ud800"`,
		`"x":"é😀 <script>&"`,
		`"x\u0041":1,"xA":2,"xA":3`,
		`"":null`,
		`"z":1,"a":2,"m":3`,
		`"metadata":{"b":1,"a":[ ],"b":{ }}`,
		"\"x\"\n:\t[ 1 ,\r2 ]",
		`"response_format":{"type":"json_schema","json_schema":{"schema":{"model":"x","cache":true}}}`,
		`"stream":false`,
		`"stream":null`,
		`"stop":null,"temperature":null,"tools":null,"user":null`,
		`"Temperature":5`, // alone it is an unknown member
		`"CACHE":true`,
		`"tools":[{"type":"function","function":{"name":"f","strict":true,"parameters":{"type":"object"}}}]`,
	} {
		in := `{"model":"gpt-4o",` + members + `,` + msgs + `}`
		if out := upstreamBytes(t, in); out != in {
			t.Errorf("sent  %s\nbecame %s", in, out)
		}
	}
}

func TestUpstreamReceivesTheChangesTheGatewayMakesAndNoOthers(t *testing.T) {
	const m = msgs
	const asked = `"stream_options":{"include_usage":true}`
	cases := []struct{ name, in, out string }{
		// model
		{"model given", `{"model":"openai/gpt-4o",` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"model with escapes", `{"model":"openai\/gpt\u002d4o",` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"model's name escaped", `{"mod\u0065l":"x",` + m + `}`, `{"mod\u0065l":"gpt-4o",` + m + `}`},
		{"model last", `{` + m + `, "model" : "x" }`, `{` + m + `, "model" : "gpt-4o" }`},
		{"model absent", `{` + m + `}`, `{` + m + `,"model":"gpt-4o"}`},
		{"model absent, white space", " {\n\t" + m + "\n}\n", " {\n\t" + m + `,"model":"gpt-4o"` + "\n}\n"},
		{"model null", `{"model": null, ` + m + `}`, `{"model": "gpt-4o", ` + m + `}`},

		// what is the gateway's own
		{"first", `{"timeout":5,"model":"x",` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"first, white space", "{ \"timeout\" : 5 ,\n \"model\":\"x\" , " + m + " }", `{ "model":"gpt-4o" , ` + m + ` }`},
		{"in the middle", `{"model":"x","cache":true,` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"last", `{"model":"x",` + m + `,"session_id":"s"}`, `{"model":"gpt-4o",` + m + `}`},
		{"last, white space", "{\"model\":\"x\", " + m + " ,\n\"session_id\" :\"s\"\n}", `{"model":"gpt-4o", ` + m + "\n}"},
		{"several first", `{"timeout":5, "cache":true, "models":[], ` + m + `}`, `{` + m + `,"model":"gpt-4o"}`},
		{"several in the middle", `{"a":1, "timeout":5, "cache":true, ` + m + `}`, `{"a":1, ` + m + `,"model":"gpt-4o"}`},
		{"several last", `{"a":1,` + m + `,"timeout":5,"cache":true }`, `{"a":1,` + m + `,"model":"gpt-4o" }`},
		{"everywhere", `{"timeout":5,"a":1,"cache":true,` + m + `,"session_id":"s","image":null}`, `{"a":1,` + m + `,"model":"gpt-4o"}`},
		{"name escaped", `{"cach\u0065":true,` + m + `,"model":"x"}`, `{` + m + `,"model":"gpt-4o"}`},
		{"null", `{"template":null,"variables":null,"session_id":null,"transforms":null,"models":null,"modality":null,"image":null,` +
			`"async_mode":null,"timeout":null,"cache":null,"model":"x",` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"without effect", `{"variables":{},"models":[],"transforms":[],"modality":"text","async_mode":false,"cache":false,"image":{},` +
			`"model":"x",` + m + `}`, `{"model":"gpt-4o",` + m + `}`},
		{"inside others it is not the gateway's", `{"model":"x","metadata":{"cache":true,"model":"y"},` + m + `}`,
			`{"model":"gpt-4o","metadata":{"cache":true,"model":"y"},` + m + `}`},

		// usage of a stream
		{"options absent", `{"model":"x","stream":true,` + m + `}`, `{"model":"gpt-4o","stream":true,` + m + `,` + asked + `}`},
		{"options and model absent", `{"stream":true,` + m + `}`, `{"stream":true,` + m + `,"model":"gpt-4o",` + asked + `}`},
		{"all at once", `{"cache":true,"stream":true,` + m + ` , "timeout":1 }`, `{"stream":true,` + m + `,"model":"gpt-4o",` + asked + ` }`},
		{"options null", `{"model":"x","stream_options": null,"stream":true,` + m + `}`,
			`{"model":"gpt-4o","stream_options": {"include_usage":true},"stream":true,` + m + `}`},
		{"options empty", `{"model":"x","stream_options":{ },"stream":true,` + m + `}`,
			`{"model":"gpt-4o","stream_options":{"include_usage":true },"stream":true,` + m + `}`},
		{"usage false", `{"model":"x","stream":true,"stream_options":{"include_usage" : false },` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"include_usage" : true },` + m + `}`},
		{"usage null", `{"model":"x","stream":true,"stream_options":{"include_usage":null},` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"include_usage":true},` + m + `}`},
		{"usage true", `{"model":"x","stream":true,"stream_options":{"include_usage":true},` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"include_usage":true},` + m + `}`},
		{"other option", `{"model":"x","stream":true,"stream_options":{ "x":1.0},` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"include_usage":true, "x":1.0},` + m + `}`},
		{"other option and usage", `{"model":"x","stream":true,"stream_options":{"x":1,"include_usage":true,"y":2},` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"x":1,"include_usage":true,"y":2},` + m + `}`},
		{"other option and no usage", `{"model":"x","stream":true,"stream_options":{"x":1,"includ\u0065_usage":false,"y":2},` + m + `}`,
			`{"model":"gpt-4o","stream":true,"stream_options":{"x":1,"includ\u0065_usage":true,"y":2},` + m + `}`},
		{"options last, behind a removed one", `{"stream":true,` + m + `,"cache":true,"stream_options":{}}`,
			`{"stream":true,` + m + `,"stream_options":{"include_usage":true},"model":"gpt-4o"}`},
		{"options last, before a removed one", `{"stream":true,` + m + `,"stream_options":null,"cache":true}`,
			`{"stream":true,` + m + `,"stream_options":{"include_usage":true},"model":"gpt-4o"}`},
		{"no stream, options are left alone", `{"model":"x","stream":false,"stream_options":{"include_usage":false},` + m + `}`,
			`{"model":"gpt-4o","stream":false,"stream_options":{"include_usage":false},` + m + `}`},
		{"no stream, options null", `{"model":"x","stream_options":null,` + m + `}`, `{"model":"gpt-4o","stream_options":null,` + m + `}`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			out := upstreamBytes(t, c.in)
			if out != c.out {
				t.Errorf("sent   %s\nbecame %s\nwant   %s", c.in, out, c.out)
			}
			if !json.Valid([]byte(out)) {
				t.Errorf("not JSON: %s", out)
			}
		})
	}
}

func TestUpstreamsModelNameIsQuoted(t *testing.T) {
	req, _ := parseChat([]byte(`{` + msgs + `}`))
	parts, _ := req.segments("a\"b\\c<é>\n")
	if want := `{` + msgs + `,"model":"a\"b\\c<é>\n"}`; string(bytes.Join(parts, nil)) != want {
		t.Errorf("%s\nwant %s", bytes.Join(parts, nil), want)
	}
}

func TestRequestKnowsWhatTheGatewayNeeds(t *testing.T) {
	const all = `{"model":"openai\/gpt-4o","stream":true,"stream_options":{"include_usage":true},"session_id":"s\u00e9","timeout":1.5,` + msgs + `}`
	req, refused := parseChat([]byte(all))
	if refused != nil {
		t.Fatal(refused)
	}
	if req.model != "openai/gpt-4o" || !req.stream || !req.includeUsage || req.sessionID != "sé" || req.timeout != 1500*time.Millisecond {
		t.Errorf("%+v", req)
	}
	req, refused = parseChat([]byte(`{"model":null,"stream":null,"stream_options":null,"session_id":null,"timeout":null,` + msgs + `}`))
	if refused != nil {
		t.Fatal(refused)
	}
	if req.model != "" || req.stream || req.includeUsage || req.sessionID != "" || req.timeout != 0 {
		t.Errorf("%+v", req)
	}
}

func TestTimeoutIsPositiveAndAtMostADay(t *testing.T) {
	for written, want := range map[string]time.Duration{
		"0.25": 250 * time.Millisecond, "300": 300 * time.Second, "1e-300": 1, "86401": 24 * time.Hour, "1e300": 24 * time.Hour,
	} {
		req, refused := parseChat([]byte(`{"timeout":` + written + `,` + msgs + `}`))
		if refused != nil || req.timeout != want {
			t.Errorf("%s: %v, %v, want %v", written, req, refused, want)
		}
	}
}

func TestPromptIsMeasured(t *testing.T) {
	const body = `{"messages":[{"role":"system","content":"abc\n"},{"content":[{"text":"dé","type":"text"},` +
		`{"type":"image_url","image_url":{"url":"data:xxxxxxxxxxxx"}},{"type":"other","text":"not known","image_url":1}],"role":"user"},` +
		`{"role":"assistant","tool_calls":[{}]}]}`
	req, refused := parseChat([]byte(body))
	if refused != nil {
		t.Fatal(refused, refused.details)
	}
	if p := req.prompt; p.bytes != 8 || p.images != 1 || p.messages != 3 || string(p.text(req.body)) != `abc\ndé` {
		t.Errorf("%+v %q", p, p.text(req.body))
	}
	long := `{"messages":[{"role":"user","content":"` + strings.Repeat("a", 3*maxSample) + `"},{"role":"user","content":"b"}]}`
	req, _ = parseChat([]byte(long))
	if p := req.prompt; p.bytes != 3*maxSample+1 || len(p.text(req.body)) != maxSample {
		t.Errorf("%d bytes, %d in the sample", p.bytes, len(p.text(req.body)))
	}
	many := `{"messages":[` + strings.Repeat(`{"role":"user","content":"b"},`, 999) + `{"role":"user","content":"b"}]}`
	req, _ = parseChat([]byte(many))
	if p := req.prompt; p.messages != 1000 || p.bytes != 1000 || len(p.sample) > 64 {
		t.Errorf("%+v", p)
	}
}

func TestBodyThatIsNotAJSONObjectIsABadRequest(t *testing.T) {
	deep := func(n int) string { // the body's own object is one level
		return `{"x":` + strings.Repeat("[", n-1) + strings.Repeat("]", n-1) + `,` + msgs + `}`
	}
	if _, refused := parseChat([]byte(deep(200))); refused != nil {
		t.Errorf("200 levels: %v", refused)
	}
	inContent := func(n int) string { // body, messages, message, content, part are five levels
		return `{"messages":[{"role":"user","content":[{"type":"x","x":` + strings.Repeat("[", n-5) + strings.Repeat("]", n-5) + `}]}]}`
	}
	if _, refused := parseChat([]byte(inContent(200))); refused != nil {
		t.Errorf("200 levels inside a part: %v", refused)
	}
	bodies := map[string]string{ // and what the message says
		"":                                    "not valid JSON",
		"  ":                                  "not valid JSON",
		"null":                                "must be a JSON object",
		"true":                                "must be a JSON object",
		"5":                                   "must be a JSON object",
		`"{}"`:                                "must be a JSON object",
		`[{` + msgs + `}]`:                    "must be a JSON object",
		`[`:                                   "not valid JSON",
		`{` + msgs:                            "not valid JSON",
		`{` + msgs + `,}`:                     "not valid JSON",
		`{` + msgs + `}{}`:                    "not valid JSON",
		`{` + msgs + `} x`:                    "not valid JSON",
		"{" + msgs + "}\x00":                  "not valid JSON",
		"\ufeff{" + msgs + "}":                "not valid JSON",
		`{"temperature":NaN,` + msgs + `}`:    "not valid JSON",
		`{"temperature":-Infinity,` + msgs:    "not valid JSON",
		`{"temperature":01,` + msgs + `}`:     "not valid JSON",
		`{"stream":True,` + msgs + `}`:        "not valid JSON",
		`{"stream":nope,` + msgs + `}`:        "not valid JSON",
		`{'stream':true,` + msgs + `}`:        "not valid JSON",
		"{\"x\":\"\xff\"," + msgs + "}":       "not valid UTF-8",
		"{\"x\":\"\xed\xa0\x80\"," + msgs:     "not valid UTF-8", // a surrogate
		"{\"x\":\"\xc0\x80\"," + msgs + "}":   "not valid UTF-8", // overlong
		"{\"x\":\"\xf4\x90\x80\x80\"," + msgs: "not valid UTF-8", // beyond Unicode
		"\xff\xfe{\x00}\x00":                  "not valid UTF-8", // UTF-16
		deep(201):                             "nested more than 200 levels deep",
		inContent(201):                        "nested more than 200 levels deep",
		`{"temperature":` + strings.Repeat("[", 1<<20): "nested more than 200 levels deep",
		strings.Repeat("[", 1<<20):                     "nested more than 200 levels deep",
		// a fault of grammar behind faults of other kinds is all that is said
		`{"temperature":"hot","max_tokens":0,"messages":[{"role":5}]`: "not valid JSON",
	}
	for body, says := range bodies {
		req, refused := parseChat([]byte(body))
		if req != nil || refused == nil || refused.status != 400 || refused.code != "invalid_request" ||
			!strings.Contains(refused.message, says) || refused.details != nil {
			t.Errorf("%.60q: %v, want %s", body, refused, says)
		}
	}
}

func TestBodyCutAnywhereIsABadRequest(t *testing.T) {
	body := []byte(`{"model":"x","stream":true,"stream_options":{"include_usage":null},"stop":["a"],"temperature":1.5e0,` +
		`"messages":[{"role":"user","content":[{"image_url":{"url":"\u00e9"},"type":"image_url"}]}],"variables":{"a":"b"}}`)
	for n := range body {
		if _, refused := parseChat(body[:n]); refused == nil || refused.status != 400 {
			t.Errorf("%s: %v", body[:n], refused)
		}
	}
}

func TestSegmentsCanBeReadInAnyPiecesAndAgain(t *testing.T) {
	req, _ := parseChat([]byte(`{"cache":true,"stream":true,` + msgs + `,"timeout":5}`))
	parts, size := req.segments("m")
	want := bytes.Join(parts, nil)
	for _, wrap := range []func(io.Reader) io.Reader{
		func(r io.Reader) io.Reader { return r }, iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader,
	} {
		begun := &segmentReader{parts: parts}
		begun.Read(make([]byte, 5)) // an attempt that came to nothing
		got, err := io.ReadAll(wrap(&segmentReader{parts: parts}))
		if err != nil || !bytes.Equal(got, want) || int64(len(got)) != size {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
	if err := iotest.TestReader(&segmentReader{parts: parts}, want); err != nil {
		t.Error(err)
	}
	var empty segmentReader
	if n, err := empty.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
}
