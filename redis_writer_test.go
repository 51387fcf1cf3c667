package mesh

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/oklog/ulid/v2"
)

// openStill opens a store none of whose goroutines run: the test does what they would.
func openStill(t testing.TB, module *RedisStore, change ...func(*redisStore)) *redisStore {
	t.Helper()
	s := openRedis(t, module, change...)
	close(s.stop)
	s.keys.close()
	<-s.reaped
	<-s.written
	<-s.beaten
	t.Cleanup(func() {
		s.client.Close()
		s.journal.close() //nolint:errcheck // nothing is left to lose
	})
	return s
}

// work does what the writer does until there is nothing to do at once.
func (s *redisStore) work() {
	for s.writeSome() {
	}
}

func settleMany(s *redisStore, n int, keyID string, want map[string]Money) {
	for range n {
		id := newRequestID()
		want[id] = 3
		s.Settle(Event{RequestID: id, KeyID: keyID, Cost: 3})
	}
}

func (r *redisServer) signal(signal os.Signal) {
	r.t.Helper()
	if err := r.child.Signal(signal); err != nil {
		r.t.Error(err)
	}
}

// nodeOf returns the node of a Cluster that has a key's data.
func nodeOf(t *testing.T, nodes []*redisServer, s *redisStore, keyID string) *redisServer {
	t.Helper()
	slot := int(nodes[0].client().ClusterKeySlot(t.Context(), s.key(keyID, "account")).Val())
	for i := range nodes {
		if slot < (i+1)*16384/len(nodes) {
			return nodes[i]
		}
	}
	t.Fatalf("slot %d", slot)
	return nil
}

// TestOneShardThatIsDownDoesNotStopTheOthers takes one of three away, and has what waits for it survive the gateway.
func TestOneShardThatIsDownDoesNotStopTheOthers(t *testing.T) {
	for name, outage := range map[string]struct{ begin, end func(*redisServer) }{
		"killed": {(*redisServer).kill, (*redisServer).start},
		"frozen": {
			func(r *redisServer) { r.signal(syscall.SIGSTOP) },
			func(r *redisServer) { r.signal(syscall.SIGCONT) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := startCluster(t)
			module := redisModule(t, addresses(nodes)...)
			module.Timeout = caddy.Duration(300 * time.Millisecond)
			s := openRedis(t, module)
			down := nodeOf(t, nodes, s, "key0")
			const keys = 12
			wants := make([]map[string]Money, keys)
			for i := range keys {
				wants[i] = make(map[string]Money)
				settleMany(s, 10, fmt.Sprint("key", i), wants[i])
			}
			settledAll(t, s)
			outage.begin(down)
			for range 30 {
				for i := range keys {
					settleMany(s, 10, fmt.Sprint("key", i), wants[i])
				}
				time.Sleep(10 * time.Millisecond)
			}
			healthy := 0
			eventually(t, "the other shards have theirs", func() bool {
				healthy = 0
				for i := range keys {
					node := nodeOf(t, nodes, s, fmt.Sprint("key", i))
					if node == down {
						continue
					}
					healthy++
					if total := node.client().HGet(t.Context(), s.key(fmt.Sprint("key", i), "account"), "total").Val(); total != strconv.Itoa(310*3) {
						return false
					}
				}
				return true
			})
			if healthy == 0 || healthy == keys {
				t.Fatalf("%d of %d keys are on other shards", healthy, keys)
			}
			eventually(t, "what waits is in the journal", func() bool {
				s.queue.mu.Lock()
				defer s.queue.mu.Unlock()
				return len(s.queue.waiting) == 0 && s.journal.count() >= 300*(keys-healthy)
			})
			closeRedis(t, s)
			outage.end(down)
			s = openRedis(t, module)
			settledAll(t, s)
			for i := range keys {
				expectBalance(t, s, fmt.Sprint("key", i), wants[i])
			}
		})
	}
}

