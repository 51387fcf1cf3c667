package mesh

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const errorEvent = "data: {\"error\":{\"message\":\"overloaded\"}}\n\n"

// sends is a stream that is cut after what it sends, unless it has ended.
func sends(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, text)
		http.NewResponseController(w).Flush()
		if !strings.HasSuffix(text, doneFrame) {
			panic(http.ErrAbortHandler)
		}
	}
}

// hangs answers with text, if any, and then nothing.
func hangs(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if text != "" {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, text)
			http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
	}
}

func streamOf(model string) string { return ask(model, `,"stream":true`) }

func TestStreamThatFailsBeforeItSaysAnythingIsAnotherCandidatesTurn(t *testing.T) {
	whole := roleFrame + wordFrame + finishFrame + doneFrame
	up := startUpstream(t, sends(whole))
	for name, tc := range map[string]struct {
		first  http.HandlerFunc
		reason string
	}{
		"an error as the first frame":  {sends(errorEvent), "stream_error"},
		"an error as the second frame": {sends(roleFrame + errorEvent), "stream_error"},
		"nothing at all":               {sends(""), "cut"},
		"cut behind the first frame":   {sends(roleFrame), "cut"},
		"a JSON error":                 {answers(200, "application/json", bad), "error"},
		"a page":                       {answers(200, "text/html", "<html>"), "not_json"},
	} {
		t.Run(name, func(t *testing.T) {
			first := startUpstream(t, tc.first)
			g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second"))
			r := g.post(streamOf("test/first"))
			if r.StatusCode != 200 || string(r.body) != whole || r.Header.Get("X-Mesh-Routing-Model") != "test/second" {
				t.Errorf("%s %q\n%q", r.Status, r.Header, r.body)
			}
			if e := g.ledger(1)[0]; len(e.Tried) != 1 || e.Tried[0].Reason != tc.reason || e.Outcome != OutcomeCompleted {
				t.Errorf("ledger: %+v", e)
			}
		})
	}
}

// TestSilentBeginningOfAStreamIsNotHeldForLong has an upstream that sends nothing but a role until the client has it.
func TestSilentBeginningOfAStreamIsNotHeldForLong(t *testing.T) {
	seen := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, roleFrame)
		http.NewResponseController(w).Flush()
		select {
		case <-seen:
		case <-r.Context().Done():
		}
		io.WriteString(w, wordFrame+finishFrame+doneFrame)
	})
	up := startUpstream(t, sends(wordFrame+doneFrame))
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second"))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamOf("test/first"))
	defer resp.Body.Close()
	frame := make([]byte, len(roleFrame))
	if _, err := io.ReadFull(resp.Body, frame); err != nil || string(frame) != roleFrame {
		t.Fatalf("%v %q", err, frame)
	}
	close(seen)
	if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != wordFrame+finishFrame+doneFrame {
		t.Errorf("%v %q", err, rest)
	}
}

func TestCandidateThatDoesNotBeginInTimeIsGivenUp(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept"), "event-stream") {
			sends(roleFrame+wordFrame+finishFrame+doneFrame)(w, r)
			return
		}
		answers(200, "application/json", completion)(w, r)
	})
	for name, first := range map[string]http.HandlerFunc{"before the header": hangs(""), "before the first frame": hangs(": hello\n\n")} {
		t.Run(name, func(t *testing.T) {
			slow := startUpstream(t, first)
			g := startGateway(t, up.address(), twoSites(slow.address(), "\t\tfallback test/second\n\t\tfirst_byte_timeout 200ms"))
			r := g.post(streamOf("test/first"), "Accept", "text/event-stream")
			if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/second" {
				t.Errorf("%s %q %s", r.Status, r.Header, r.body)
			}
			if e := g.ledger(1)[0]; len(e.Tried) != 1 || e.Tried[0].Reason != "timeout" {
				t.Errorf("ledger: %+v", e)
			}
			g.load("http://$ADDRESS {\n" + twoSites(slow.address(), "\t\tfirst_byte_timeout 200ms") + "\n}\n")
			if r := g.post(streamOf("test/first")); r.StatusCode != 504 || r.errorCode(t) != "gateway_timeout" {
				t.Errorf("the only candidate: %s %s", r.Status, r.body)
			}
		})
	}
}

