package mesh

import (
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
)

// abandon has a store's process die: it settles and shows no sign of life any more.
func abandon(t *testing.T, s *redisStore) {
	t.Helper()
	close(s.stop)
	<-s.reaped
	<-s.written
	<-s.beaten
	s.client.Close()
	if err := s.journal.close(); err != nil {
		t.Error(err)
	}
}

func TestRequestsOfAGatewayThatDiedAreChargedByEstimate(t *testing.T) {
	server := startRedis(t)
	dying := openRedis(t, redisModule(t, server.address))
	s := openRedis(t, redisModule(t, server.address))
	limits := Limits{SpendCap: 1 << 40, Hard: true}
	lost, settled, alive := newRequestID(), newRequestID(), newRequestID()
	estimate := Event{Model: "m", SessionID: "s", PromptTokens: 5, Cost: 40, KeyName: "team-a"}
	for _, id := range []string{lost, settled} {
		admitRedis(t, dying, Admission{KeyID: "key", RequestID: id, Limits: limits, MaxCost: 100, Pending: estimate})
	}
	dying.Settle(Event{RequestID: settled, KeyID: "key", Cost: 7})
	settledAll(t, dying)
	eventually(t, "the key is registered", func() bool { return s.client.SIsMember(t.Context(), "mesh:keyids", "key").Val() })
	admitRedis(t, s, Admission{KeyID: "key", RequestID: alive, Limits: limits, MaxCost: 100, Pending: estimate})

	abandon(t, dying)
	if err := s.client.Del(t.Context(), "mesh:instance:"+dying.instance).Err(); err != nil { // its lease runs out
		t.Fatal(err)
	}
	dead := make(map[string]time.Time)
	reap := func() {
		t.Helper()
		s.client.Del(t.Context(), "mesh:reaper")
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
	if e.Cost != 40 || e.Outcome != OutcomeLost || !e.Estimated || e.KeyName != "team-a" || e.PromptTokens != 5 || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	s.Settle(Event{RequestID: alive, KeyID: "key", Cost: 3})
	s.Settle(Event{RequestID: lost, KeyID: "key", Cost: 11}) // it had only been away
	settledAll(t, s)
	expectBalance(t, s, "key", map[string]Money{lost: 11, settled: 7, alive: 3})
}

func TestRequestThatIsNeverSettledIsReapedAfterADay(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	old := "req_" + ulid.MustNew(ulid.Timestamp(time.Now().Add(-27*time.Hour)), ulid.DefaultEntropy()).String()
	fresh := newRequestID()
	for _, id := range []string{old, fresh} {
		admitRedis(t, s, Admission{KeyID: "key", RequestID: id, Pending: Event{Cost: 5}})
	}
	eventually(t, "the key is registered", func() bool { return s.client.SIsMember(t.Context(), "mesh:keyids", "key").Val() })
	if err := s.reapAll(t.Context(), map[string]time.Time{}); err != nil {
		t.Fatal(err)
	}
	b := readRedis(t, s, "key")
	if _, ok := b.ids[old]; !ok || b.entries != 1 || b.pending != 1 {
		t.Errorf("%+v", b)
	}
}

func TestOneReaperAtATime(t *testing.T) {
	server := startRedis(t)
	first, second := openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))
	old := "req_" + ulid.MustNew(ulid.Timestamp(time.Now().Add(-27*time.Hour)), ulid.DefaultEntropy()).String()
	if err := first.reapAll(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	admitRedis(t, first, Admission{KeyID: "key", RequestID: old})
	eventually(t, "the key is registered", func() bool { return first.client.SIsMember(t.Context(), "mesh:keyids", "key").Val() })
	if err := second.reapAll(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if b := readRedis(t, first, "key"); b.entries != 0 {
		t.Error("the second reaped in the first one's time")
	}
}
