package mesh

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func TestCircuitOpensByARowAndByARateAndClosesByOneProbe(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	rules := (&Circuit{Rest: caddy.Duration(10 * time.Second)}).withDefaults()
	note := func(c *circuit, signs string) (opened bool) {
		for _, s := range signs {
			changed := c.note(now, rules, map[rune]sign{'+': signAlive, '-': signFailed, ' ': signNone}[s], false)
			opened = opened || changed
		}
		return opened
	}
	for signs, opens := range map[string]bool{
		"----": false, "-----": true, "----+----": false, "-- -- -": true,
		strings.Repeat("-+", 9) + "-": false, strings.Repeat("-+", 9) + "-+-": true, strings.Repeat("-++", 20): false,
	} {
		if note(&circuit{upstream: "t"}, signs) != opens {
			t.Errorf("%q: opened: %v", signs, !opens)
		}
	}

	c := &circuit{upstream: "t"}
	note(c, strings.Repeat("-+", 9)+"-")
	now = now.Add(31 * time.Second)
	if note(c, "-") {
		t.Error("what was before the window counts")
	}

	c = &circuit{upstream: "t"}
	note(c, "-----")
	f := c.mayAsk(now, rules)
	if f == nil || f.tell.code != "provider_not_available" || f.tell.retryAfter != 10*time.Second {
		t.Fatalf("open: %+v", f)
	}
	for _, rest := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		now = now.Add(rest*time.Second - 1)
		if c.mayAsk(now, rules) == nil {
			t.Errorf("asked before %d s", rest)
		}
		now = now.Add(1)
		if probe, f := c.take(now, rules); !probe || f != nil {
			t.Fatalf("after %d s: %v %+v", rest, probe, f)
		}
		if probe, f := c.take(now, rules); probe || f == nil {
			t.Fatal("two probes at a time")
		}
		c.note(now, rules, signFailed, true)
	}
	now = now.Add(maxCircuitRest)
	c.take(now, rules)
	c.note(now, rules, signNone, true) // the client has left
	if probe, _ := c.take(now, rules); !probe {
		t.Error("a probe that said nothing keeps others from probing")
	}
	if !c.note(now, rules, signAlive, true) || c.mayAsk(now, rules) != nil || note(c, "----") {
		t.Error("a probe that was answered does not begin anew")
	}
}

// TestOpenCircuitIsNotAsked has an upstream fail five times: then the next one is asked first, after a reload too, until
// a probe finds it back.
func TestOpenCircuitIsNotAsked(t *testing.T) {
	var status atomic.Int32
	status.Store(500)
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(int(status.Load()), "application/json", completion)(w, r)
	})
	up := startUpstream(t, answers(200, "application/json", completion))
	text := strings.Replace(twoSites(first.address(), "\t\tfallback test/second"), "/v1\n\tmodel test/first",
		"/v1 {\n\t\tcircuit {\n\t\t\trest 2s\n\t\t}\n\t}\n\tmodel test/first", 1)
	g := startGateway(t, up.address(), text)
	for range 5 {
		g.post(ask("test/first", ""))
	}
	g.load("http://$ADDRESS {\nheader X-Generation 2\n" + text + "\n}\n")
	r := g.post(ask("test/first", ""))
	if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Attempts") != "1" || r.Header.Get("X-Mesh-Routing-Fallback") != "true" || len(first.received()) != 5 {
		t.Errorf("%s %q, first was asked %d times", r.Status, r.Header, len(first.received()))
	}
	if e := g.ledger(6)[5]; len(e.Tried) != 1 || e.Tried[0].Reason != "circuit_open" {
		t.Errorf("ledger: %+v", e)
	}
	status.Store(200)
	eventually(t, "the first upstream serves again", func() bool {
		return g.post(ask("test/first", "")).Header.Get("X-Mesh-Routing-Model") == "test/first"
	})
	for said, want := range map[string]map[string]any{
		"upstream is left alone for a while: it has failed too often": {"level": "warn", "upstream": "bad", "model_there": "first", "rest": 2.0},
		"upstream answers again": {"level": "info", "upstream": "bad", "model_there": "first"},
	} {
		wantFields(t, g.logged(said), want)
	}
}

func TestEveryCircuitOpenIs503AndSaysWhen(t *testing.T) {
	up := startUpstream(t, answers(500, "application/json", `{}`))
	g := startGateway(t, up.address(), site(""))
	for range 5 {
		g.post(chatBody)
	}
	r := g.post(chatBody)
	if r.StatusCode != 503 || r.errorCode(t) != "provider_not_available" || r.Header.Get("Retry-After") == "" || r.Header.Get("X-Mesh-Routing-Attempts") != "0" {
		t.Errorf("%s %q %s", r.Status, r.Header, r.body)
	}
	if r := g.post(ask("test/other", "")); r.StatusCode != 502 {
		t.Errorf("another model of the upstream: %s", r.Status)
	}
}

func TestBusyUpstreamIsNotAskedUntilItsTimeHasCome(t *testing.T) {
	busyFor := func(wait string) *upstream {
		return startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", wait)
			answers(429, "application/json", `{}`)(w, r)
		})
	}
	first, up := busyFor("3000"), busyFor("40")
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second"))
	for i := range 3 {
		r := g.post(ask("test/first", ""))
		var wait int
		fmt.Sscan(r.Header.Get("Retry-After"), &wait)
		if r.StatusCode != 429 || r.errorCode(t) != "upstream_rate_limit_error" || wait < 1 || wait > 40 {
			t.Errorf("request %d: %s, Retry-After %d", i, r.Status, wait)
		}
	}
	if len(first.received()) != 1 || len(up.received()) != 1 {
		t.Errorf("asked %d and %d times", len(first.received()), len(up.received()))
	}
}

func TestClientsTakeNoCircuitDown(t *testing.T) {
	up := startUpstream(t, answers(400, "application/json", `{"error":{"message":"no"}}`))
	g := startGateway(t, up.address(), site(""))
	for range 30 {
		if r := g.post(chatBody); r.StatusCode != 400 {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
}

func BenchmarkCircuit(b *testing.B) {
	u := &Upstream{Name: "up", health: new(upstreamHealth), rules: new(Circuit).withDefaults()}
	b.ReportAllocs()
	for b.Loop() {
		now := time.Now()
		if _, f := u.circuit("gpt-4o").take(now, u.rules); f != nil {
			b.Fatal(f)
		}
		u.circuit("gpt-4o").note(now, u.rules, signAlive, false)
	}
}

// TestStreamThatBeginsClosesTheCircuit has the probe be a stream that goes on: who comes after it need not wait.
func TestStreamThatBeginsClosesTheCircuit(t *testing.T) {
	var well atomic.Bool
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if !well.Load() {
			answers(500, "application/json", `{}`)(w, r)
			return
		}
		hangs(roleFrame+wordFrame)(w, r)
	})
	g := startGateway(t, up.address(), strings.Replace(site(""), "api_key sk-upstream", "circuit {\n\t\t\tfailures 1\n\t\t\trest 1s\n\t\t}", 1))
	g.post(streamBody)
	if r := g.post(streamBody); r.StatusCode != 503 {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	well.Store(true)
	eventually(t, "a probe begins a stream", func() bool {
		resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
		t.Cleanup(func() { resp.Body.Close() })
		return resp.StatusCode == 200
	})
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("beside the probe: %s", resp.Status)
	}
}
