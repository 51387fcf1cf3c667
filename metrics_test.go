package mesh

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics returns the gateway's metrics as the admin endpoint shows them, by name and labels.
func (p *process) metrics() map[string]float64 {
	p.t.Helper()
	return readMetrics(p.t, p.adminGet("/metrics"))
}

func readMetrics(t testing.TB, text string) map[string]float64 {
	t.Helper()
	values := make(map[string]float64)
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		if !strings.HasPrefix(line, "caddy_mesh_") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		values[line[:at]] = value
	}
	return values
}

// byModel is a provider whose answers depend on what it is asked for.
func byModel(t testing.TB, answer map[string]http.HandlerFunc) *upstream {
	t.Helper()
	return startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		var req struct{ Model string }
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil || answer[req.Model] == nil {
			t.Errorf("the upstream was asked for %q: %v", req.Model, err)
			return
		}
		answer[req.Model](w, r)
	})
}

// streams answers with frames and breaks off if cut.
func streams(cut bool, frames ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, f := range frames {
			io.WriteString(w, f)
			http.NewResponseController(w).Flush()
		}
		if cut {
			panic(http.ErrAbortHandler)
		}
	}
}

func chatFor(model string, more ...string) string {
	return `{"model":"` + model + `",` + strings.Join(append(more, ""), ",") + `"messages":[{"role":"user","content":"Hi"}]}`
}

const observedModels = `
	upstream spare http://$UPSTREAM/v1
	upstream silent http://127.0.0.1:1
	model test/priced up {
		price 2.50 10.00
		price_cached 1.25
	}
	model test/two up {
		upstream spare as second
	}
	model test/gone silent
	metrics {
		per_key
	}`

func observedUpstream(t testing.TB) *upstream {
	return byModel(t, map[string]http.HandlerFunc{
		"priced":    answers(200, "application/json", completion),
		"two":       answers(500, "application/json", "{}"),
		"second":    answers(200, "application/json", completion),
		"streaming": streams(false, roleFrame, wordFrame, wordFrame, finishFrame, usageFrame, doneFrame),
		"cut":       streams(true, roleFrame, wordFrame),
		"busy":      answers(429, "application/json", `{"error":{"message":"slow down"}}`),
		"refusing":  answers(400, "application/json", `{"error":{"message":"no","code":"context_length_exceeded"}}`),
		"secret":    answers(200, "application/json", completion),
	})
}

// observed sends one request of each kind.
func observed(g *gateway) {
	for _, body := range []string{
		chatFor("test/priced"), chatFor("test/priced"), chatFor("test/two"), chatFor("test/streaming", `"stream":true`),
		chatFor("test/cut", `"stream":true`), chatFor("test/busy"), chatFor("test/refusing"), chatFor("test/gone"),
		chatFor("test/secret"), chatFor("test/priced", `"temperature":9`), chatFor("nobody/has-this"),
	} {
		g.post(body)
	}
	g.post(chatFor("test/priced"), "Authorization", "Bearer "+otherKey)
	g.do(http.MethodGet, "/v1/chat/completions", "")
	g.do(http.MethodGet, "/v1/models", "")
}

