package mesh

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// openReaper opens a store that reaps when the test has it do so. It shows no sign of life, as if its process had died.
func openReaper(t *testing.T, server *redisServer, change ...func(*redisStore)) *redisStore {
	t.Helper()
	s := openStill(t, redisModule(t, server.address), change...)
	s.stop = make(chan struct{}) // a store that stops does not reap
	t.Cleanup(func() { close(s.stop) })
	return s
}

func TestRequestsOfAGatewayThatDiedAreChargedByEstimate(t *testing.T) {
	server := startRedis(t)
	dying, s := openReaper(t, server), openReaper(t, server)
	limits := Limits{SpendCap: 1 << 40, Hard: true}
	lost, settled, alive := newRequestID(), newRequestID(), newRequestID()
	estimate := Event{Model: "m", SessionID: "s", PromptTokens: 5, Cost: 40, MaxCost: 90, KeyName: "team-a"}
	for _, id := range []string{lost, settled} {
		admitRedis(t, dying, Admission{KeyID: "key", RequestID: id, Limits: limits, MaxCost: 100, Pending: estimate})
	}
	dying.Settle(Event{RequestID: settled, KeyID: "key", Cost: 7})
	dying.work()
	dying.tellKeys()
	admitRedis(t, s, Admission{KeyID: "key", RequestID: alive, Limits: limits, MaxCost: 100, Pending: estimate})

	dead := make(map[string]time.Time)
	reap := func() {
		t.Helper()
		if err := s.reapAll(t.Context(), dead); err != nil {
			t.Fatal(err)
		}
	}
	reap()
	if b := readRedis(t, s, "key"); b.pending != 2 || len(dead) != 1 {
		t.Fatalf("had no time to show up: %+v, %v", b, dead)
	}
	dead[dying.instance] = time.Now().Add(-2 * lease)
	reap()
	reap()
	b := readRedis(t, s, "key")
	e := b.ids[lost]
	if b.pending != 1 || b.entries != 2 || b.total != "47" || b.reserved != "100" {
		t.Errorf("%+v", b)
	}
	if e.Cost != 40 || e.MaxCost != 90 || e.Outcome != OutcomeLost || !e.Estimated || e.KeyName != "team-a" || e.PromptTokens != 5 || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	s.Settle(Event{RequestID: alive, KeyID: "key", Cost: 3})
	s.Settle(Event{RequestID: lost, KeyID: "key", Cost: 11}) // it had only been away
	s.work()
	expectBalance(t, s, "key", map[string]Money{lost: 11, settled: 7, alive: 3})
}

func TestRequestThatIsNeverSettledIsReapedAfterADay(t *testing.T) {
	s := openReaper(t, startRedis(t))
	old := "req_" + ulid.MustNew(ulid.Timestamp(time.Now().Add(-27*time.Hour)), ulid.DefaultEntropy()).String()
	fresh := newRequestID()
	for _, id := range []string{old, fresh} {
		admitRedis(t, s, Admission{KeyID: "key", RequestID: id, Pending: Event{Cost: 5}})
	}
	s.tellKeys()
	if err := s.reapAll(t.Context(), make(map[string]time.Time)); err != nil {
		t.Fatal(err)
	}
	b := readRedis(t, s, "key")
	if _, ok := b.ids[old]; !ok || b.entries != 1 || b.pending != 1 {
		t.Errorf("%+v", b)
	}
}

func TestGatewayThatShowsItselfAgainIsAlive(t *testing.T) {
	server := startRedis(t)
	away, s := openReaper(t, server), openReaper(t, server)
	admitRedis(t, away, Admission{KeyID: "key", RequestID: newRequestID()})
	away.tellKeys()
	gone := "mesh:instance:" + away.instance
	dead := make(map[string]time.Time)
	for _, step := range []struct {
		shows   bool
		known   time.Duration // that it has been known to be gone; 0: not
		pending int64
	}{
		{false, 0, 1},
		{false, lease / 2, 1},
		{true, 2 * lease, 1}, // in the last moment
		{false, 0, 1},        // it has all its time again
		{false, 2 * lease, 0},
	} {
		if since, known := dead[away.instance]; known != (step.known > 0) {
			t.Fatalf("%+v: dead since %s", step, since)
		}
		if step.known > 0 {
			dead[away.instance] = time.Now().Add(-step.known)
		}
		if step.shows {
			s.client.Set(t.Context(), gone, "1", 0)
		} else {
			s.client.Del(t.Context(), gone)
		}
		if err := s.reapAll(t.Context(), dead); err != nil {
			t.Fatal(err)
		}
		if b := readRedis(t, s, "key"); b.pending != step.pending {
			t.Errorf("%+v: %d are pending", step, b.pending)
		}
	}
}