// pingEvery has streams ping that often for the rest of the test.
func pingEvery(t *testing.T, d time.Duration) {
	before := pingInterval
	pingInterval = d
	t.Cleanup(func() { pingInterval = before })
}

func TestSilentStreamPingsAndCanStillFallBack(t *testing.T) {
	pingEvery(t, 50*time.Millisecond)
	whole := roleFrame + wordFrame + finishFrame + doneFrame
	release := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		<-release
		answers(503, "application/json", bad)(w, r)
	})
	up := startUpstream(t, sends(whole))
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second"))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamOf("test/first"))
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	for range 3 {
		line, err := lines.ReadString('\n')
		empty, _ := lines.ReadString('\n')
		if err != nil || line+empty != string(pingFrame) {
			t.Fatalf("%v %q", err, line+empty)
		}
	}
	close(release)
	rest, err := io.ReadAll(lines)
	if got := strings.ReplaceAll(string(rest), string(pingFrame), ""); err != nil || got != whole {
		t.Errorf("%v %q", err, rest)
	}
	if resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("X-Accel-Buffering") != "no" {
		t.Errorf("%q", resp.Header)
	}
	e := g.ledger(1)[0]
	if e.Model != "test/second" || e.Outcome != OutcomeCompleted || e.TTFT < 100*time.Millisecond {
		t.Errorf("ledger: %+v", e)
	}
}

func TestFailureAfterPingsIsAFrame(t *testing.T) {
	pingEvery(t, 50*time.Millisecond)
	up := startUpstream(t, hangs(""))
	g := startGateway(t, up.address(), site("\ttimeout 400ms"))
	r := g.post(streamBody)
	got := strings.ReplaceAll(string(r.body), string(pingFrame), "")
	if want := errorFrame("gateway_timeout", errTimeout.message, r.Header.Get("X-Request-Id")); r.StatusCode != 200 || got != want {
		t.Errorf("%s %q", r.Status, r.body)
	}
	if e := g.ledger(1)[0]; e.Outcome != OutcomeTimeout || e.Error != "gateway_timeout" || e.Cost != 0 {
		t.Errorf("ledger: %+v", e)
	}
}

func TestPolicyDecidesWhoIsAskedFirst(t *testing.T) {
	slow := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(100 * time.Millisecond)
		answers(200, "application/json", completion)(w, r)
	})
	up := startUpstream(t, answers(200, "application/json", completion))
	for _, tc := range []struct{ policy, slow, up string }{
		{"least_latency", "", ""}, {"cheapest", " price 3 3", " price 1 1"}, {"weighted", " weight 1", " weight 1000000"},
	} {
		g := startGateway(t, up.address(), site(fmt.Sprintf("\texpose_upstream\n\tupstream slow http://%s/v1\n\tmodel test/two {\n\t\tprice 9 9\n\t\tpolicy %s\n\t\tupstream slow%s\n\t\tupstream up%s\n\t}",
			slow.address(), tc.policy, tc.slow, tc.up)))
		served := make(map[string]int)
		for range 12 {
			served[g.post(ask("test/two", "")).Header.Get("X-Mesh-Upstream")]++
		}
		if served["up"] < 9 {
			t.Errorf("%s: %v", tc.policy, served)
		}
		if e := g.ledger(12)[11]; tc.policy == "cheapest" && e.Cost != 1_200_000 {
			t.Errorf("not at the price of the upstream: %+v", e)
		}
	}
}

func TestWeightsAreKeptByChance(t *testing.T) {
	first := make(map[string]int)
	at := int64(0)
	for range 600 {
		list := []candidate{{as: "a", weight: 1}, {as: "b", weight: 2}, {as: "c", weight: 3}}
		drawByWeight(list, func(n int64) int64 { at++; return (at / 2) % n })
		first[list[0].as]++
		if list[0].as == list[1].as || list[1].as == list[2].as || list[0].as == list[2].as {
			t.Fatalf("not each once: %v", list)
		}
	}
	if first["a"] != 100 || first["b"] != 200 || first["c"] != 300 {
		t.Errorf("first: %v", first)
	}
}
