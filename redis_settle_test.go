package mesh

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"go.uber.org/goleak"
)

func newRequestID() string { return "req_" + ulid.Make().String() }

// expectBalance checks that the ledger has each of the requests once, and that spend is the sum of their costs.
func expectBalance(t *testing.T, s *redisStore, keyID string, want map[string]Money) {
	t.Helper()
	b := readRedis(t, s, keyID)
	var sum Money
	for id, cost := range want {
		sum += cost
		if e, ok := b.ids[id]; !ok {
			t.Errorf("%s is not in the ledger", id)
		} else if e.Cost != cost {
			t.Errorf("%s is in the ledger for %d, want %d", id, e.Cost, cost)
		}
	}
	if b.entries != len(want) || b.sum != sum || b.total != strconv.FormatInt(int64(sum), 10) {
		t.Errorf("%d entries for %d, and a spend of %s; want %d for %d", b.entries, b.sum, b.total, len(want), sum)
	}
	if b.pending != 0 {
		t.Errorf("%d are still pending", b.pending)
	}
}

func TestRedisSettlesARequestOnce(t *testing.T) {
	server := startRedis(t)
	stores := []*redisStore{openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))}
	want := make(map[string]Money)
	var ids []string
	for i := range 10 {
		ids = append(ids, newRequestID())
		want[ids[i]] = 7
		admitRedis(t, stores[i%2], Admission{KeyID: "key", RequestID: ids[i]})
	}
	var wg sync.WaitGroup
	for i := range 400 {
		wg.Go(func() { stores[i%2].Settle(Event{RequestID: ids[rand.N(10)], KeyID: "key", Cost: 7}) })
	}
	wg.Wait()
	for _, id := range ids {
		stores[0].Settle(Event{RequestID: id, KeyID: "key", Cost: 7})
	}
	settledAll(t, stores[0])
	settledAll(t, stores[1])
	expectBalance(t, stores[0], "key", want)
}

func TestEventComesBackWholeFromRedisAndItsUsageIsSummed(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	want := Event{
		KeyID: "key", KeyName: "team-a", Owner: "acme", SessionID: "s",
		Time: at(t, "2026-11-24T10:00:00.123456789Z"), Duration: 5, TTFT: 3,
		Model: "openai/gpt-4o", Upstream: "openai", Stream: true, Attempts: 2, Status: 200, Outcome: OutcomeCut,
		PromptTokens: 9, CachedTokens: 4, CompletionTokens: 2, Estimated: true, Cost: 123_000_000_001,
		PromptAudioTokens: 3, CompletionAudioTokens: 1, Images: 2,
	}
	for range 3 {
		want.RequestID = newRequestID()
		settleNow(t, s, want)
	}
	want.Outcome, want.RequestID = OutcomeCompleted, newRequestID()
	settleNow(t, s, want)
	if got := readRedis(t, s, "key").ids[want.RequestID]; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	sums := map[string]string{
		"requests": "4", "errors": "3", "prompt_tokens": "36", "cached_tokens": "16", "completion_tokens": "8", "cost": "492000000004",
		"error_prompt_tokens": "27", "error_cached_tokens": "12", "error_completion_tokens": "6", "error_cost": "369000000003",
	}
	ofModel, ofHour := make(map[string]string), make(map[string]string)
	for name, sum := range sums {
		ofModel[name+" openai/gpt-4o"] = sum
		ofHour[name+" "+hourOfRequest(want.RequestID)+" openai/gpt-4o"] = sum
	}
	ofModel["models"] = "1"
	if got := s.client.HGetAll(t.Context(), s.key("key", "session:s")).Val(); !maps.Equal(got, ofHour) {
		t.Errorf("session: %v", got)
	}
	if got := s.client.HGetAll(t.Context(), s.key("key", "usage:"+dayOfRequest(want.RequestID))).Val(); !maps.Equal(got, ofModel) {
		t.Errorf("day: %v", got)
	}
}

