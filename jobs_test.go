package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// asyncBody is a plain request for a job.
const asyncBody = `{"async_mode":true,"model":"test/plain","messages":[{"role":"user","content":"Hi"}]}`

// seenJob is a job as a client sees it.
type seenJob struct {
	ID, Object, Model string
	Status            JobStatus
	Created           int64
	RequestID         string `json:"request_id"`
	Response, Error   json.RawMessage
}

func (r *reply) job(t testing.TB, status int) (j seenJob) {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("%s %s, want %d", r.Status, r.body, status)
	}
	if err := json.Unmarshal(r.body, &j); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
	return j
}

// submit submits a job and returns where it is.
func (g *gateway) submit(body string, headers ...string) (path string) {
	g.t.Helper()
	r := g.post(body, headers...)
	r.job(g.t, http.StatusAccepted)
	return r.Header.Get("Location")
}

func (g *gateway) job(path string) seenJob {
	g.t.Helper()
	return g.do(http.MethodGet, path, "").job(g.t, http.StatusOK)
}

// becomes waits until a job has a status.
func (g *gateway) becomes(path string, status JobStatus) (j seenJob) {
	g.t.Helper()
	eventuallyIn(g.t, time.Minute, fmt.Sprintf("%s is %s", path, status), func() bool {
		j = g.job(path)
		return j.Status == status
	})
	return j
}

// jobStores are the stores that jobs are tested with, as options of a site.
func jobStores(t *testing.T, test func(t *testing.T, store string)) {
	t.Run("local", func(t *testing.T) { test(t, "store local $DIR/mesh.db") })
	t.Run("redis", func(t *testing.T) {
		test(t, "store redis "+startRedis(t).address+" {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}")
	})
}

// jobSite is a site with a store, options of its key, and what else it is given.
func jobSite(store, key, more string) string {
	return strings.NewReplacer(
		"store local $DIR/mesh.db", store,
		"name tester", "name tester\n\t\towner acme\n\t\t"+key,
		"model test/* up", "model test/* up {\n\t\tprice 2.50 10.00\n\t\tcontext_length 1000\n\t}",
	).Replace(site("\tkey " + otherKey + " {\n\t\tname other\n\t}\n" + more))
}

// upstreamGate is a provider that answers when it is let.
type upstreamGate struct {
	open    chan struct{}
	once    sync.Once
	entered atomic.Int64
	left    atomic.Int64 // requests whose client went away
}

// startGate runs such a provider. It lets everything go when the test ends, so that nothing waits for a test that failed.
func startGate(t *testing.T) (*upstreamGate, *upstream) {
	g := &upstreamGate{open: make(chan struct{})}
	up := startUpstream(t, g.ServeHTTP)
	t.Cleanup(g.let)
	return g, up
}

// let has all requests be answered, now and from now on.
func (g *upstreamGate) let() { g.once.Do(func() { close(g.open) }) }

func (g *upstreamGate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.entered.Add(1)
	select {
	case <-g.open:
		answers(200, "application/json", completion)(w, r)
	case <-r.Context().Done():
		g.left.Add(1)
	}
}

func (g *gateway) ledgerOf(requestID string) (events []Event) {
	g.t.Helper()
	var page struct {
		Events []struct {
			RequestID string `json:"request_id"`
		}
	}
	r := g.do(http.MethodPost, eventsPath, `{"limit":200}`)
	if err := json.Unmarshal(r.body, &page); err != nil {
		g.t.Fatalf("%v in %s", err, r.body)
	}
	for _, e := range page.Events {
		if e.RequestID == requestID {
			events = append(events, Event{RequestID: requestID})
		}
	}
	return events
}

