package mesh

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// redisContent is all that a store has in Redis, by name without prefix. What counts nothing is left out, and so are the
// places of entries in a ledger.
func redisContent(t *testing.T, s *redisStore) map[string]any {
	t.Helper()
	content := make(map[string]any)
	ctx := t.Context()
	for _, key := range s.client.Keys(ctx, s.prefix+":{*").Val() {
		name := strings.TrimPrefix(key, s.prefix)
		switch kind := s.client.Type(ctx, key).Val(); kind {
		case "hash":
			fields := s.client.HGetAll(ctx, key).Val()
			for field, value := range fields {
				if value == "0" {
					delete(fields, field)
				} else if strings.Contains(name, ":lost:") {
					fields[field] = "an estimate"
				}
			}
			content[name] = fields
		case "set":
			members := s.client.SMembers(ctx, key).Val()
			slices.Sort(members)
			content[name] = members
		case "stream":
			var events []string
			for _, m := range s.client.XRange(ctx, key, "-", "+").Val() {
				events = append(events, m.Values["event"].(string))
			}
			content[name] = events
		default:
			t.Fatalf("%s is a %s", key, kind)
		}
		if s.client.TTL(ctx, key).Val() <= 0 {
			t.Errorf("%s has no TTL", key)
		}
	}
	return content
}

// TestRunsEnterWhatSingleSettlementsDo makes up requests of all kinds, some of them settled twice, and has one store enter
// them one by one, and another together.
func TestRunsEnterWhatSingleSettlementsDo(t *testing.T) {
	server := startRedis(t)
	now := time.Now().UTC().Truncate(time.Second)
	open := func(prefix string) *redisStore {
		module := redisModule(t, server.address)
		module.KeyPrefix = prefix
		s := openStill(t, module, func(s *redisStore) {
			s.redisClock(now)
			s.now = func() time.Time { return now }
			s.instance = "gateway"
		})
		return s
	}
	single, together := open("single"), open("together")
	random := rand.New(rand.NewPCG(1, uint64(now.Unix())))
	pick := func(from ...string) string { return from[random.IntN(len(from))] }
	var batch []settlement
	for i := range 1500 {
		e := Event{
			RequestID: idFrom(now.Add(-time.Duration(random.IntN(50)) * time.Hour)), KeyID: pick("a", "a", "a", "b"), SessionID: pick("", "s", "t"),
			Model: "m" + strconv.Itoa(random.IntN(250)), Outcome: Outcome(pick(string(OutcomeCompleted), string(OutcomeCut))),
			PromptTokens: int64(random.IntN(3)), CompletionTokens: int64(random.IntN(1000)),
			Time: now.Add(-time.Duration(random.IntN(100)) * time.Second), Cost: Money(random.IntN(1000)),
		}
		if i%97 == 0 {
			e.Cost = 1e12 + Money(random.Int64N(1e17)) // more than fits a double's 53 bits, together
		}
		a := Admission{KeyID: e.KeyID, RequestID: e.RequestID, Pending: e, Uncounted: random.IntN(5) == 0}
		a.Limits = Limits{TPM: 1 << 40, RPM: 1 << 40, SpendCap: 1 << 62, Hard: true, MaxConcurrency: 1 << 30}
		if a.MaxCost = 5000; random.IntN(10) > 0 {
			admitRedis(t, single, a)
			admitRedis(t, together, a)
		}
		for range 1 + random.IntN(2) {
			batch = append(batch, settlement{
				Kind:  pick(settleEvent, settleEvent, settleEvent, settleLost, settleVoid, settleDrop),
				Event: e, Keeps: random.IntN(5) == 0, Sent: random.IntN(5) == 0, Alone: random.IntN(5) == 0,
			})
		}
		if random.IntN(3) == 0 && len(batch) > 3 { // an older one once more
			batch = append(batch, batch[random.IntN(len(batch))])
		}
	}
	for i := range batch {
		enterNow(t, single, batch[i])
	}
	for rest := batch; len(rest) > 0; {
		n := min(1+random.IntN(settleBatch), len(rest))
		enterNow(t, together, rest[:n]...)
		rest = rest[n:]
	}
	want, got := redisContent(t, single), redisContent(t, together)
	for name := range want {
		if !reflect.DeepEqual(got[name], want[name]) {
			t.Errorf("%s\n got %v\nwant %v", name, got[name], want[name])
		}
	}
	if len(got) != len(want) || len(want) < 20 {
		t.Errorf("%d keys for %d", len(got), len(want))
	}
}

