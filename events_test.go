package mesh

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	_ "github.com/caddyserver/caddy/v2/modules/caddyevents/eventsconfig"
)

func init() { caddy.RegisterModule(eventRecorder{}) }

// eventRecorder is an event handler that keeps what it is given, for the test at hand.
type eventRecorder struct{}

var emitted struct {
	mu     sync.Mutex
	events []caddy.Event
	said   []string      // what a command would be given
	hang   chan struct{} // where it is not nil, handlers hang until it is closed
}

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.recorder", New: func() caddy.Module { return new(eventRecorder) }}
}

func (*eventRecorder) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	return nil
}

func (*eventRecorder) Handle(ctx context.Context, e caddy.Event) error {
	repl := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	emitted.mu.Lock()
	emitted.said = append(emitted.said, repl.ReplaceAll("{event.name} {event.data.key_name} {event.data.spend_usd}", ""))
	emitted.events = append(emitted.events, e)
	hang := emitted.hang
	emitted.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return nil
}

var _ caddyevents.Handler = (*eventRecorder)(nil)

// recordEvents are the global options of a gateway whose events are recorded, from now on.
func recordEvents(t *testing.T) string {
	t.Helper()
	emitted.mu.Lock()
	emitted.events, emitted.said, emitted.hang = nil, nil, nil
	emitted.mu.Unlock()
	var options strings.Builder
	options.WriteString("events {\n")
	for _, name := range []string{eventSpendCapReached, eventUpstreamDown, eventUpstreamUp, eventStoreDegraded, eventStoreRecovered} {
		fmt.Fprintf(&options, "on %s recorder\n", name)
	}
	return options.String() + "}\n"
}

// eventsNamed returns the data of the events of a name.
func eventsNamed(name string) (data []map[string]any) {
	emitted.mu.Lock()
	defer emitted.mu.Unlock()
	for _, e := range emitted.events {
		if e.Name() == name {
			data = append(data, maps.Clone(e.Data))
		}
	}
	return data
}

// flushEvents waits until what was emitted before has been handled.
func flushEvents(t *testing.T) {
	t.Helper()
	const last = eventStoreRecovered // any of those that are recorded
	before := len(eventsNamed(last))
	notices.emit(last, nil)
	eventually(t, "the last event is handled", func() bool { return len(eventsNamed(last)) > before })
}

// capped is a site with a key of a small cap.
func capped(limit string) string {
	return strings.Replace(site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"),
		"name tester", "name tester\n\t\towner acme\n\t\tspend_cap_usd "+limit, 1)
}

func TestSpendCapIsAnEventOnceForEachKeyAndPeriod(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGatewayWith(t, recordEvents(t), up.address(), capped("0.004 month"))
	priced := chatFor("test/priced")
	if r := g.post(priced); r.StatusCode != http.StatusOK {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	refused := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if r := g.post(priced); r.StatusCode != http.StatusPaymentRequired {
					t.Errorf("%s %s", r.Status, r.body)
				}
			})
		}
		wg.Wait()
		flushEvents(t)
	}
	refused()
	got := eventsNamed(eventSpendCapReached)
	if len(got) != 1 {
		t.Fatalf("%d events", len(got))
	}
	want := map[string]any{
		"key_id": got[0]["key_id"], "key_name": "tester", "owner": "acme",
		"spend_cap_usd": "0.004", "spend_usd": "0.0045", "spend_period": "month",
	}
	if id, _ := got[0]["key_id"].(string); id == "" || !maps.Equal(got[0], want) {
		t.Errorf("got %v", got[0])
	}
	emitted.mu.Lock()
	if emitted.said[0] != "mesh.spend_cap_reached tester 0.0045" {
		t.Errorf("placeholders: %q", emitted.said)
	}
	emitted.mu.Unlock()

	g.load("http://$ADDRESS {\n" + capped("0.004 month") + "\n}\n# the same once more\n")
	refused()
	if n := len(eventsNamed(eventSpendCapReached)); n != 1 {
		t.Errorf("%d events after a reload", n)
	}
	g.load("http://$ADDRESS {\n" + capped("0.0044 month") + "\n}\n")
	refused()
	if n := len(eventsNamed(eventSpendCapReached)); n != 2 {
		t.Errorf("%d events after the cap was raised and reached again", n)
	}
}

func TestUpstreamThatFailsFiveTimesIsDownUntilItAnswers(t *testing.T) {
	var status atomic.Int32
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(int(status.Load()), "application/json", completion)(w, r)
	})
	options := recordEvents(t)
	always := strings.Replace(site(""), "api_key sk-upstream", "api_key sk-upstream\n\t\tcircuit off", 1)
	g := startGatewayWith(t, options, up.address(), always)
	send := func(code, n int) {
		status.Store(int32(code))
		for range n {
			g.post(chatBody)
		}
		flushEvents(t)
	}
	expect := func(what string, down, up int) {
		t.Helper()
		if d, u := len(eventsNamed(eventUpstreamDown)), len(eventsNamed(eventUpstreamUp)); d != down || u != up {
			t.Errorf("%s: down %d times, up %d times", what, d, u)
		}
	}
	send(500, 4)
	send(200, 1)
	send(500, 4)
	expect("four failures, twice", 0, 0)
	send(429, 1)
	send(400, 10)
	send(500, 4)
	expect("an upstream that is busy or refuses is not down", 0, 0)
	send(500, 1)
	expect("five failures", 1, 0)
	send(500, 20)
	expect("more failures", 1, 0)
	g.load("http://$ADDRESS {\nheader X-Generation 2\n" + always + "\n}\n")
	send(500, 6)
	expect("still down after a reload", 1, 0)
	send(200, 3)
	expect("it answers", 1, 1)
	if got := eventsNamed(eventUpstreamDown)[0]; got["upstream"] != "up" || got["result"] != "failed" || got["failures"] != maxUpstreamFailures {
		t.Errorf("down: %v", got)
	}
	if got := eventsNamed(eventUpstreamUp)[0]; got["upstream"] != "up" {
		t.Errorf("up: %v", got)
	}
}

