package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/redis/go-redis/v9"
)

// shortJobTimes has leases of jobs run out soon, for the time of a test.
func shortJobTimes(t *testing.T) {
	t.Helper()
	beat, lease, poll, sweep := jobBeat, jobLease, jobPoll, jobSweep
	jobBeat, jobLease, jobPoll, jobSweep = 50*time.Millisecond, time.Second, 20*time.Millisecond, 100*time.Millisecond
	t.Cleanup(func() { jobBeat, jobLease, jobPoll, jobSweep = beat, lease, poll, sweep })
}

// newTestJob returns a job and what admits it.
func newTestJob(limits Limits, maxCost Money) (*Job, Admission) {
	id := newRequestID()
	j := &Job{
		ID: jobPrefix + ulid.Make().String(), Queue: "q", Scope: "o:acme", RequestID: id, Model: "m",
		Created: time.Now().UTC(), Retention: time.Hour, Status: JobQueued,
		Request: &JobRequest{
			KeyID: "abc", Key: Key{HardCap: limits.Hard, SpendCap: limits.SpendCap, MaxConcurrency: limits.MaxConcurrency}, MaxCost: maxCost,
			Pending: Event{RequestID: id, KeyID: "abc", Model: "m", Outcome: OutcomeLost, Cost: 7, Estimated: true},
		},
	}
	return j, Admission{KeyID: "abc", RequestID: id, Limits: limits, MaxCost: maxCost, Pending: j.Request.Pending, Job: j}
}

func submitJob(t *testing.T, s JobStore, j *Job, a Admission) {
	t.Helper()
	if v, err := s.SubmitJob(t.Context(), a, j, []byte("body of "+j.ID), 100); err != nil || v.Refused != "" {
		t.Fatalf("%+v, %v", v, err)
	}
}

func takeJob(t *testing.T, s JobStore, queue string) *JobRun {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	run, err := s.TakeJob(ctx, queue)
	if err != nil {
		t.Fatal(err)
	}
	if string(run.Body) != "body of "+run.Job.ID {
		t.Errorf("the body is %q", run.Body)
	}
	return run
}

// endOf is the end of a run that cost something.
func endOf(run *JobRun, response string, cost Money) JobEnd {
	return JobEnd{Status: JobCompleted, Response: json.RawMessage(response), Event: Event{
		RequestID: run.Job.RequestID, KeyID: "abc", Model: "m", Cost: cost, Outcome: OutcomeCompleted, Time: time.Now().UTC(),
	}}
}

// TestJobOfAnInstanceThatDiedIsRunByAnotherAndEndsOnce has the first run come to an end after all.
func TestJobOfAnInstanceThatDiedIsRunByAnotherAndEndsOnce(t *testing.T) {
	server := startRedis(t)
	first, second := openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))
	j, a := newTestJob(Limits{SpendCap: 1000, Hard: true, MaxConcurrency: 1}, 600)
	submitJob(t, first, j, a)
	if b := readRedis(t, first, "abc"); b.pending != 1 || b.reserved != "600" {
		t.Errorf("%+v", b)
	}
	lost := takeJob(t, first, "q")
	client := server.client()
	idle := func() time.Duration {
		return client.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: "mesh:{jobs:q}:stream", Group: jobGroup, Start: "-", End: "+", Count: 1}).Val()[0].Idle
	}
	eventually(t, "the lease has become older", func() bool { return idle() > 200*time.Millisecond })
	renewed := time.Now()
	first.KeepJobs(t.Context(), "q", []*JobRun{lost})
	if got, most := idle(), time.Since(renewed)+time.Millisecond; got > most {
		t.Errorf("the lease is %s old, %s after it was renewed", got, most)
	}
	if claimed, err := second.claimJob("q"); claimed != nil || err != nil {
		t.Fatalf("%v, %v", claimed, err)
	}
	client.Do(t.Context(), "XCLAIM", "mesh:{jobs:q}:stream", jobGroup, jobConsumer, 0, lost.entry, "IDLE", 3_600_000, "JUSTID")
	run := takeJob(t, second, "q")
	first.KeepJobs(t.Context(), "q", []*JobRun{lost})
	if cause := context.Cause(lost.ctx); cause != errJobLost {
		t.Errorf("the first run goes on: %v", cause)
	}
	if err := first.FinishJob(t.Context(), lost, endOf(lost, `"late"`, 3)); !errors.Is(err, errJobLost) {
		t.Errorf("the end of the first run: %v", err)
	}
	for range 2 { // an answer may have been lost
		if err := second.FinishJob(t.Context(), run, endOf(run, `"won"`, 5)); err != nil && !errors.Is(err, errJobLost) {
			t.Error(err)
		}
	}
	if err := first.FinishJob(t.Context(), lost, endOf(lost, `"late"`, 3)); !errors.Is(err, errJobLost) {
		t.Errorf("the end of the first run: %v", err)
	}
	settledAll(t, first)
	settledAll(t, second)
	if b := readRedis(t, first, "abc"); b.total != "5" || b.entries != 1 || b.pending != 0 || b.reserved != "0" {
		t.Errorf("%+v", b)
	}
	for _, s := range []*redisStore{first, second} { // what they go by in an outage
		if a := s.accounts.of("abc"); len(a.underWay.requests) != 0 || a.reserved.sum != 0 {
			t.Errorf("under way: %v, reserved: %s", a.underWay.requests, a.reserved.sum)
		}
	}
	if got, err := first.GetJob(t.Context(), "q", j.ID); err != nil || string(got.Response) != `"won"` || got.Status != JobCompleted {
		t.Errorf("%+v, %v", got, err)
	}
	if n, body := client.XLen(t.Context(), "mesh:{jobs:q}:stream").Val(), client.HExists(t.Context(), "mesh:{jobs:q}:job:"+j.ID, "body").Val(); n != 0 || body {
		t.Errorf("%d entries are left; the body is there: %t", n, body)
	}
}