func TestEstimateGivesWayToWhatTheRequestReallyCost(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	id := newRequestID()
	usage := s.key("key", "usage:"+dayOfRequest(id))
	admitRedis(t, s, Admission{KeyID: "key", RequestID: id, Limits: Limits{SpendCap: 1 << 40, Hard: true}, MaxCost: 500})
	estimate := Event{RequestID: id, KeyID: "key", SessionID: "s", Model: "a", PromptTokens: 10, Cost: 100, Outcome: OutcomeLost}
	settle := func(kind string, e Event) {
		t.Helper()
		enterNow(t, s, settlement{Kind: kind, Event: e})
	}
	settle(settleLost, estimate)
	settle(settleLost, estimate)
	expectBalance(t, s, "key", map[string]Money{id: 100})
	exact := estimate
	exact.Model, exact.PromptTokens, exact.Cost, exact.Outcome = "b", 12, 30, OutcomeCompleted
	settle(settleEvent, exact)
	settle(settleEvent, exact)
	settle(settleLost, estimate)
	expectBalance(t, s, "key", map[string]Money{id: 30})
	got := s.client.HGetAll(t.Context(), usage).Val()
	for field, want := range map[string]string{
		"requests a": "0", "errors a": "0", "prompt_tokens a": "0", "cost a": "0",
		"requests b": "1", "prompt_tokens b": "12", "cost b": "30", "errors b": "",
	} {
		if got[field] != want {
			t.Errorf("%s is %q, want %q", field, got[field], want)
		}
	}
	hour := " " + hourOfRequest(id) + " "
	if got := s.client.HGetAll(t.Context(), s.key("key", "session:s")).Val(); got["requests"+hour+"b"] != "1" || got["cost"+hour+"b"] != "30" || got["cost"+hour+"a"] != "0" {
		t.Errorf("session: %v", got)
	}
	for _, period := range []Period{PeriodDay, PeriodMonth, PeriodTotal} {
		if v := admitRedis(t, s, Admission{KeyID: "key", Limits: Limits{SpendPeriod: period}}); v.Spend != 30 {
			t.Errorf("spend of %s is %d", period, v.Spend)
		}
	}
	if b := readRedis(t, s, "key"); b.reserved != "0" {
		t.Errorf("%s is reserved", b.reserved)
	}
}

func TestVoidUndoesAnAdmissionEvenOneThatComesLater(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	s.redisClock(at(t, "2026-11-24T10:00:00Z"))
	limits := Limits{RPM: 10, RPD: 10, SpendCap: 100, Hard: true}
	early, late := newRequestID(), newRequestID()
	admitRedis(t, s, Admission{KeyID: "key", RequestID: early, Limits: limits, MaxCost: 10})
	enterNow(t, s,
		settlement{Kind: settleVoid, Event: Event{RequestID: early, KeyID: "key"}},
		settlement{Kind: settleVoid, Event: Event{RequestID: late, KeyID: "key"}},
	)
	v := admitRedis(t, s, Admission{KeyID: "key", RequestID: late, Limits: limits, MaxCost: 10})
	if v.Minute.Used != 0 || v.Day.Used != 0 {
		t.Errorf("counted: %+v", v)
	}
	if b := readRedis(t, s, "key"); b.pending != 0 || b.entries != 0 || b.reserved != "0" {
		t.Errorf("%+v", b)
	}
}

func TestLedgerInRedisKeepsAboutTheNewestEvents(t *testing.T) {
	module := redisModule(t, startRedis(t).address)
	module.MaxEvents = 200
	s := openRedis(t, module)
	for range 1000 {
		s.Settle(Event{RequestID: newRequestID(), KeyID: "key", Cost: 1})
	}
	last := newRequestID()
	s.Settle(Event{RequestID: last, KeyID: "key", Cost: 1})
	settledAll(t, s)
	b := readRedis(t, s, "key")
	if _, ok := b.ids[last]; !ok || b.entries < 200 || b.entries > 400 || b.total != "1001" {
		t.Errorf("%d entries, spend %s", b.entries, b.total)
	}
}

// TestKillDashNineOfRedisLosesAndDoublesNothing kills Redis five times and breaks its connections in between, while two
// stores settle.
func TestKillDashNineOfRedisLosesAndDoublesNothing(t *testing.T) {
	server := startRedis(t)
	relay := startRelay(t, server.address)
	stores := []*redisStore{openRedis(t, redisModule(t, relay.address())), openRedis(t, redisModule(t, relay.address()))}
	want := make(map[string]Money)
	var mu sync.Mutex
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s := stores[i%2]
			for !stop.Load() {
				e := Event{RequestID: newRequestID(), KeyID: "key", Model: "m", Cost: 1 + rand.N[Money](1_000_000)}
				v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: e.RequestID, Pending: e})
				if err != nil || v.Refused != "" {
					t.Errorf("%+v, %v", v, err)
				}
				time.Sleep(rand.N(3 * time.Millisecond))
				s.Settle(e)
				mu.Lock()
				want[e.RequestID] = e.Cost
				mu.Unlock()
			}
		})
	}
	for range 5 {
		time.Sleep(200 * time.Millisecond)
		relay.reset()
		time.Sleep(100 * time.Millisecond)
		server.kill()
		time.Sleep(300 * time.Millisecond)
		server.start()
	}
	time.Sleep(200 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	for _, s := range stores {
		settledAll(t, s)
	}
	expectBalance(t, stores[0], "key", want)
	t.Logf("%d requests", len(want))
}