func TestRequestsAreCountedByModelUpstreamAndOutcome(t *testing.T) {
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site(observedModels)))
	observed(p.gateway())
	got := p.metrics()
	for series, want := range map[string]float64{
		`requests_total{model="test/priced",outcome="completed",upstream="up"}`:      2,
		`requests_total{model="test/priced",outcome="error",upstream="up"}`:          0,
		`requests_total{model="test/two",outcome="completed",upstream="spare"}`:      1,
		`requests_total{model="test/*",outcome="completed",upstream="up"}`:           2, // streaming, secret
		`requests_total{model="test/*",outcome="cut",upstream="up"}`:                 1,
		`requests_total{model="test/*",outcome="error",upstream="up"}`:               2, // busy, refusing
		`requests_total{model="test/gone",outcome="error",upstream="silent"}`:        1,
		`rejections_total{reason="unauthorized"}`:                                    1,
		`rejections_total{reason="model_not_found"}`:                                 1,
		`rejections_total{reason="validation_error"}`:                                1,
		`rejections_total{reason="method_not_allowed"}`:                              1,
		`upstream_attempts_total{result="answered",upstream="up"}`:                   4,
		`upstream_attempts_total{result="answered",upstream="spare"}`:                1,
		`upstream_attempts_total{result="failed",upstream="up"}`:                     1,
		`upstream_attempts_total{result="failed",upstream="silent"}`:                 1,
		`upstream_attempts_total{result="busy",upstream="up"}`:                       1,
		`upstream_attempts_total{result="refused",upstream="up"}`:                    1,
		`upstream_attempts_total{result="cut",upstream="up"}`:                        1,
		`fallbacks_total{model="test/two"}`:                                          1,
		`fallbacks_total{model="test/priced"}`:                                       0,
		`tokens_total{kind="prompt",model="test/priced"}`:                            2000,
		`tokens_total{kind="cached",model="test/priced"}`:                            800,
		`tokens_total{kind="completion",model="test/priced"}`:                        400,
		`cost_usd_total{model="test/priced"}`:                                        0.008,
		`time_to_first_token_seconds_count{model="test/*",upstream="up"}`:            2,
		`time_per_output_token_seconds_count{model="test/*",upstream="up"}`:          1,
		`time_to_first_token_seconds_count{model="test/priced",upstream="up"}`:       0,
		`request_duration_seconds_count{model="test/priced",upstream="up"}`:          2,
		`request_duration_seconds_count{model="test/gone",upstream="silent"}`:        1,
		`open_streams{model="test/*",upstream="up"}`:                                 0,
		`store_admit_duration_seconds_count{store="local"}`:                          9,
		`store_errors_total{operation="admit",store="local"}`:                        0,
		`store_degraded{store="local"}`:                                              0,
		`store_journal_entries{store="local"}`:                                       0,
		`key_requests_total{key="tester",outcome="completed"}`:                       5,
		`key_requests_total{key="tester",outcome="error"}`:                           3,
		`key_requests_total{key="tester",outcome="cut"}`:                             1,
		`key_rejections_total{key="tester",reason="model_not_found"}`:                1,
		`key_tokens_total{key="tester",kind="cached"}`:                               1600,
		`key_cost_usd_total{key="tester"}`:                                           0.008,
		`time_to_first_token_seconds_bucket{model="test/*",upstream="up",le="+Inf"}`: 2,
	} {
		if got, ok := got["caddy_mesh_"+series]; !ok || got != want {
			t.Errorf("%s is %v (there: %v), want %v", series, got, ok, want)
		}
	}
	for series := range got {
		for _, word := range []string{"secret", "nobody", "rsk_", "sk-upstream", "busy\",", "streaming"} {
			if strings.Contains(series, word) && !strings.Contains(series, `result="busy"`) {
				t.Errorf("%q is in a label: %s", word, series)
			}
		}
	}
}

func TestKeysAreNoLabelsUnlessAskedFor(t *testing.T) {
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site(strings.Replace(observedModels, "per_key", "", 1))))
	observed(p.gateway())
	for series := range p.metrics() {
		if strings.Contains(series, "tester") || strings.Contains(series, "key=") {
			t.Errorf("%s", series)
		}
	}
}

func TestKeyLabelsAreBounded(t *testing.T) {
	var keys keySet
	for i := range maxKeySeries + 500 {
		label := keys.series(fmt.Sprint("bounded-", i)).label
		if want := i >= maxKeySeries; (label == otherKeys) != want {
			t.Fatalf("key %d is %q", i, label)
		}
	}
	if s := keys.series("bounded-0"); s.label != "bounded-0" {
		t.Errorf("the first key is now %q", s.label)
	}
}

func TestOpenStreamsAreCountedWhileTheyLast(t *testing.T) {
	release := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		streams(false, roleFrame, wordFrame)(w, r)
		<-release
		streams(false, finishFrame, doneFrame)(w, r)
	})
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site("")))
	g := p.gateway()
	const series = `caddy_mesh_open_streams{model="test/*",upstream="up"}`
	var bodies []io.ReadCloser
	for range 3 {
		bodies = append(bodies, g.send(http.MethodPost, "/v1/chat/completions", streamBody).Body)
	}
	eventually(t, "three streams are open", func() bool { return p.metrics()[series] == 3 })
	bodies[0].Close() // its client leaves
	eventually(t, "two streams are open", func() bool { return p.metrics()[series] == 2 })
	close(release)
	for _, body := range bodies[1:] {
		if _, err := io.ReadAll(body); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "no stream is open", func() bool { return p.metrics()[series] == 0 })
}