// TestEndOfAJobIsSettledByOthersIfItsInstanceDies stops an instance between the two.
func TestEndOfAJobIsSettledByOthersIfItsInstanceDies(t *testing.T) {
	shortJobTimes(t)
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	ended, a := newTestJob(Limits{}, 0)
	submitJob(t, s, ended, a)
	run := takeJob(t, s, "q")
	end := endOf(run, `"won"`, 5)
	event, err := encodeEvent(&end.Event)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.jobScript(0, "finish", "q", ended.ID, run.token, string(JobCompleted), `"won"`, "", event); err != nil {
		t.Fatal(err)
	}
	cancelled, a := newTestJob(Limits{}, 0)
	submitJob(t, s, cancelled, a)
	takeJob(t, s, "q")
	if j, err := s.CancelJob(t.Context(), "q", cancelled.ID); err != nil || j.Status != JobCancelled {
		t.Fatalf("%+v, %v", j, err)
	}
	if b := readRedis(t, s, "abc"); b.pending != 2 || b.entries != 0 {
		t.Fatalf("%+v", b)
	}
	ctx, stop := context.WithCancel(t.Context())
	var taking sync.WaitGroup
	taking.Go(func() { s.TakeJob(ctx, "q") }) //nolint:errcheck // there is none to run
	eventuallyIn(t, time.Minute, "both are settled", func() bool { return readRedis(t, s, "abc").pending == 0 })
	stop()
	taking.Wait()
	settledAll(t, s)
	if b := readRedis(t, s, "abc"); b.total != "12" || b.entries != 2 || b.ids[ended.RequestID].Cost != 5 || b.ids[cancelled.RequestID].Outcome != OutcomeLost {
		t.Errorf("%+v", b)
	}
	for id, want := range map[string]JobStatus{ended.ID: JobCompleted, cancelled.ID: JobCancelled} {
		if j, err := s.GetJob(t.Context(), "q", id); err != nil || j.Status != want {
			t.Errorf("%+v, %v", j, err)
		}
	}
}

func TestReaperLeavesJobsAloneAndUndoesThoseThatNeverCame(t *testing.T) {
	server := startRedis(t)
	dying, s := openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))
	queued, a := newTestJob(Limits{RPM: 100, SpendCap: 1000, Hard: true}, 100)
	submitJob(t, dying, queued, a)
	never, b := newTestJob(Limits{RPM: 100, SpendCap: 1000, Hard: true}, 100)
	admitRedis(t, dying, b)
	eventually(t, "the key is registered", func() bool { return s.client.SIsMember(t.Context(), "mesh:keyids", "abc").Val() })
	closeRedis(t, dying)
	dead := map[string]time.Time{dying.instance: time.Now().Add(-time.Hour), queued.holder(): time.Now().Add(-time.Hour), never.holder(): time.Now().Add(-time.Hour)}
	eventually(t, "it has been the turn of this one", func() bool {
		s.client.Del(t.Context(), "mesh:reaper")
		if err := s.reapAll(t.Context(), dead); err != nil {
			t.Fatal(err)
		}
		return readRedis(t, s, "abc").pending == 1
	})
	if b := readRedis(t, s, "abc"); b.reserved != "100" || b.entries != 0 {
		t.Errorf("%+v", b)
	}
	if v := admitRedis(t, s, Admission{KeyID: "abc", RequestID: newRequestID(), Limits: Limits{RPM: 100}}); v.Minute.Used > 2 {
		t.Errorf("%d requests count", v.Minute.Used)
	}
	run := takeJob(t, s, "q")
	if err := s.FinishJob(t.Context(), run, endOf(run, "{}", 9)); err != nil {
		t.Error(err)
	}
	settledAll(t, s)
	if b := readRedis(t, s, "abc"); b.total != "9" || b.entries != 1 || b.reserved != "0" {
		t.Errorf("%+v", b)
	}
}