func TestWhatIsDamagedDoesNotStopTheReaper(t *testing.T) {
	server := startRedis(t)
	logs, logged := observer.New(zap.ErrorLevel)
	s := openReaper(t, server, func(s *redisStore) { s.logger = zap.New(logs) })
	old := func() string {
		return "req_" + ulid.MustNew(ulid.Timestamp(time.Now().Add(-27*time.Hour)), ulid.DefaultEntropy()).String()
	}
	ctx := t.Context()
	const keys = 20 // in no order: some come before those that are damaged, some after
	var keyIDs []string
	for i := range keys {
		keyIDs = append(keyIDs, fmt.Sprint("key", i))
		admitRedis(t, s, Admission{KeyID: keyIDs[i], RequestID: old(), Pending: Event{Cost: 5}})
	}
	hard := Limits{SpendCap: 1 << 40, Hard: true}
	torn := old()
	admitRedis(t, s, Admission{KeyID: "key7", RequestID: torn, Limits: hard, MaxCost: 60})
	whole := s.client.HGet(ctx, s.key("key7", "pending"), torn).Val()
	s.client.HSet(ctx, s.key("key7", "pending"), torn, whole[:len(whole)-1], "req_nonsense", "nonsense", "req_none", "")
	s.client.Set(ctx, s.key("wrong", "pending"), "no hash", 0)
	s.client.SAdd(ctx, "mesh:keyids", "wrong")
	s.client.Set(ctx, s.key("key9", "usage:"+dayOfRequest(old())), "no hash either", 0)

	s.tellKeys()
	dead := make(map[string]time.Time)
	err := s.reapAll(ctx, dead)
	if err == nil || !strings.Contains(err.Error(), "WRONGTYPE") || !strings.Contains(err.Error(), "1 other key") {
		t.Errorf("%v", err)
	}
	for i, keyID := range keyIDs {
		if b := readRedis(t, s, keyID); i != 9 && (b.pending != 0 || b.entries != 1 || b.total != "5") {
			t.Errorf("%s: %+v", keyID, b)
		}
	}
	if b := readRedis(t, s, "key7"); b.reserved != "0" {
		t.Errorf("%s stay reserved for what is damaged", b.reserved)
	}
	if b := readRedis(t, s, "key9"); b.pending != 1 || b.entries != 0 || b.total != "" {
		t.Errorf("what could not be entered was entered in part: %+v", b)
	}
	const damaged = "damaged pending entry, deleted; if the request's gateway died, nothing was charged for it"
	entries := make(map[string]bool)
	for _, line := range logged.FilterMessage(damaged).All() {
		entries[line.ContextMap()["entry"].(string)] = true
	}
	if len(entries) != 3 || !entries["nonsense"] || !entries[whole[:len(whole)-1]] {
		t.Errorf("logged: %v", entries)
	}
	s.reapAll(ctx, dead) //nolint:errcheck // the same
	if n := logged.FilterMessage(damaged).Len(); n != 3 {
		t.Errorf("%d damaged entries logged: they came again", n)
	}
	s.Settle(Event{RequestID: torn, KeyID: "key7", Cost: 2}) // its gateway lives
	s.work()
	if b := readRedis(t, s, "key7"); b.total != "7" || b.ids[torn].Cost != 2 {
		t.Errorf("%+v", b)
	}
}

// What docs/store.md promises of a gateway that dies follows from these.
func TestLostRequestIsChargedAsSoonAsIsPromised(t *testing.T) {
	const promised, aRound = 45 * time.Second, 5 * time.Second
	longest := reapInterval/2 + reapInterval // between two rounds
	for range 1000 {
		if pause := around(reapInterval); pause > longest || pause < reapInterval/2 {
			t.Fatalf("a pause of %s", pause)
		}
	}
	if reapTurn <= longest {
		t.Errorf("a turn of %s is over before the next round, up to %s later", reapTurn, longest)
	}
	// It seems alive for a lease, and if it was its turn, nobody else reaps until that is over. The next round sees that it
	// is gone; the first that comes a lease later charges.
	seen := max(lease, reapTurn) + longest
	charged := seen + lease + longest
	if charged+aRound > promised {
		t.Errorf("charged after %s and the time of a round", charged)
	}
	if 3*heartbeatInterval > lease {
		t.Error("two heartbeats that come late end a lease")
	}
}

func TestOneReaperAtATime(t *testing.T) {
	server := startRedis(t)
	first, second := openReaper(t, server), openReaper(t, server)
	dead := make(map[string]time.Time)
	old := "req_" + ulid.MustNew(ulid.Timestamp(time.Now().Add(-27*time.Hour)), ulid.DefaultEntropy()).String()
	if err := first.reapAll(t.Context(), dead); err != nil {
		t.Fatal(err)
	}
	if ttl := first.client.PTTL(t.Context(), "mesh:reaper").Val(); ttl <= 0 || ttl > reapTurn {
		t.Errorf("its turn is over in %s", ttl)
	}
	first.client.Persist(t.Context(), "mesh:reaper") // however slow the test is
	admitRedis(t, first, Admission{KeyID: "key", RequestID: old})
	first.tellKeys()
	if err := second.reapAll(t.Context(), dead); err != nil {
		t.Fatal(err)
	}
	if b := readRedis(t, first, "key"); b.entries != 0 {
		t.Error("the second reaped in the first one's time")
	}
	if err := first.reapAll(t.Context(), dead); err != nil {
		t.Fatal(err)
	}
	if b := readRedis(t, first, "key"); b.entries != 1 {
		t.Error("the first did not go on")
	}
}
