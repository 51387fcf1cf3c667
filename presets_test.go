package mesh

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// startPreset runs a gateway whose upstream test is a preset at an address of the test's own.
func startPreset(t *testing.T, name string, h http.HandlerFunc) (*gateway, *upstream) {
	t.Helper()
	up := startUpstream(t, h)
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+"\n\tupstream test preset "+name+
		" http://$UPSTREAM/base {\n\t\tapi_key sk-upstream\n\t}\n\tmodel test/* test\n\tdefault_model test/plain\n}")
	return g, up
}

func TestPresetSendsTheKeyWhereItsProviderLooksForIt(t *testing.T) {
	for _, p := range presets {
		g, up := startPreset(t, p.name, answers(200, "application/json", completion))
		if r := g.post(chatBody); r.StatusCode != 200 {
			t.Fatalf("%s: %s %s", p.name, r.Status, r.body)
		}
		got := up.last(t)
		bearer, own := "Bearer sk-upstream", ""
		if p.name == "azure" {
			bearer, own = "", "sk-upstream"
		}
		if got.Header.Get("Authorization") != bearer || got.Header.Get("Api-Key") != own || got.URL.Path != "/base/chat/completions" {
			t.Errorf("%s: %s %q", p.name, got.URL, got.Header)
		}
	}
}

func TestPresetsAreSortedURLsWithoutASlashAtTheEnd(t *testing.T) {
	if !slices.IsSortedFunc(presets, func(a, b preset) int { return strings.Compare(a.name, b.name) }) {
		t.Error("they are not in order")
	}
	for _, p := range presets {
		u, err := url.Parse(p.address)
		if err != nil || p.address != "" && u.Host == "" || strings.HasSuffix(p.address, "/") {
			t.Errorf("%s: %q", p.name, p.address)
		}
	}
}

// mistral refuses stream_options as that provider does, and reports usage with the last choice.
func mistral(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if bytes.Contains(body, []byte("stream_options")) {
		answers(422, "application/json", `{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body","stream_options","include_usage"],`+
			`"msg":"Extra inputs are not permitted"}]},"type":"invalid_request_error","param":null,"code":null}`)(w, r)
		return
	}
	if !bytes.Contains(body, []byte(`"stream":true`)) {
		answers(200, "application/json", completion)(w, r)
		return
	}
	answers(200, "text/event-stream", `data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}]}`+"\n\n"+
		`data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6}}`+"\n\n"+
		"data: [DONE]\n\n")(w, r)
}

func TestUpstreamThatRefusesStreamOptionsGetsNone(t *testing.T) {
	g, up := startPreset(t, "mistral", mistral)
	const messages = `"messages":[{"role":"user","content":"Hi"}]`
	for sent, want := range map[string]string{
		streamBody: `{"model":"plain","stream":true,` + messages + `}`,
		chatBody:   `{"model":"plain",` + messages + `}`,
		`{"model":"test/x","stream":true,"stream_options":{"include_usage":true},` + messages + `}`:               `{"model":"x","stream":true,` + messages + `}`,
		`{"stream":true,` + messages + `,"cache":false,"stream_options":{"include_usage":false} , "timeout":60 }`: `{"stream":true,` + messages + `,"model":"plain" }`,
		`{"stream_options":null,"stream":true,` + messages + `}`:                                                  `{"stream":true,` + messages + `,"model":"plain"}`,
		`{"stream_options":{"include_usage":true},` + messages + `}`:                                              `{` + messages + `,"model":"plain"}`,
	} {
		r := g.post(sent)
		if r.StatusCode != 200 {
			t.Errorf("%s: %s %s", sent, r.Status, r.body)
		}
		if got := string(up.last(t).body); got != want {
			t.Errorf("sent  %s\nbecame %s\nwant   %s", sent, got, want)
		}
	}
	for _, e := range g.ledger(6) {
		if e.Estimated || e.PromptTokens == 0 {
			t.Errorf("its own usage was not taken: %+v", e)
		}
	}
}

func TestNextCandidateGetsStreamOptionsAgain(t *testing.T) {
	down := startUpstream(t, answers(500, "text/plain", "no"))
	up := startUpstream(t, answers(200, "text/event-stream", wordFrame+finishFrame+usageFrame+doneFrame))
	g := startGateway(t, up.address(), site("\tupstream down preset mistral http://"+down.address()+"\n\tmodel test/two down up"))
	if r := g.post(strings.Replace(streamBody, "plain", "two", 1)); r.StatusCode != 200 {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	if body := down.last(t).body; bytes.Contains(body, []byte("stream_options")) {
		t.Errorf("%s", body)
	}
	if body := up.last(t).body; !bytes.Contains(body, []byte(`"stream_options":{"include_usage":true}`)) {
		t.Errorf("%s", body)
	}
}