// TestJobThatIsBegunAgainAndAgainFails is for both stores: the gateway dies each time.
func TestJobThatIsBegunAgainAndAgainFails(t *testing.T) {
	shortJobTimes(t)
	local := openLocal(t, t.TempDir()+"/mesh.db")
	for name, s := range map[string]JobStore{"local": local, "redis": openRedis(t, redisModule(t, startRedis(t).address))} {
		t.Run(name, func(t *testing.T) {
			j, a := newTestJob(Limits{}, 0)
			submitJob(t, s, j, a)
			for range maxJobRuns {
				takeJob(t, s, "q")
				if local == s {
					local.restartJobs(t)
				}
			}
			ctx, stop := context.WithCancel(t.Context())
			var taking sync.WaitGroup
			taking.Go(func() { s.TakeJob(ctx, "q") }) //nolint:errcheck // there is none to run
			eventuallyIn(t, time.Minute, "it has failed", func() bool {
				got, err := s.GetJob(t.Context(), "q", j.ID)
				return err == nil && got.Status == JobFailed && strings.Contains(string(got.Error), "job_abandoned")
			})
			stop()
			taking.Wait()
		})
	}
}

// restartJobs has the store find its jobs as a new process does.
func (s *localStore) restartJobs(t *testing.T) {
	t.Helper()
	s.jobs.mu.Lock()
	s.jobs.queues, s.jobs.running = nil, nil
	s.jobs.mu.Unlock()
	if err := s.loadJobs(); err != nil {
		t.Fatal(err)
	}
}

func TestJobThatWaitsForTooLongFailsAndCostsNothing(t *testing.T) {
	most := maxJobWait
	t.Cleanup(func() { maxJobWait = most })
	for name, s := range map[string]JobStore{
		"local": openLocal(t, t.TempDir()+"/mesh.db"), "redis": openRedis(t, redisModule(t, startRedis(t).address)),
	} {
		t.Run(name, func(t *testing.T) {
			maxJobWait = most
			j, a := newTestJob(Limits{MaxConcurrency: 1, SpendCap: 1000, Hard: true}, 900)
			submitJob(t, s, j, a)
			if err := s.SweepJobs(t.Context(), "q"); err != nil {
				t.Error(err)
			}
			if got, err := s.GetJob(t.Context(), "q", j.ID); err != nil || got.Status != JobQueued {
				t.Errorf("%+v, %v", got, err)
			}
			maxJobWait = time.Millisecond
			time.Sleep(5 * time.Millisecond)
			if err := s.SweepJobs(t.Context(), "q"); err != nil {
				t.Error(err)
			}
			got, err := s.GetJob(t.Context(), "q", j.ID)
			if err != nil || got.Status != JobFailed || !strings.Contains(string(got.Error), "job_expired") {
				t.Errorf("%+v, %v", got, err)
			}
			eventually(t, "its slot and its reservation are free", func() bool {
				_, again := newTestJob(Limits{MaxConcurrency: 1, SpendCap: 1000, Hard: true}, 1000)
				again.Job = nil
				v, err := s.Admit(t.Context(), again)
				return err == nil && v.Refused == "" && v.Spend == 0
			})
		})
	}
}

// TestJobsWaitOutAnOutage cuts the connections to Redis while a job runs and another waits.
func TestJobsWaitOutAnOutage(t *testing.T) {
	shortJobTimes(t)
	server := startRedis(t, "--appendfsync", "always")
	gate, up := startGate(t)
	store := "store redis " + server.address + " {\n\t\ttimeout 1s\n\t\tjournal $DIR/journal.db\n\t}"
	g := startGateway(t, up.address(), jobSite(store, "", "\tasync {\n\t\tworkers 1\n\t}"))
	running, waiting := g.submit(asyncBody), g.submit(asyncBody)
	eventually(t, "the first runs", func() bool { return gate.entered.Load() == 1 })
	server.kill()
	gate.let()
	eventuallyIn(t, time.Minute, "no job is taken", func() bool {
		r := g.post(asyncBody)
		return r.StatusCode == http.StatusServiceUnavailable && r.errorCode(t) == "store_unavailable"
	})
	if r := g.do(http.MethodGet, running, ""); r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("%s %s", r.Status, r.body)
	}
	eventuallyIn(t, time.Minute, "others are served", func() bool { return g.post(chatBody).StatusCode == http.StatusOK })
	server.start()
	for _, path := range []string{running, waiting} {
		var j seenJob
		eventuallyIn(t, time.Minute, "it is completed", func() bool {
			r := g.do(http.MethodGet, path, "")
			return r.StatusCode == 200 && json.Unmarshal(r.body, &j) == nil && j.Status == JobCompleted
		})
		eventually(t, "the ledger has one entry", func() bool { return len(g.ledgerOf(j.RequestID)) == 1 })
	}
}