func TestJobAnswersWhatASynchronousClientWouldHaveGot(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		up := startUpstream(t, answers(200, "application/json", completion))
		g := startGateway(t, up.address(), jobSite(store, "rpd 10", ""))
		want := g.post(chatBody)

		r := g.post(asyncBody)
		j := r.job(t, http.StatusAccepted)
		path := r.Header.Get("Location")
		if path != jobsPath+"/"+j.ID || j.Object != "chat.completion.job" || j.Status != JobQueued || j.Model != "test/plain" ||
			time.Since(time.Unix(j.Created, 0)) > time.Minute || j.RequestID != r.Header.Get("X-Request-Id") {
			t.Errorf("%s %s", path, r.body)
		}
		if limits := r.Header.Get("Ratelimit"); !strings.HasPrefix(limits, `"rpd";r=8;`) {
			t.Errorf("RateLimit: %s", limits)
		}
		done := g.becomes(path, JobCompleted)
		if string(done.Response) != string(want.body) || done.Error != nil {
			t.Errorf("the job's response is\n%s, want\n%s", done.Response, want.body)
		}
		if body := string(up.last(t).body); strings.Contains(body, "async") {
			t.Errorf("the upstream received %s", body)
		}
		eventually(t, "the ledger has one entry", func() bool { return len(g.ledgerOf(j.RequestID)) == 1 })

		for name, path := range map[string]string{"another": jobsPath + "/job_01ARZ3NDEKTSV4RRFFQ69G5FAV", "malformed": jobsPath + "/x", "short": jobsPath + "/job_01ARZ3NDEKTSV4RRFFQ69G5FA", "none": jobsPath} {
			if r := g.do(http.MethodGet, path, ""); r.StatusCode != http.StatusNotFound || r.errorCode(t) != "not_found" {
				t.Errorf("%s: %s %s", name, r.Status, r.body)
			}
		}
		for _, method := range []string{http.MethodGet, http.MethodDelete} {
			if r := g.do(method, path, "", "Authorization", "Bearer "+otherKey); r.StatusCode != http.StatusNotFound || r.errorCode(t) != "not_found" {
				t.Errorf("%s by another: %s %s", method, r.Status, r.body)
			}
		}
		for _, path := range []string{path, jobsPath} {
			if r := g.do(http.MethodPost, path, "{}"); r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") != "GET, DELETE" {
				t.Errorf("%s, Allow: %s", r.Status, r.Header.Get("Allow"))
			}
		}
		if after := g.do(http.MethodDelete, path, "").job(t, 200); after.Status != JobCompleted || string(after.Response) != string(want.body) {
			t.Errorf("cancelled after its end: %+v", after)
		}
	})
}

func TestCancelledJobStopsItsUpstream(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		gate, up := startGate(t)
		g := startGateway(t, up.address(), jobSite(store, "max_concurrency 2", "\tasync {\n\t\tworkers 1\n\t\tmax_pending 2\n\t}"))
		running, waiting := g.submit(asyncBody), g.submit(asyncBody)
		eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
		if j := g.job(running); j.Status != JobInProgress {
			t.Errorf("it is %s", j.Status)
		}
		for range 2 { // which takes no place in the queue
			if r := g.post(asyncBody); r.StatusCode != http.StatusTooManyRequests || !strings.Contains(string(r.body), "at the same time") {
				t.Errorf("a third: %s %s", r.Status, r.body)
			}
		}
		for _, path := range []string{waiting, running} {
			if j := g.do(http.MethodDelete, path, "").job(t, 200); j.Status != JobCancelled || j.Response != nil || j.Error != nil {
				t.Errorf("%+v", j)
			}
		}
		eventually(t, "the upstream is left", func() bool { return gate.left.Load() == 1 })
		for _, path := range []string{waiting, running} {
			j := g.becomes(path, JobCancelled)
			eventually(t, "the ledger has one entry", func() bool { return len(g.ledgerOf(j.RequestID)) == 1 })
		}
		gate.let()
		for range 2 { // there is room again
			g.becomes(g.submit(asyncBody), JobCompleted)
		}
		if n := gate.entered.Load(); n != 3 {
			t.Errorf("the upstream was asked %d times", n)
		}
	})
}

