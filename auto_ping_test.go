package mesh

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestClientIsPingedWhileItsModelIsChosen(t *testing.T) {
	pingEvery(t, 50*time.Millisecond)
	keepAliveEvery(t, 50*time.Millisecond)
	for model, c := range map[string]struct{ want, frame string }{
		"paid/small":   {roleFrame + wordFrame + finishFrame + doneFrame, string(pingFrame)},
		"test/painter": {"", string(keepAliveFrame)},
	} {
		t.Run(model, func(t *testing.T) {
			release := make(chan struct{})
			t.Cleanup(func() { close(release) })
			wait := func() { // is held up twice: while the model is chosen, and before it answers
				select {
				case <-release:
				case <-time.After(time.Minute):
				}
			}
			speaks, paints := routes(func(*http.Request) string { wait(); return model }), plays(t, "images_url.json")
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				if strings.HasSuffix(r.URL.Path, imagesPath) {
					wait()
					paints(w, r)
					return
				}
				speaks(w, r)
			})
			g := startGateway(t, up.address(), site(autoPaints))
			resp := g.send(http.MethodPost, chatPath, `{"model":"auto","stream":true,"messages":[{"role":"user","content":"An otter"}]}`)
			defer resp.Body.Close()
			lines := bufio.NewReader(resp.Body)
			frame := func() string {
				line, err := lines.ReadString('\n')
				empty, _ := lines.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				return line + empty
			}
			for range 3 {
				if got := frame(); got != string(pingFrame) {
					t.Fatalf("%q", got)
				}
			}
			release <- struct{}{}
			if model == "test/painter" {
				for frame() != c.frame { // the ping at hand may be the last of its kind
				}
				release <- struct{}{}
			}
			rest, err := io.ReadAll(lines)
			got := strings.NewReplacer(string(pingFrame), "", string(keepAliveFrame), "").Replace(string(rest))
			if err != nil || c.want != "" && got != c.want || !strings.HasSuffix(got, doneFrame) {
				t.Errorf("%v %q", err, got)
			}
			for _, e := range g.ledger(2) {
				if e.Outcome != OutcomeCompleted || e.ParentID == "" && e.Model != model {
					t.Errorf("%+v", e)
				}
			}
		})
	}
}

func TestTimeThatRunsOutDuringTheChoiceIsAFrameAfterPings(t *testing.T) {
	pingEvery(t, 50*time.Millisecond)
	up := routed(t, func(r *http.Request) string { <-r.Context().Done(); return "" })
	g := startGateway(t, up.address(), site(autoBlock))
	r := g.post(autoBody(`,"stream":true,"timeout":0.4`))
	got := strings.ReplaceAll(string(r.body), string(pingFrame), "")
	if want := errorFrame("gateway_timeout", errTimeout.message, r.Header.Get("X-Request-Id")); r.StatusCode != 200 || got != want || got == string(r.body) {
		t.Errorf("%s %q", r.Status, r.body)
	}
}