// TestImpatientClientsTakeNoUpstreamDown has clients whose own time limit is too short for any upstream.
func TestImpatientClientsTakeNoUpstreamDown(t *testing.T) {
	up := startUpstream(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	g := startGatewayWith(t, recordEvents(t), up.address(), site(""))
	for range 2 * maxUpstreamFailures {
		if r := g.post(chatFor("test/plain", `"timeout":0.01`)); r.StatusCode != http.StatusGatewayTimeout {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
	flushEvents(t)
	if got := eventsNamed(eventUpstreamDown); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}

// TestRequestThatIsTooLargeForAHardCapIsNoEvent keeps the event for when the cap is reached.
func TestRequestThatIsTooLargeForAHardCapIsNoEvent(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGatewayWith(t, recordEvents(t), up.address(), capped("0.1 month hard"))
	if r := g.post(chatFor("test/priced", `"max_tokens":1000000`)); r.StatusCode != http.StatusPaymentRequired {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	flushEvents(t)
	if got := eventsNamed(eventSpendCapReached); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}

// TestUpstreamThatAnsweredBetweenTwoFailuresComesUp: these are counted without a lock, so that an answer may come between the
// last failure's count and its event.
func TestUpstreamThatAnsweredBetweenTwoFailuresComesUp(t *testing.T) {
	h := &upstreamHealth{name: "up"}
	h.down.Store(true)
	h.note(resultAnswered)
	if h.down.Load() {
		t.Error("it stays down")
	}
}

func TestStoreThatIsLostAndFoundIsTwoEvents(t *testing.T) {
	server := startRedis(t)
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGatewayWith(t, recordEvents(t), up.address(), strings.Replace(site(""), "store local $DIR/mesh.db",
		"store redis "+server.address+" {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}", 1))
	if r := g.post(chatBody); r.StatusCode != http.StatusOK {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	server.kill()
	eventually(t, "the event of an outage", func() bool {
		g.post(chatBody)
		return len(eventsNamed(eventStoreDegraded)) > 0
	})
	server.start()
	eventually(t, "the event of its end", func() bool { return len(eventsNamed(eventStoreRecovered)) > 0 })
	for _, name := range []string{eventStoreDegraded, eventStoreRecovered} {
		got := eventsNamed(name)
		if len(got) != 1 || got[0]["store"] != "redis, one server" || got[0]["on_failure"] != "degrade" {
			t.Errorf("%s: %v", name, got)
		}
	}
	wantFields(t, g.logged("shared store"), map[string]any{"address": server.address, "mode": "one server", "reached": true})
	wantFields(t, g.logged("recovered"), map[string]any{"level": "info"})
	if after, ok := g.logged("recovered")["after"].(float64); !ok || after <= 0 {
		t.Errorf("recovered after %v", after)
	}
}

// TestStoreThatIsLostAtStartIsAnEvent has the event before there is anyone to take it.
func TestStoreThatIsLostAtStartIsAnEvent(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	startGatewayWith(t, recordEvents(t), up.address(), strings.Replace(site(""), "store local $DIR/mesh.db",
		"store redis 127.0.0.1:1 {\n\t\tjournal $DIR/journal.db\n\t\ton_failure refuse\n\t}", 1))
	eventually(t, "the event", func() bool {
		got := eventsNamed(eventStoreDegraded)
		return len(got) == 1 && got[0]["on_failure"] == "refuse"
	})
}

func TestHandlersThatHangHoldUpNoRequest(t *testing.T) {
	var status atomic.Int32
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(int(status.Load()), "application/json", completion)(w, r)
	})
	g := startGatewayWith(t, recordEvents(t), up.address(), strings.Replace(site(""), "api_key sk-upstream", "circuit off", 1))
	hang := make(chan struct{})
	emitted.mu.Lock()
	emitted.hang = hang
	emitted.mu.Unlock()
	for range maxNotices + 10 { // each is one event down and one up
		status.Store(500)
		for range maxUpstreamFailures {
			g.post(chatBody)
		}
		status.Store(200)
		if r := g.post(chatBody); r.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
	emitted.mu.Lock()
	emitted.hang = nil
	emitted.mu.Unlock()
	close(hang)
	eventually(t, "what waited is handled", func() bool {
		return len(eventsNamed(eventUpstreamDown))+len(eventsNamed(eventUpstreamUp)) >= maxNotices
	})
	flushEvents(t)
	log, err := os.ReadFile(g.dir + "/caddy.log")
	if err != nil || !strings.Contains(string(log), "events dropped") {
		t.Errorf("nothing in the log of events that were dropped, %v", err)
	}
}

func TestCapsThatWereReachedAreForgottenBeyondABound(t *testing.T) {
	var caps capSet
	for i := range 3 * maxCaps {
		if !caps.first(capKey{"store", fmt.Sprint(i)}, capPeriod{limit: 1}) {
			t.Fatalf("key %d has had its event", i)
		}
		if len(caps.last) > maxCaps {
			t.Fatalf("%d caps", len(caps.last))
		}
	}
}