func TestJobThatFailsHasTheErrorOfItsAnswer(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		up := startUpstream(t, answers(400, "application/json", `{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded"}}`))
		g := startGateway(t, up.address(), jobSite(store, "", ""))
		var want struct{ Error json.RawMessage }
		if err := json.Unmarshal(g.post(chatBody).body, &want); err != nil {
			t.Fatal(err)
		}
		j := g.becomes(g.submit(asyncBody), JobFailed)
		if string(j.Error) != string(want.Error) || j.Response != nil || len(want.Error) == 0 {
			t.Errorf("%s, want %s", j.Error, want.Error)
		}
	})
}

func TestJobIsRefusedAsAnyRequestIs(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), jobSite("store local $DIR/mesh.db", "rpd 1", ""))
	for body, want := range map[string]string{
		`{"async_mode":true,"stream":true,"model":"test/plain","messages":[{"role":"user","content":"Hi"}]}`:  "async_mode",
		`{"async_callback_url":"http://x/","model":"test/plain","messages":[{"role":"user","content":"Hi"}]}`: "async_callback_url",
		`{"async_mode":true,"model":"nobody/has","messages":[{"role":"user","content":"Hi"}]}`:                "model",
		`{"async_mode":true,"model":"test/plain","messages":[]}`:                                              "messages",
	} {
		r := g.post(body)
		e, _ := r.decode(t)["error"].(map[string]any)
		if r.StatusCode != 422 && r.StatusCode != 404 || e["param"] != want || r.Header.Get("Location") != "" {
			t.Errorf("%s: %s %s", body, r.Status, r.body)
		}
	}
	g.becomes(g.submit(asyncBody), JobCompleted)
	if r := g.post(asyncBody); r.StatusCode != http.StatusTooManyRequests || r.Header.Get("Retry-After") == "" || r.Header.Get("Location") != "" {
		t.Errorf("beyond the limit: %s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// TestFullQueueLeavesNothingBehind has a key whose limits would show what a refused job had kept.
func TestFullQueueLeavesNothingBehind(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		gate, up := startGate(t)
		const key = "rpd 100\n\t\tmax_concurrency 4\n\t\tspend_cap_usd 0.05 hard" // a job reserves 0.01 or so
		g := startGateway(t, up.address(), jobSite(store, key, "\tasync {\n\t\tworkers 1\n\t\tmax_pending 2\n\t}"))
		body := strings.Replace(asyncBody, "{", `{"max_tokens":900,`, 1)
		paths := []string{g.submit(body)}
		eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
		paths = append(paths, g.submit(body), g.submit(body))
		for range 10 {
			r := g.post(body)
			if r.StatusCode != http.StatusTooManyRequests || r.errorCode(t) != "rate_limit_exceeded" || r.Header.Get("Retry-After") == "" ||
				!strings.Contains(string(r.body), "queue") {
				t.Errorf("%s %s", r.Status, r.body)
			}
		}
		gate.let()
		for _, path := range paths {
			g.becomes(path, JobCompleted)
		}
		last := g.post(asyncBody)
		if limits := last.Header.Get("Ratelimit"); !strings.HasPrefix(limits, `"rpd";r=96;`) {
			t.Errorf("RateLimit after 4 of 100: %s", limits)
		}
		g.becomes(last.Header.Get("Location"), JobCompleted)
	})
}

func TestJobIsForgottenAfterItsRetention(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		up := startUpstream(t, answers(200, "application/json", completion))
		g := startGateway(t, up.address(), jobSite(store, "", "\tasync {\n\t\tretention 3s\n\t}"))
		path := g.submit(asyncBody)
		g.becomes(path, JobCompleted)
		eventuallyIn(t, time.Minute, "it is forgotten", func() bool { return g.do(http.MethodGet, path, "").StatusCode == 404 })
	})
}

