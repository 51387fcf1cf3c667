package mesh

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const paintStream = `{"model":"test/painter","stream":true,"messages":[{"role":"user","content":"Two dots"}],"image":{"n":2}}`

// keepAliveEvery has clients that wait for images hear something that often for the rest of the test.
func keepAliveEvery(t *testing.T, d time.Duration) {
	before := keepAliveInterval
	keepAliveInterval = d
	t.Cleanup(func() { keepAliveInterval = before })
}

// dotFrames are the frames of images.json, with usage or without.
func dotFrames(id string, usage bool) string {
	head := `data: {"id":"` + id + `","object":"chat.completion.chunk","created":1713833628,"model":"test/painter","choices":`
	frames := head + `[{"index":0,"delta":` + dots + `,"finish_reason":null}]}` + "\n\n" +
		head + `[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n"
	if usage {
		frames += head + `[],"usage":{"prompt_tokens":50,"completion_tokens":544,"total_tokens":594},"cost":"0.04201"}` + "\n\n"
	}
	return frames + doneFrame
}

func TestImagesStreamAsChunks(t *testing.T) {
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site(painter))
	withUsage := strings.Replace(paintStream, "{", `{"stream_options":{"include_usage":true},`, 1)
	for _, tc := range []struct {
		name, body string
		header     []string
		usage      bool
	}{
		{"plain", paintStream, nil, false},
		{"usage asked for", withUsage, nil, true},
		{"a Mesh client", paintStream, []string{"X-MeshAPI-SDK", "go"}, true},
	} {
		r := g.post(tc.body, tc.header...)
		if want := dotFrames(completionID(r), tc.usage); string(r.body) != want {
			t.Errorf("%s: got  %s\nwant %s", tc.name, r.body, want)
		}
		if r.Header.Get("Content-Type") != "text/event-stream" || r.Header.Get("X-Accel-Buffering") != "no" || r.Header.Get("X-Mesh-Routing-Model") != "test/painter" ||
			r.Header.Get("Content-Length") != "" {
			t.Errorf("%q", r.Header)
		}
		if body := string(up.last(t).body); body != `{"model":"painter","prompt":"Two dots","n":2}` {
			t.Errorf("the upstream received %s", body)
		}
	}
	for _, e := range g.ledger(3) {
		if e.Outcome != OutcomeCompleted || !e.Stream || e.Images != 2 || e.Cost != paintCost || e.CompletionTokens != 544 || e.Estimated || e.TTFT == 0 {
			t.Errorf("%+v", e)
		}
	}
}

func TestWhoWaitsForImagesIsKeptAliveAndCanStillFallBack(t *testing.T) {
	keepAliveEvery(t, 50*time.Millisecond)
	release := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		<-release
		answers(503, "application/json", bad)(w, r)
	})
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site("\tupstream bad http://"+first.address()+"/v1\n"+painter+"\n\tmodel test/first bad {\n\t\ttype image\n\t\tfallback test/painter\n\t}"))
	resp := g.send(http.MethodPost, "/v1/chat/completions", strings.Replace(paintStream, "painter", "first", 1))
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	for range 3 {
		line, err := lines.ReadString('\n')
		empty, _ := lines.ReadString('\n')
		if err != nil || line+empty != ": keep-alive\n\n" {
			t.Fatalf("%v %q", err, line+empty)
		}
	}
	close(release)
	rest, err := io.ReadAll(lines)
	got := strings.ReplaceAll(string(rest), ": keep-alive\n\n", "")
	if want := dotFrames(completionID(&reply{Response: resp}), false); err != nil || got != want {
		t.Errorf("%v\ngot  %s\nwant %s", err, got, want)
	}
	if e := g.ledger(1)[0]; e.Model != "test/painter" || e.Outcome != OutcomeCompleted || len(e.Tried) != 1 || e.Cost != paintCost {
		t.Errorf("%+v", e)
	}
}

func TestImagesThatFailAfterKeepAlivesAreAFrame(t *testing.T) {
	keepAliveEvery(t, 50*time.Millisecond)
	up := startUpstream(t, hangs(""))
	g := startGateway(t, up.address(), site(painter+"\n\ttimeout 400ms"))
	r := g.post(paintStream)
	got := strings.ReplaceAll(string(r.body), ": keep-alive\n\n", "")
	if want := errorFrame("gateway_timeout", errTimeout.message, r.Header.Get("X-Request-Id")); r.StatusCode != 200 || got != want || got == string(r.body) {
		t.Errorf("%s %q", r.Status, r.body)
	}
	if e := g.ledger(1)[0]; e.Outcome != OutcomeTimeout || e.Cost != 0 {
		t.Errorf("%+v", e)
	}
}

// TestImageLargerThanAnyEventPasses has one that makes its event longer than those that are read.
func TestImageLargerThanAnyEventPasses(t *testing.T) {
	large := strings.Repeat("QUJD", (maxEvent+1<<20)/4)
	up := startUpstream(t, answers(200, "application/json", `{"created":5,"data":[{"b64_json":"`+large+`"}]}`))
	g := startGateway(t, up.address(), site(painter))
	r := g.post(strings.Replace(paintStream, "{", `{"stream_options":{"include_usage":true},`, 1))
	if !strings.Contains(string(r.body), large) || !strings.HasSuffix(string(r.body), doneFrame) || !strings.Contains(string(r.body), `,"cost":"0.01"}`) {
		t.Errorf("%d bytes, ending in %q", len(r.body), r.body[max(0, len(r.body)-200):])
	}
	if e := g.ledger(1)[0]; e.Outcome != OutcomeCompleted || e.Images != 1 || e.Cost != 10_000_000 {
		t.Errorf("%+v", e)
	}
}