func TestRunsAreOfOneKeyAndDayAndInOrder(t *testing.T) {
	began := at(t, "2026-11-24T23:00:00Z")
	var batch []settlement
	for i := range 200 {
		id := idFrom(began.Add(time.Duration(i%2) * 2 * time.Hour))
		batch = append(batch, settlement{Event: Event{KeyID: strconv.Itoa(i % 3), RequestID: id}})
	}
	for range 100 {
		batch = append(batch, settlement{Event: Event{KeyID: "busy", RequestID: idFrom(began)}})
	}
	last := make(map[string]int)
	seen := 0
	runs := divide(batch)
	for _, run := range runs {
		for _, i := range run.at {
			e := batch[i].Event
			if e.KeyID != run.keyID || dayOfRequest(e.RequestID) != run.day || i < last[e.KeyID] {
				t.Errorf("%d of %s in a run of %s, %s", i, e.KeyID, run.keyID, run.day)
			}
			last[e.KeyID] = i
			seen++
		}
		if len(run.at) > maxSettleRun {
			t.Errorf("%d in a run", len(run.at))
		}
	}
	if seen != len(batch) || runs[len(runs)-1].keyID != "busy" || len(runs[len(runs)-2].at) != maxSettleRun {
		t.Errorf("%d of %d", seen, len(batch))
	}
}

func TestDamagedEstimateIsSetAsideAlone(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	want := make(map[string]Money)
	var batch []settlement
	for range 5 {
		id := newRequestID()
		want[id] = 7
		batch = append(batch, settlement{Kind: settleEvent, Event: Event{KeyID: "key", RequestID: id, Cost: 7, Model: "m"}})
	}
	damaged := batch[2].Event.RequestID
	s.client.HSet(t.Context(), s.key("key", "lost:"+dayOfRequest(damaged)), damaged, "\xc1")
	fates := s.enter(batch)
	if !slices.Equal(fates, []fate{entered, entered, wasSetAside, entered, entered}) {
		t.Fatalf("fates %v", fates)
	}
	delete(want, damaged)
	expectBalance(t, s, "key", want)
	if aside := s.journal.countAside(); aside != 1 || s.degraded() {
		t.Errorf("%d are aside, degraded: %t", aside, s.degraded())
	}
}

// settlementsOf returns n settlements of a key, for 7 each.
func settlementsOf(keyID string, n int) (batch []settlement) {
	for range n {
		batch = append(batch, settlement{Kind: settleEvent, Event: Event{KeyID: keyID, RequestID: newRequestID(), Cost: 7, Model: "m", Outcome: OutcomeCompleted}})
	}
	return batch
}

// What is wrong with a session is not to be at the cost of the others in its run.
func TestDamagedSessionSpoilsNothingElse(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	batch := settlementsOf("sum", maxSettleRun)
	batch[3].Event.SessionID = "s"
	s.client.HSet(t.Context(), s.key("sum", "session:s"), "cost "+hourOfRequest(batch[3].Event.RequestID)+" m", "1.5")
	kind := settlementsOf("kind", maxSettleRun)
	kind[3].Event.SessionID = "s"
	s.client.Set(t.Context(), s.key("kind", "session:s"), "not a hash", 0)
	fates := s.enter(append(batch, kind...))
	for i, f := range fates {
		want := entered
		if i == maxSettleRun+3 {
			want = wasSetAside
		}
		if f != want {
			t.Errorf("fate of %d is %d, want %d", i, f, want)
		}
	}
	for keyID, total := range map[string]string{"sum": "224", "kind": "217"} {
		if b := readRedis(t, s, keyID); b.total != total || strconv.FormatInt(int64(b.sum), 10) != total {
			t.Errorf("%s has spent %s, and its ledger says %d; want %s", keyID, b.total, b.sum, total)
		}
		if s.client.TTL(t.Context(), s.key(keyID, "account")).Val() <= 0 {
			t.Errorf("the account of %s has no TTL", keyID)
		}
	}
	if aside := s.journal.countAside(); aside != 1 || s.degraded() {
		t.Errorf("%d are aside, degraded: %t", aside, s.degraded())
	}
}

// BenchmarkRedisSettle says beside the time of an entry what Redis computed for it.
func BenchmarkRedisSettle(b *testing.B) {
	server := startRedis(b, "--appendonly", "no")
	for _, keys := range []int{1, 16, settleBatch} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			s := openStill(b, redisModule(b, server.address))
			used := func() float64 {
				for line := range strings.Lines(server.client().Info(b.Context(), "cpu").Val()) {
					if value, ok := strings.CutPrefix(line, "used_cpu_user:"); ok {
						seconds, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
						if err != nil {
							b.Fatal(err)
						}
						return seconds
					}
				}
				b.Fatal("Redis does not say what it computed")
				return 0
			}
			before, n := used(), 0
			for b.Loop() {
				batch := make([]settlement, settleBatch)
				for i := range batch {
					e := Event{
						KeyID: fmt.Sprint("key", keys, "-", i%keys), RequestID: newRequestID(), Model: "openai/gpt-4o", Outcome: OutcomeCompleted,
						PromptTokens: 10, CompletionTokens: 20, Cost: 12_345, Time: time.Now(),
					}
					batch[i] = settlement{Kind: settleEvent, Event: e}
				}
				for _, f := range s.enter(batch) {
					if f != entered {
						b.Fatal("was not entered")
					}
				}
				n += len(batch)
			}
			b.ReportMetric((used()-before)*1e6/float64(n), "redis-µs/entry")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(n), "µs/entry")
		})
	}
}