func TestResultThatIsTooLargeFailsTheJobAndIsCharged(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), jobSite("store local $DIR/mesh.db", "", "\tasync {\n\t\tmax_result 100B\n\t}"))
	j := g.becomes(g.submit(asyncBody), JobFailed)
	if !strings.Contains(string(j.Error), "result_too_large") {
		t.Errorf("%s", j.Error)
	}
	if e := g.publicEvent(j.RequestID); e.Cost != 4_500_000 || e.CompletionTokens != 200 || e.Outcome != OutcomeError || e.Status != "error" ||
		e.StatusCode != http.StatusBadGateway || e.ErrorCode != "result_too_large" {
		t.Errorf("%+v", e)
	}
}

func TestReloadLeavesRunningJobsAloneAndRunsOthersAnew(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		gate, up := startGate(t)
		next := startUpstream(t, answers(200, "application/json", strings.Replace(completion, "Hello", "Welcome", 1)))
		config := jobSite(store, "", "\tasync {\n\t\tworkers 1\n\t}")
		g := startGateway(t, up.address(), config)
		running, waiting := g.submit(asyncBody), g.submit(asyncBody)
		eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
		g.load("http://$ADDRESS {\n" + strings.NewReplacer("$UPSTREAM", next.address(), "workers 1", "workers 2").Replace(config) + "\n}\n")
		if j := g.becomes(waiting, JobCompleted); !strings.Contains(string(j.Response), "Welcome") {
			t.Errorf("what waited: %s", j.Response)
		}
		if j := g.job(running); j.Status != JobInProgress {
			t.Errorf("what ran is %s", j.Status)
		}
		gate.let()
		if j := g.becomes(running, JobCompleted); !strings.Contains(string(j.Response), "Hello") {
			t.Errorf("what ran: %s", j.Response)
		}
		if gate.entered.Load() != 1 || len(next.received()) != 1 {
			t.Errorf("the upstreams were asked %d and %d times", gate.entered.Load(), len(next.received()))
		}
	})
}

// TestJobIsWhatItWasAtItsSubmit changes a template while a job with it waits.
func TestJobIsWhatItWasAtItsSubmit(t *testing.T) {
	gate, up := startGate(t)
	g := startGateway(t, up.address(), strings.Replace(jobSite("store local $DIR/mesh.db", "default_params temperature 0.25", "\tasync {\n\t\tworkers 1\n\t}"),
		"api_key sk-upstream", "api_key sk-upstream\n\t\treverse_proxy {\n\t\t\theader_up X-Key {http.mesh.key.name}\n\t\t}", 1))
	template := templatesPath + "/" + g.do(http.MethodPost, templatesPath, `{"name":"greet","system":"Greet {{who}}.","model":"test/templated"}`).template(t, 201).ID
	first := g.submit(asyncBody)
	eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
	second := g.submit(`{"async_mode":true,"template":"greet","variables":{"who":"Ada"},"messages":[],"user":"u"}`, "User-Agent", "tester/1", "Cookie", "c=1")
	if r := g.do(http.MethodDelete, template, ""); r.StatusCode != http.StatusNoContent {
		t.Fatal(r.Status)
	}
	gate.let()
	g.becomes(first, JobCompleted)
	if j := g.becomes(second, JobCompleted); j.Model != "test/templated" {
		t.Errorf("%+v", j)
	}
	last := up.last(t)
	const want = `{"messages":[{"role":"system","content":"Greet Ada."}],"user":"u","temperature":0.25,"model":"templated"}`
	if string(last.body) != want {
		t.Errorf("the upstream received\n%s, want\n%s", last.body, want)
	}
	if last.Header.Get("User-Agent") != "tester/1" || last.Header.Get("X-Key") != "tester" || last.Header.Get("Cookie") != "" || last.Header.Get("Authorization") != "Bearer sk-upstream" {
		t.Errorf("%v", last.Header)
	}
}

