package mesh

import (
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestHedgeLetsTheFasterOfTwoServeAndChargesItAlone(t *testing.T) {
	whole := roleFrame + wordFrame + finishFrame + usageFrame + doneFrame
	for _, body := range []string{ask("test/first", ""), streamOf("test/first")} {
		gone := make(chan struct{}, 1)
		first := startUpstream(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done(); gone <- struct{}{} })
		up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(body, "stream") {
				sends(whole)(w, r)
				return
			}
			answers(200, "application/json", completion)(w, r)
		})
		g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 50ms"))
		r := g.post(body)
		if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/second" || r.Header.Get("X-Mesh-Routing-Attempts") != "2" ||
			r.Header.Get("X-Mesh-Routing-Fallback") != "true" {
			t.Errorf("%s %q %s", r.Status, r.Header, r.body)
		}
		select {
		case <-gone:
		case <-time.After(10 * time.Second):
			t.Error("the slower one was not stopped")
		}
		e := g.ledger(1)[0]
		if e.Cost != 4_500_000 || e.Model != "test/second" || len(e.Tried) != 1 || e.Tried[0] != (Tried{"test/first", "bad", "hedge_lost"}) {
			t.Errorf("ledger: %+v", e)
		}
	}
}

func TestHedgeIsNotStartedWhereTheFirstHasBegun(t *testing.T) {
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		http.NewResponseController(w).Flush()
		time.Sleep(600 * time.Millisecond)
		answers(200, "application/json", completion)(w, r)
	})
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 400ms"))
	if r := g.post(ask("test/first", "")); r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Fallback") != "false" || len(up.received()) != 0 {
		t.Errorf("%s %q; the second was asked %d times", r.Status, r.Header, len(up.received()))
	}
}

func TestHedgeWhoseFirstFailsWaitsForTheSecond(t *testing.T) {
	second := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		<-second
		answers(500, "application/json", bad)(w, r)
	})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		close(second)
		time.Sleep(50 * time.Millisecond)
		answers(200, "application/json", completion)(w, r)
	})
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 20ms"))
	if r := g.post(ask("test/first", "")); r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/second" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if e := g.ledger(1)[0]; len(e.Tried) != 1 || e.Tried[0].Reason != "500" {
		t.Errorf("ledger: %+v", e)
	}
}

func TestHedgesUnderLoadLeaveNothingRunning(t *testing.T) {
	var n atomic.Int64
	sometimes := func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%3 == 0 {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(30 * time.Millisecond):
			}
		}
		if r.Header.Get("Accept") == "text/event-stream" {
			sends(roleFrame+wordFrame+finishFrame+usageFrame+doneFrame)(w, r)
			return
		}
		answers(200, "application/json", completion)(w, r)
	}
	first, up := startUpstream(t, sometimes), startUpstream(t, sometimes)
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 5ms"))
	g.post(ask("test/first", ""))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				if r := g.post(ask("test/first", "")); r.StatusCode != 200 {
					t.Errorf("%s %s", r.Status, r.body)
				}
				if r := g.post(streamOf("test/first"), "Accept", "text/event-stream"); r.StatusCode != 200 || !strings.HasSuffix(string(r.body), doneFrame) {
					t.Errorf("%s %s", r.Status, r.body)
				}
			}
		})
	}
	wg.Wait()
	for _, e := range g.ledger(321) {
		if e.Outcome != OutcomeCompleted || e.Cost == 0 {
			t.Errorf("ledger: %+v", e)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	eventually(t, "no goroutine is left of the requests", func() bool { return countOf("mesh.(*exchange)") == 0 })
}

// countOf counts the goroutines with a text in their stacks.
func countOf(text string) int {
	buf := make([]byte, 8<<20)
	n := 0
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, text) {
			n++
		}
	}
	return n
}

func TestSecondThatIsRefusedDoesNotStopTheFirst(t *testing.T) {
	refused := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		<-refused
		answers(200, "application/json", completion)(w, r)
	})
	second := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(400, "application/json", `{"error":{"message":"too long","code":"context_length_exceeded"}}`)(w, r)
		time.AfterFunc(200*time.Millisecond, func() { close(refused) })
	})
	g := startGateway(t, second.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 20ms"))
	r := g.post(strings.Replace(chatBody, "test/plain", "test/first", 1))
	if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/first" || r.Header.Get("X-Mesh-Routing-Attempts") != "2" {
		t.Errorf("%s %v %s", r.Status, r.Header, r.body)
	}
}

// TestCloseLoserIsNoFailure releases both at the same moment.
func TestCloseLoserIsNoFailure(t *testing.T) {
	big := strings.Replace(completion, `"choices"`, `"pad":"`+strings.Repeat("x", 1<<20)+`","choices"`, 1)
	ready := make(chan chan struct{}, 1)
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		release := make(chan struct{})
		ready <- release
		<-release
		answers(200, "application/json", big)(w, r)
	})
	second := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		close(<-ready)
		answers(200, "application/json", big)(w, r)
	})
	g := startGateway(t, second.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 10ms"))
	const n = 20
	for range n {
		if r := g.post(strings.Replace(chatBody, "test/plain", "test/first", 1)); r.StatusCode != 200 {
			t.Fatalf("%s %.200s", r.Status, r.body)
		}
	}
	for _, e := range g.ledger(n) {
		for _, other := range e.Tried {
			if other.Reason != "hedge_lost" {
				t.Errorf("%+v", e.Tried)
			}
		}
	}
}