func TestClusterKeepsAQueueInOneSlot(t *testing.T) {
	store := "store redis " + strings.Join(addresses(startCluster(t)), " ") + " {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}"
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), jobSite(store, "", "\tasync {\n\t\tworkers 1\n\t\tqueue a-queue\n\t}"))
	for range 5 {
		j := g.becomes(g.submit(asyncBody), JobCompleted)
		eventually(t, "the ledger has one entry", func() bool { return len(g.ledgerOf(j.RequestID)) == 1 })
	}
}

// TestJobsOfAFleetEndOnceThoughOneIsKilled has three Caddys share a thousand jobs, kills one while it runs some, and ends
// another.
func TestJobsOfAFleetEndOnceThoughOneIsKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("a lease must run out")
	}
	const all = 1000
	server := startRedis(t)
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(50 * time.Millisecond)
		pricedAnswers(w, r)
	})
	store := "store redis " + server.address + " {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}"
	config := fmt.Sprintf(inSite, jobSite(store, "spend_cap_usd 1000000 hard", "\tasync {\n\t\tmax_pending 2000\n\t}"))
	var fleet []*process
	for range 3 {
		fleet = append(fleet, startProcess(t, up.address(), config))
	}
	body := strings.Replace(asyncBody, "{", `{"max_tokens":100000,`, 1)
	requests := make(map[string]string) // by path
	var mu sync.Mutex
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			g := fleet[i%len(fleet)].gateway()
			for range all / 8 {
				r := g.post(body)
				if r.StatusCode != http.StatusAccepted {
					t.Errorf("%s %s", r.Status, r.body)
					return
				}
				mu.Lock()
				requests[r.Header.Get("Location")] = r.Header.Get("X-Request-Id")
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	if len(requests) != all {
		t.Fatalf("%d jobs", len(requests))
	}
	answered := len(up.received())
	fleet[0].kill(os.Kill)
	fleet[1].kill(syscall.SIGTERM) // which gives back what it was running
	began := time.Now()

	g := fleet[2].gateway()
	costs := make(map[string]Money)
	for path, id := range requests {
		j := g.becomes(path, JobCompleted)
		var said struct{ Cost Money }
		if err := json.Unmarshal(j.Response, &said); err != nil || said.Cost == 0 || j.RequestID != id {
			t.Errorf("%+v: %v", j, err)
		}
		costs[id] = said.Cost
		if r := g.do(http.MethodGet, path, "", "Authorization", "Bearer "+otherKey); r.StatusCode != http.StatusNotFound {
			t.Errorf("by another: %s", r.Status)
		}
	}
	client := server.client()
	names := client.Keys(t.Context(), "mesh:{*}:account").Val()
	if len(names) != 1 {
		t.Fatalf("accounts: %v", names)
	}
	of := strings.TrimSuffix(names[0], "account")
	eventuallyIn(t, time.Minute, "nothing is pending", func() bool { return client.HLen(t.Context(), of+"pending").Val() == 0 })
	var sum Money
	entries := make(map[string]bool)
	for _, m := range client.XRange(t.Context(), of+"ledger", "-", "+").Val() {
		e := decodeEvent(t, m.Values["event"].(string))
		if cost, ok := costs[e.RequestID]; !ok || entries[e.RequestID] || cost != e.Cost || e.Outcome != OutcomeCompleted {
			t.Errorf("answered for %s (a job: %t, before: %t), entered %+v", cost, ok, entries[e.RequestID], e)
		}
		entries[e.RequestID] = true
		sum += e.Cost
	}
	account := client.HGetAll(t.Context(), of+"account").Val()
	if len(entries) != all || account["total"] != strconv.FormatInt(int64(sum), 10) || account["reserved"] != "0" {
		t.Errorf("%d entries of %s USD; the account: %v", len(entries), sum, account)
	}
	if n := client.ZCard(t.Context(), "mesh:{jobs:default}:waiting").Val() + client.XLen(t.Context(), "mesh:{jobs:default}:stream").Val(); n != 0 {
		t.Errorf("%d are left in the queue", n)
	}
	t.Logf("%d answers before the kill, %d in all; the rest took %s", answered, len(up.received()), time.Since(began).Round(time.Second))
}