// TestMetricsRegisterWithEveryConfiguration is what a reload does, and a second handler in one configuration.
func TestMetricsRegisterWithEveryConfiguration(t *testing.T) {
	families := func(r *prometheus.Registry) int {
		t.Helper()
		found, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	collectors.rejections.WithLabelValues("test").Inc()
	first, second := prometheus.NewPedanticRegistry(), prometheus.NewPedanticRegistry()
	for _, r := range []*prometheus.Registry{first, first, second} {
		if err := collectors.register(r); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := families(first), families(second); a == 0 || a != b {
		t.Errorf("%d families, then %d", a, b)
	}
	taken := prometheus.NewRegistry()
	taken.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "caddy_mesh_requests_total", Help: "Another's."}))
	if err := collectors.register(taken); err == nil {
		t.Error("a name that is taken by something else is no error")
	}
}

func TestRedisOutageShowsInMetrics(t *testing.T) {
	server := startRedis(t)
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, strings.Replace(site(""), "store local $DIR/mesh.db",
		"store redis "+server.address+" {\n\t\ttimeout 2s\n\t\tjournal $DIR/journal.db\n\t}", 1)))
	g := p.gateway()
	is := func(series string, ok func(float64) bool) func() bool {
		return func() bool {
			value, there := p.metrics()["caddy_mesh_"+series]
			return there && ok(value)
		}
	}
	zero := func(v float64) bool { return v == 0 }
	some := func(v float64) bool { return v > 0 }
	g.post(chatBody)
	eventually(t, "Redis is reached", is(`store_degraded{store="redis"}`, zero))
	if !is(`store_admit_duration_seconds_count{store="redis"}`, some)() {
		t.Error("letting a request through took no time")
	}
	server.kill()
	eventually(t, "Redis is missed", func() bool {
		g.post(chatBody)
		return is(`store_degraded{store="redis"}`, func(v float64) bool { return v == 1 })()
	})
	g.post(chatBody)
	eventually(t, "a settlement waits", is(`store_journal_entries{store="redis"}`, some))
	if !is(`store_errors_total{operation="command",store="redis"}`, some)() {
		t.Error("nothing has failed")
	}
	server.start()
	eventually(t, "Redis is back", is(`store_degraded{store="redis"}`, zero))
	eventually(t, "nothing waits", is(`store_journal_entries{store="redis"}`, zero))
}

func BenchmarkCount(b *testing.B) {
	x := &exchange{h: &Handler{Metrics: &Metrics{PerKey: os.Getenv("PER_KEY") != ""}}}
	x.series = &targetSeries{model: "bench", upstream: "bench"}
	x.series.resolve()
	x.event = Event{
		KeyID: "bench", Outcome: OutcomeCompleted, Stream: true, Attempts: 1,
		TTFT: 1e8, Duration: 1e9, PromptTokens: 1000, CompletionTokens: 200, Cost: 4_500_000,
	}
	b.ReportAllocs()
	for b.Loop() {
		x.count()
	}
}

func TestOpenCircuitsAreCountedWhileTheyAreOpen(t *testing.T) {
	var well atomic.Bool
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if well.Load() {
			answers(200, "application/json", completion)(w, r)
			return
		}
		answers(500, "application/json", bad)(w, r)
	})
	text := strings.Replace(site(""), "api_key sk-upstream", "circuit {\n\t\t\tfailures 1\n\t\t\trest 1s\n\t\t}", 1)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, text))
	g := p.gateway()
	const series = `caddy_mesh_open_circuits{upstream="up"}`
	for i, model := range []string{"test/a", "test/b", "test/c"} {
		g.post(chatFor(model))
		eventually(t, "the model's circuit is counted", func() bool { return p.metrics()[series] == float64(i+1) })
	}
	p.reload(fmt.Sprintf(inSite, "header X-Generation 2\n"+text))
	if n := p.metrics()[series]; n != 3 {
		t.Errorf("after a reload %v are open", n)
	}
	well.Store(true)
	eventually(t, "the first model is back", func() bool { return g.post(chatFor("test/a")).StatusCode == 200 })
	eventually(t, "two are open", func() bool { return p.metrics()[series] == 2 })
	p.reload(fmt.Sprintf(inSite, strings.NewReplacer("upstream up ", "upstream other ", "test/* up", "test/* other").Replace(text)))
	eventually(t, "none is open of an upstream that is no longer configured", func() bool { return p.metrics()[series] == 0 })
}