func TestSitesThatShareAStoreDoNotShareJobsByAccident(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), jobSite("store local $DIR/mesh.db", "", ""))
	alone := g.submit(asyncBody)
	g.becomes(alone, JobCompleted)
	other := freeAddress(t)
	second := func(async string) string {
		return "http://" + other + " {\n" + strings.Replace(jobSite("store local $DIR/mesh.db", "", async), "test/*", "test/p*", 1) + "\n}\n"
	}
	first := "http://$ADDRESS {\n" + jobSite("store local $DIR/mesh.db", "", "") + "\n}\n"
	g.load(first + second(""))
	if r := g.post(asyncBody); r.StatusCode != 422 || !strings.Contains(string(r.body), "async_mode") {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if j := g.job(alone); j.Status != JobCompleted {
		t.Errorf("%+v", j)
	}
	g.load(first + second("\tasync {\n\t\tqueue second\n\t}"))
	path := g.submit(asyncBody)
	g.becomes(path, JobCompleted)
	r, err := http.NewRequest(http.MethodGet, "http://"+other+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+testKey)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("at the other site: %s", resp.Status)
	}
}

// TestJobsResumeAfterTheEndOfTheirProcess ends a process that runs a job and has others wait.
func TestJobsResumeAfterTheEndOfTheirProcess(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			gate, up := startGate(t)
			const key = "max_concurrency 3\n\t\tspend_cap_usd 10 hard"
			config := fmt.Sprintf(inSite, jobSite("store local $DIR/mesh.db", key, "\tasync {\n\t\tworkers 1\n\t}"))
			p := startProcess(t, up.address(), config)
			g := p.gateway()
			large := strings.Replace(asyncBody, "Hi", strings.Repeat("many words ", 1<<18), 1)
			paths := []string{g.submit(asyncBody), g.submit(large), g.submit(asyncBody)}
			eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
			p.restart(signal)
			eventuallyIn(t, time.Minute, "it runs again", func() bool { return gate.entered.Load() == 2 })
			if r := g.post(strings.Replace(chatBody, "{", `{"timeout":5,`, 1)); r.StatusCode != http.StatusTooManyRequests {
				t.Errorf("beside three jobs: %s %s", r.Status, r.body)
			}
			gate.let()
			var ids []string
			for _, path := range paths {
				ids = append(ids, g.becomes(path, JobCompleted).RequestID)
			}
			for _, id := range ids {
				eventually(t, "the ledger has one entry", func() bool { return len(g.ledgerOf(id)) == 1 })
			}
			p.kill(syscall.SIGTERM)
			entries, sum := readLedger(t, p.path("mesh.db")), Money(0)
			for _, e := range entries {
				sum += e.Cost
			}
			if len(entries) != len(paths) || sum != Money(len(paths))*4_500_000 {
				t.Errorf("%d entries, %s USD", len(entries), sum)
			}
		})
	}
}

// TestJobIsSeenByOperatorsOnce looks at the access log and the metrics of a submit and a run.
func TestJobIsSeenByOperatorsOnce(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, "log\n"+jobSite("store local $DIR/mesh.db", "", "\tmetrics {\n\t\tper_key\n\t}")))
	g := p.gateway()
	j := g.becomes(g.submit(asyncBody), JobCompleted)
	count := func(prefix string) (sum float64) {
		for name, value := range p.metrics() {
			if strings.HasPrefix(name, prefix) {
				sum += value
			}
		}
		return sum
	}
	eventually(t, "the request is counted", func() bool { return count("caddy_mesh_requests_total{") > 0 })
	for prefix, want := range map[string]float64{
		"caddy_mesh_requests_total{": 1, "caddy_mesh_key_requests_total{": 1, "caddy_mesh_cost_usd_total{": 0.0045, "caddy_mesh_request_duration_seconds_count{": 1,
	} {
		if got := count(prefix); got != want {
			t.Errorf("%s: %g, want %g", prefix, got, want)
		}
	}
	eventually(t, "the submit is logged", func() bool {
		for line := range strings.Lines(p.log()) {
			if strings.Contains(line, "handled request") && strings.Contains(line, j.RequestID) {
				return strings.Contains(line, `"status":202`) && strings.Contains(line, `"model":"test/plain"`)
			}
		}
		return false
	})
}

