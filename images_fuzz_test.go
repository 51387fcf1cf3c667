package mesh

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func FuzzRequestForImagesIsJSONAndNothingElseGetsThrough(f *testing.F) {
	for _, body := range []string{
		`{` + msgs + `}`,
		`{"modality":"image","image":{"n":2,"siz\u0065":"1x1"},"us\u0065r":"\ud800",` + msgs + `}`,
		`{"stream":true,"messages":[{"role":"user","content":[{"text":"\"\\","type":"text"},{"type":"text","text":"b"}]}],"image":{ }}`,
		`{"messages":[{"role":"user","content":"x"},{"role":"tool","tool_call_id":"1","content":[{"type":"text","text":"y"}]}],"n":1,"modalities":null}`,
		`{"tools":[],` + msgs + `}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		req, refused := parseChat(body)
		if refused != nil || req.template != "" {
			return
		}
		if refused := req.asImages(kindImage); refused != nil {
			if refused.status != 422 || len(refused.details) == 0 {
				t.Fatalf("%v", refused)
			}
			return
		}
		if req.images == nil {
			return
		}
		parts, size := req.segmentsFor(&candidate{as: "m", upstream: new(Upstream)})
		out := bytes.Join(parts, nil)
		if !json.Valid(out) || int64(len(out)) != size {
			t.Fatalf("%s\nbecame %s", body, out)
		}
		for _, m := range members(t, out) {
			if !slices.Contains([]string{"model", "prompt", "n", "size", "quality", "response_format", "user"}, m.name) || m.value == "null" || m.value == `""` && m.name == "prompt" {
				t.Fatalf("%s\nbecame %s", body, out)
			}
		}
	})
}

func FuzzImagesBecomeJSON(f *testing.F) {
	for _, answer := range []string{
		`{"created":1,"data":[{"url":"u","revised_prompt":"\ud800"}]}`,
		`{"data":[{"b64_json":"A\/="},{"b64_json":null,"url":""}],"output_format":"we\u0062p","usage":{"input_tokens":9223372036854775807,"output_tokens":1}}`,
		`{"data":[{"url":"a","url":"b"}],"data":[{"url":"c"}],"usage":null}`,
	} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		made, ok := readImages(answer)
		if !ok {
			return
		}
		if !json.Valid(answer) {
			t.Fatalf("taken for an answer: %s", answer)
		}
		body := made.completion("i", "m", 0)
		if said := readAnswer(body, nil); !json.Valid(body) || !said.readable || !said.finished || !said.hasUsage || said.choices != 1 {
			t.Fatalf("%s\nbecame %s", answer, body)
		}
		events := strings.Split(strings.TrimSuffix(string(made.chunks("i", "m", 0)), "\n\n"), "\n\n")
		if len(events) != 4 || events[3] != "data: [DONE]" {
			t.Fatalf("%s\nbecame %q", answer, events)
		}
		for _, event := range events[:3] {
			if data := strings.TrimPrefix(event, "data: "); !json.Valid([]byte(data)) || strings.Contains(data, "\n") {
				t.Fatalf("%s\nbecame %s", answer, data)
			}
		}
	})
}