func TestOrderOfAKeyIsKeptThoughItsFirstEntryDidNotGoThrough(t *testing.T) {
	server := startRedis(t)
	s := openStill(t, redisModule(t, server.address))
	want := make(map[string]Money)
	var order []string
	for range 3 * settleBatch {
		id := newRequestID()
		order = append(order, id)
		want[id] = 1
		s.Settle(Event{RequestID: id, KeyID: "key", Cost: 1})
	}
	s.client.Close()
	s.work() // does not get through, and writes all to the journal
	again := func() {
		s.breaker.close()
		s.writer.paused = time.Time{}
		s.work()
	}
	again() // reads a page of it, does not get through, and holds the key
	if s.writer.held["key"].number == 0 || s.journal.count() != len(want) {
		t.Fatalf("held: %v", s.writer.held)
	}
	s.client = openStill(t, redisModule(t, server.address)).client
	for s.journal.count() > 0 {
		again()
	}
	expectBalance(t, s, "key", want)
	for i, m := range s.client.XRange(t.Context(), s.key("key", "ledger"), "-", "+").Val() {
		if got := decodeEvent(t, m.Values["event"].(string)).RequestID; got != order[i] {
			t.Fatalf("entry %d is %s, want %s", i, got, order[i])
		}
	}
}

// The node that is asked first has the script and finds something wrong with a key; the other does not know the script.
func TestWrongKeyIsNotTakenForARedisThatKnowsNoDigests(t *testing.T) {
	nodes := startCluster(t)
	s := openStill(t, redisModule(t, addresses(nodes)...))
	other := ""
	for i := 0; other == ""; i++ {
		if keyID := fmt.Sprint("key", i); nodeOf(t, nodes, s, keyID) != nodeOf(t, nodes, s, "wrong") {
			other = keyID
		}
	}
	settleNow(t, s, Event{RequestID: newRequestID(), KeyID: "wrong"})
	s.client.Set(t.Context(), s.key("wrong", "ledger"), "no stream", 0)
	fates := s.enter([]settlement{
		{Kind: settleEvent, Event: Event{RequestID: newRequestID(), KeyID: "wrong"}},
		{Kind: settleEvent, Event: Event{RequestID: newRequestID(), KeyID: other}},
	})
	if fates[0] != wasSetAside || fates[1] != entered || s.settles.noDigest.Load() {
		t.Errorf("fates %v, no digests: %t", fates, s.settles.noDigest.Load())
	}
}

func TestWhatCannotBeEnteredIsNotEnteredInPart(t *testing.T) {
	server := startRedis(t)
	s := openStill(t, redisModule(t, server.address))
	id := newRequestID()
	for _, name := range []string{"account", "done:" + dayOfRequest(id), "ledger", "usage:" + dayOfRequest(id), "session:s"} {
		s.client.FlushDB(t.Context())
		if err := s.client.Set(t.Context(), s.key("key", name), "of another type", 0).Err(); err != nil {
			t.Fatal(err)
		}
		fates := s.enter([]settlement{{Kind: settleEvent, Event: Event{RequestID: id, KeyID: "key", SessionID: "s", Cost: 1}}})
		if left := s.client.Keys(t.Context(), "mesh:{key}:*").Val(); fates[0] != wasSetAside || len(left) != 1 {
			t.Errorf("%s: fate %v, and there are %v", name, fates[0], left)
		}
	}
}

// idFrom is a request's id that says it began at some time.
func idFrom(began time.Time) string {
	return "req_" + ulid.MustNew(ulid.Timestamp(began), ulid.DefaultEntropy()).String()
}

