package mesh

import (
	"bytes"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// rawMember is a member of an object in its own bytes.
type rawMember struct{ name, value string }

// members splits an object by means of encoding/json.
func members(t *testing.T, object []byte) (list []rawMember) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(object))
	dec.UseNumber()
	if _, err := dec.Token(); err != nil {
		t.Fatalf("%v: %s", err, object)
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			t.Fatalf("%v: %s", err, object)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			t.Fatalf("%v: %s", err, object)
		}
		list = append(list, rawMember{name.(string), string(value)})
	}
	return list
}

// expected is what the upstream should receive, made the slow way: member by member, as encoding/json reads them.
// Where it is a stream, stream_options is as spell writes its members.
func expected(t *testing.T, body []byte, stream bool) (list []rawMember) {
	t.Helper()
	hasModel, hasOptions := false, false
	for _, m := range members(t, body) {
		switch m.name {
		case "session_id", "timeout", "cache", "template", "variables", "models", "transforms", "modality", "image", "async_mode", "async_callback_url":
			continue
		case "model":
			hasModel = true
			m.value = `"upstream's"`
		case "stream_options":
			hasOptions = true
			if stream {
				m.value = withUsage(t, m.value)
			}
		}
		list = append(list, m)
	}
	if !hasModel {
		list = append(list, rawMember{"model", `"upstream's"`})
	}
	if stream && !hasOptions {
		list = append(list, rawMember{"stream_options", `[{include_usage true}]`})
	}
	return list
}

// withUsage is how the members of stream_options should look: as spell writes them.
func withUsage(t *testing.T, options string) string {
	var list []rawMember
	if options != "null" {
		list = members(t, []byte(options))
	}
	asked := false
	for i := range list {
		if list[i].name == "include_usage" {
			list[i].value = "true"
			asked = true
		}
	}
	if !asked {
		list = append([]rawMember{{"include_usage", "true"}}, list...)
	}
	return spell(list)
}

func spell(list []rawMember) string {
	var b strings.Builder
	for _, m := range list {
		b.WriteString("{" + m.name + " " + m.value + "}")
	}
	return "[" + b.String() + "]"
}

func FuzzChatRequestKeepsEverythingElse(f *testing.F) {
	for _, text := range jsonTexts {
		f.Add([]byte(text))
		f.Add([]byte(`{"x":` + text + `,` + msgs + `}`))
	}
	for _, body := range []string{
		`{` + msgs + `}`,
		`{"cache":true,"model":"x","stream":true,` + msgs + `,"timeout":1}`,
		`{"stream":true,"stream_options":{"x":1,"include_usage":null},"model":null,` + msgs + `,"variables":{},"models":[]}`,
		`{"stream":true,"stream_options":null,"modality":"text",` + msgs + `,"z":1e-7,"image":{}}`,
		`{"Temperature":3,"mod\u0065l":"\ud800","messages":[{"role":"user","content":[{"text":"x","type":"text"}]}],"tools":[]}`,
		`{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]},{"role":"tool","tool_call_id":"1","content":""}],"stream_options":{}}`,
		`{"messages":[{"role":"user","content":[{"type":"input_audio","input_audio":{"format":"wav","data":"AA"}}]}],"seed":1e2,"stop":["a"],"user":"u"}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(keepsEverythingElse)
}

// keepsEverythingElse checks that a request which is accepted reaches the upstream whole, but for what is the gateway's.
func keepsEverythingElse(t *testing.T, body []byte) {
	before := bytes.Clone(body)
	req, refused := parseChat(body)
	if (req == nil) == (refused == nil) {
		t.Fatalf("request %v, refusal %v", req, refused)
	}
	if refused != nil {
		if (refused.status != 400 || refused.details != nil) && (refused.status != 422 || len(refused.details) == 0) {
			t.Fatalf("%v with details %v", refused, refused.details)
		}
		return
	}
	parts, size := req.segments("upstream's")
	out := bytes.Join(parts, nil)
	if int64(len(out)) != size || !json.Valid(out) {
		t.Fatalf("%s\nbecame (%d bytes said) %s", body, size, out)
	}
	if !bytes.Equal(body, before) {
		t.Fatal("the client's bytes were changed")
	}
	got := members(t, out)
	for i := range got {
		if got[i].name == "stream_options" && req.stream {
			got[i].value = spell(members(t, []byte(got[i].value)))
		}
	}
	if want := expected(t, body, req.stream); !slices.Equal(got, want) {
		t.Fatalf("%s\nbecame %s\nmembers %v\nwant    %v", body, out, got, want)
	}
}

func TestRandomRequestsKeepEverythingElse(t *testing.T) {
	choices := map[string][]string{
		`model`:          {`null`, `"a"`, `"a\/b\ud800"`},
		`mod\u0065l`:     {`"x"`},
		`stream`:         {`true`, `true`, `true`, `false`, `null`},
		`stream_options`: {`null`, `{}`, `{ }`, `{"include_usage":false}`, `{"a":1 , "include_usage" : null}`, `{"include_usage":true,"b":[]}`, `{"a":1}`},
		`session_id`:     {`null`, `"s"`},
		`timeout`:        {`null`, `1e-7`},
		`\u0063ache`:     {`true`, `null`},
		`models`:         {`[]`, `null`},
		`image`:          {`{}`},
		`modality`:       {`"text"`},
		`temperature`:    {`0.10`, `1E+0`, `-0`, `null`},
		`seed`:           {`12345678901234567890`},
		`messages`:       {`[{"role":"user","content":"é\ud83d\ude00\n"}]`, `[ {"content":[{"text":"","type":"text"}],"role":"user"} ]`},
		`x`:              {`1e999`, `{"model":null,"cache":[1.0,{"a":{}}]}`, `"\\\""`},
		`y`:              {`-0.0`, `[ ]`},
		`Cache`:          {`true`},
	}
	names := slices.Sorted(maps.Keys(choices))
	random := rand.New(rand.NewPCG(3, 4))
	space := func() string { return []string{"", "", "", " ", "\n\t", "\r\n  "}[random.IntN(6)] }
	accepted := 0
	for range 20_000 {
		var object []string
		for _, i := range random.Perm(len(names))[:1+random.IntN(len(names))] {
			values := choices[names[i]]
			object = append(object, space()+`"`+names[i]+`"`+space()+":"+space()+values[random.IntN(len(values))]+space())
		}
		body := space() + "{" + strings.Join(object, ",") + "}" + space()
		keepsEverythingElse(t, []byte(body))
		if _, refused := parseChat([]byte(body)); refused == nil {
			accepted++
		}
	}
	if accepted < 2_000 {
		t.Errorf("only %d were accepted", accepted)
	}
}