// A replica that takes over, or a Redis that does not sync each write, lacks what had been confirmed last. Here it lacks
// everything.
func TestWhatRedisConfirmedAndThenLostIsSentAgain(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	want := make(map[string]Money)
	for range 600 {
		id := newRequestID()
		want[id] = 3
		s.Settle(Event{RequestID: id, KeyID: "key", Cost: 3})
	}
	settledAll(t, s)
	server.kill()
	if err := os.RemoveAll(filepath.Join(server.dir, "appendonlydir")); err != nil {
		t.Fatal(err)
	}
	server.start()
	eventually(t, "Redis is asked again", func() bool {
		v, err := s.Admit(t.Context(), Admission{KeyID: "key"})
		return err == nil && v.Day.Used > 0 && !s.degraded()
	})
	eventually(t, "all is sent again", func() bool {
		s.queue.call()
		return readRedis(t, s, "key").entries == len(want)
	})
	settledAll(t, s)
	expectBalance(t, s, "key", want)
}

func TestJournalIsReplayedOnceOldestFirstAfterAReopen(t *testing.T) {
	server := startRedis(t)
	module := redisModule(t, server.address)
	s := openRedis(t, module)
	want := make(map[string]Money)
	var order []string
	settle := func(n int) {
		for i := range n {
			id := newRequestID()
			order = append(order, id)
			want[id] = Money(i + 1)
			s.Settle(Event{RequestID: id, KeyID: "key", Cost: want[id]})
		}
	}
	settle(10)
	settledAll(t, s)
	server.kill()
	settle(1000)
	closeRedis(t, s)

	s = openRedis(t, module)
	if got := s.journal.count(); got != 1010 { // the first ten are to be sent again
		t.Fatalf("%d in the journal, want 1010", got)
	}
	settle(10)
	server.start()
	settledAll(t, s)
	expectBalance(t, s, "key", want)
	messages := s.client.XRange(t.Context(), s.key("key", "ledger"), "-", "+").Val()
	for i, m := range messages {
		if got := decodeEvent(t, m.Values["event"].(string)).RequestID; got != order[i] {
			t.Fatalf("entry %d is %s, want %s", i, got, order[i])
		}
	}
	closeRedis(t, s)
	s = openRedis(t, module)
	settledAll(t, s)
	expectBalance(t, s, "key", want)
}

func TestEventThatRedisCanNeverTakeDoesNotStopTheOthers(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	server.client().Set(t.Context(), s.key("broken", "account"), "not a hash", 0)
	fine := newRequestID()
	for range 5 {
		s.Settle(Event{RequestID: newRequestID(), KeyID: "broken", Cost: 1})
	}
	s.Settle(Event{RequestID: fine, KeyID: "key", Cost: 1})
	settledAll(t, s)
	expectBalance(t, s, "key", map[string]Money{fine: 1})
	if aside := s.journal.countAside(); aside != 5 {
		t.Errorf("%d of 5 were set aside", aside)
	}
	if s.degraded() {
		t.Error("took that for an outage")
	}
}

func TestDestructOfARedisStoreEndsAllGoroutines(t *testing.T) {
	server := startRedis(t)
	running := goleak.IgnoreCurrent()
	for i, module := range []*RedisStore{redisModule(t, server.address), redisModule(t, freeAddress(t))} {
		s := openRedis(t, module)
		for range 100 {
			id := newRequestID()
			if _, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: id}); err != nil {
				t.Error(err)
			}
			s.Settle(Event{RequestID: id, KeyID: "key", Cost: 1})
		}
		began := time.Now()
		closeRedis(t, s)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("closing took %s", took)
		}
		j, err := openRedisJournal(module.config.journal, module.config.identity)
		if err != nil {
			t.Fatal(err)
		}
		if want := 100 * i; j.count() != want {
			t.Errorf("%d are left in the journal, want %d", j.count(), want)
		}
		if err := j.close(); err != nil {
			t.Error(err)
		}
	}
	client := server.client()
	if keys := client.Keys(t.Context(), "mesh:instance:*").Val(); len(keys) != 0 {
		t.Errorf("it seems to live: %v", keys)
	}
	client.Close()
	goleak.VerifyNone(t, running)
}

func TestJournalOfAnotherProcessIsAnErrorThatSaysSo(t *testing.T) {
	module := redisModule(t, freeAddress(t))
	openRedis(t, module)
	// bbolt's lock is the file's, so that a second handle in this process is as good as another process
	_, err := openJournalFile(module.config.journal)
	if want := "another process has it open"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	foreign := filepath.Join(t.TempDir(), "mesh.db")
	closeLocal(t, openLocal(t, foreign))
	if _, err := openJournalFile(foreign); err == nil || err.Error() != "it is a database of another kind" {
		t.Errorf("%v", err)
	}
}