// TestHandlerThatPanicsEndsOneJobOnly would end the process of the test otherwise.
func TestHandlerThatPanicsEndsOneJobOnly(t *testing.T) {
	up := &Upstream{Name: "up", OnHangup: new(Hangup), health: new(upstreamHealth), rules: new(Circuit).withDefaults()} // has no handler
	h := &Handler{logger: zap.NewNop(), async: new(Async).rules(), Timeout: caddy.Duration(time.Minute)}
	h.models = newModelTable([]*Model{{Name: "test/plain", Targets: []*Target{{Upstream: "up"}}}}, map[string]*Upstream{"up": up})
	j, _ := newTestJob(Limits{}, 0)
	call, end := h.runJob(nil, newJobRun(j, []byte(chatBody)))
	if end.Status != JobFailed || !strings.Contains(string(end.Error), "internal_error") || end.Event.RequestID != j.RequestID || end.Event.Cost != 0 {
		t.Errorf("%+v", end)
	}
	if call.event.Outcome != OutcomeError {
		t.Errorf("%+v", call.event)
	}
}

// TestLocalJobsThatWereNotSettledAreAtTheNextStart has a process end between the end of a job and its settlement, and before
// the run of a cancelled job has said what it cost.
func TestLocalJobsThatWereNotSettledAreAtTheNextStart(t *testing.T) {
	path := t.TempDir() + "/mesh.db"
	s := openLocal(t, path)
	ended, a := newTestJob(Limits{}, 0)
	submitJob(t, s, ended, a)
	end := endOf(takeJob(t, s, "q"), `"won"`, 5)
	err := s.changeJobs(func(b *jobBuckets) error {
		j, err := b.get(ended.ID)
		if err != nil {
			return err
		}
		return b.end(j, &end)
	})
	if err != nil {
		t.Fatal(err)
	}
	cancelled, a := newTestJob(Limits{}, 0)
	submitJob(t, s, cancelled, a)
	run := takeJob(t, s, "q")
	if j, err := s.CancelJob(t.Context(), "q", cancelled.ID); err != nil || j.Status != JobCancelled || context.Cause(run.ctx) != errJobCancelled {
		t.Fatalf("%+v, %v, %v", j, err, context.Cause(run.ctx))
	}
	if spent := s.spend("abc"); spent != 0 {
		t.Errorf("spent before: %s", spent)
	}
	for range 2 { // and once
		if err := s.Destruct(); err != nil {
			t.Fatal(err)
		}
		s = openLocal(t, path)
		if spent := s.spend("abc"); spent != 12 {
			t.Errorf("spent: %s", spent)
		}
	}
	if err := s.SweepJobs(t.Context(), "q"); err != nil {
		t.Error(err)
	}
	entries := 0
	if err := s.events(func(Event) bool { entries++; return true }); err != nil || entries != 2 {
		t.Errorf("%d entries, %v", entries, err)
	}
	owed := 0
	s.viewJobs(func(b *jobBuckets) error { //nolint:errcheck // it counts
		return b.owed.ForEach(func(_, _ []byte) error { owed++; return nil })
	})
	if owed != 0 {
		t.Errorf("%d events are kept", owed)
	}
	for id, want := range map[string]JobStatus{ended.ID: JobCompleted, cancelled.ID: JobCancelled} {
		if j, err := s.GetJob(t.Context(), "q", id); err != nil || j.Status != want {
			t.Errorf("%+v, %v", j, err)
		}
	}
}

func TestJobsOfAnInstanceWithoutWorkersWait(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	config := jobSite("store local $DIR/mesh.db", "", "\tasync {\n\t\tworkers 0\n\t\tmax_pending 1\n\t}")
	g := startGateway(t, up.address(), config)
	path := g.submit(asyncBody)
	if r := g.post(asyncBody); r.StatusCode != http.StatusTooManyRequests {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if j := g.job(path); j.Status != JobQueued || len(up.received()) != 0 {
		t.Errorf("%+v", j)
	}
	g.load("http://$ADDRESS {\n" + strings.Replace(config, "workers 0", "workers 1", 1) + "\n}\n")
	g.becomes(path, JobCompleted)
}