// TestWhatRedisHasForgottenIsNotChargedTwice goes by the clock of a Redis that was away for more than it remembers.
func TestWhatRedisHasForgottenIsNotChargedTwice(t *testing.T) {
	server := startRedis(t)
	s := openStill(t, redisModule(t, server.address))
	began := at(t, "2026-11-24T10:00:00Z")
	for name, tc := range map[string]struct {
		before, after string // what happens before and after the outage: a kind, or "sent", or "pending"
		away          time.Duration
		want          Money // of 7, where an estimate is 5
		aside         int
	}{
		"entered before, answer lost":               {"settle", "sent", 4 * 24 * time.Hour, 7, 1},
		"entered before, answer lost, short outage": {"settle", "sent", time.Hour, 7, 0},
		"never sent":          {"", "settle", 4 * 24 * time.Hour, 7, 0},
		"sent, and not taken": {"pending", "sent", 4 * 24 * time.Hour, 7, 0},
		"sent, and not taken, and admitted without":     {"", "sent", 4 * 24 * time.Hour, 0, 1},
		"estimate, never sent":                          {"lost", "settle", 4 * 24 * time.Hour, 7, 0},
		"estimate, sent, and not taken":                 {"lost", "sent", 4 * 24 * time.Hour, 7, 0},
		"estimate, replaced before, answer lost":        {"lost settle", "sent", 4 * 24 * time.Hour, 7, 1},
		"entered before, answer lost, and sent in time": {"settle", "sent", 3*24*time.Hour - 2*time.Hour, 7, 0},
	} {
		t.Run(name, func(t *testing.T) {
			id, aside := idFrom(began), s.journal.countAside()
			s.redisClock(began)
			event := Event{RequestID: id, KeyID: name, Model: "m", Cost: 7}
			estimate := event
			estimate.Cost = 5
			admission := Admission{KeyID: name, RequestID: id, Pending: estimate}
			switch tc.before {
			case "settle":
				settleNow(t, s, event)
			case "pending":
				admitRedis(t, s, admission)
			case "lost", "lost settle":
				admitRedis(t, s, admission)
				enterNow(t, s, settlement{Kind: settleLost, Event: estimate})
			}
			if tc.before == "lost settle" {
				settleNow(t, s, event)
			}
			s.redisClock(began.Add(tc.away))
			if tc.away > 3*24*time.Hour {
				s.client.Del(t.Context(), s.key(name, "done:"+dayOfRequest(id)))
			}
			for range 2 {
				s.enter([]settlement{{Kind: settleEvent, Sent: tc.after == "sent", Event: event}})
				tc.after = "sent"
			}
			b := readRedis(t, s, name)
			if b.total != "" && b.total != strconv.Itoa(int(tc.want)) || b.total == "" && tc.want != 0 || b.sum != tc.want || b.pending != 0 {
				t.Errorf("want %d: %+v", tc.want, b)
			}
			if got := s.journal.countAside() - aside; min(got, 1) != tc.aside {
				t.Errorf("%d were set aside", got)
			}
		})
	}
}

// The outage begins while a settlement is on its way: Redis takes it, and nobody hears of that.
func TestAnswerThatIsLostInALongOutageDoublesNothing(t *testing.T) {
	server := startRedis(t)
	relay := startRelay(t, server.address)
	s := openStill(t, redisModule(t, relay.address()))
	began := at(t, "2026-11-24T10:00:00Z")
	s.redisClock(began)
	settleNow(t, s, Event{RequestID: idFrom(began), KeyID: "other"}) // the script is known
	id := idFrom(began)
	relay.hush()
	s.Settle(Event{RequestID: id, KeyID: "key", Cost: 7})
	s.work()
	if s.journal.count() != 1 {
		t.Fatalf("%d are in the journal", s.journal.count())
	}
	relay.speak()
	settled := server.client()
	eventually(t, "Redis takes it all the same", func() bool {
		return settled.HGet(t.Context(), s.key("key", "account"), "total").Val() == "7"
	})
	settled.Del(t.Context(), s.key("key", "done:"+dayOfRequest(id)))
	s.redisClock(began.Add(4 * 24 * time.Hour))
	eventually(t, "the journal is empty", func() bool {
		s.work()
		return s.journal.count() == 0
	})
	expectBalance(t, s, "key", map[string]Money{id: 7})
	if s.journal.countAside() != 1 {
		t.Error("is not set aside for somebody to look at")
	}
}

// The numbers that docs/store.md has of what an outage can lose, or leave for somebody to look at.
func TestWhatAnOutageCanCostIsAsPromised(t *testing.T) {
	if settleTimeout > time.Second || settleBatch > 256 {
		t.Errorf("a pipeline of %d may take %s", settleBatch, settleTimeout)
	}
	if resendWindow < 10*time.Second || settledKept < resendWindow+heartbeatInterval+settleTimeout || maxResent < 20_000 {
		t.Errorf("what Redis confirmed is kept for %s, or up to %d", settledKept, maxResent)
	}
}
