package mesh

import (
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCompareTakesOnePlaceUntilItsEnd stops a compare while its models answer, and again while one compares. What must be
// refused is what the upstream would answer at once.
func TestCompareTakesOnePlaceUntilItsEnd(t *testing.T) {
	release := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); !strings.Contains(string(body), `"model":"first`) {
			<-release
		}
		answers(200, "application/json", completion)(w, r)
	})
	t.Cleanup(func() { close(release) }) // before the upstream is closed, which waits for its requests
	eachKindOfStore(t, up, "max_concurrency 1", func(t *testing.T, gateways []*gateway) {
		other := gateways[len(gateways)-1]
		isTaken := func(when string) {
			t.Helper()
			if r := other.post(ask("test/first", "")); r.StatusCode != 429 {
				t.Errorf("%s, a completion: %s %s", when, r.Status, r.body)
			}
			if r := other.compare(compareBody(`"test/first","test/first2"`, `,"skip_comparison":true`)); r.StatusCode != 429 {
				t.Errorf("%s, another compare: %s %s", when, r.Status, r.body)
			}
			if n := underWayOf(t, other); n != 1 {
				t.Errorf("%s, %d requests are under way", when, n)
			}
		}
		before := len(up.received())
		answered := make(chan *reply, 1)
		go func() {
			answered <- gateways[0].compare(compareBody(`"test/first","test/b","test/c"`, `,"comparison_model":"test/judge"`))
		}()
		eventually(t, "the models are asked", func() bool { return len(up.received()) >= before+3 })
		eventually(t, "the first model's answer is in the ledger", func() bool { return ledgerHas(t, gateways[0], "test/first") })
		isTaken("while two models answer")
		release <- struct{}{}
		release <- struct{}{}
		eventually(t, "the answers are compared", func() bool { return len(up.received()) >= before+4 })
		isTaken("while the answers are compared")
		release <- struct{}{}
		c := (<-answered).comparison(t)
		if c.Partial || c.Comparison == nil {
			t.Errorf("%+v", c.compareSummary)
		}
		eventually(t, "nothing is under way", func() bool { return underWayOf(t, other) == 0 })
		if r := other.post(ask("test/first", "")); r.StatusCode != 200 {
			t.Errorf("afterwards: %s %s", r.Status, r.body)
		}
	})
}

// underWayOf returns how many requests of the key are under way, as the API says.
func underWayOf(t *testing.T, g *gateway) int64 {
	t.Helper()
	r := g.do(http.MethodGet, standingPath, "")
	key, _ := r.decode(t)["key"].(map[string]any)
	metric, _ := key["max_concurrency"].(map[string]any)
	current, ok := metric["current"].(float64)
	if !ok {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	return int64(current)
}

// ledgerHas reports whether the ledger has a request of the model, as the API says.
func ledgerHas(t *testing.T, g *gateway, model string) bool {
	t.Helper()
	r := g.do(http.MethodPost, eventsPath, `{"model":"`+model+`"}`)
	total, ok := r.decode(t)["total"].(float64)
	if !ok {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	return total > 0
}

func TestPartsOfARequestTakeNoPlace(t *testing.T) {
	test := func(t *testing.T, s Store) {
		limits := Limits{MaxConcurrency: 2}
		for i, tc := range []struct {
			asked Admission
			want  Limit
		}{
			{Admission{Limits: limits, Keeps: true}, ""},
			{Admission{Uncounted: true}, ""},
			{Admission{Uncounted: true}, ""},
			{Admission{Limits: limits}, ""},
			{Admission{Limits: limits}, LimitConcurrency},
			{Admission{Uncounted: true}, ""},
		} {
			if refused := placeFor(t, s, requestID(i), tc.asked); refused != tc.want {
				t.Errorf("%d, %+v: %q", i, tc.asked, refused)
			}
		}
	}
	t.Run("local", func(t *testing.T) { test(t, openLocal(t, filepath.Join(t.TempDir(), "mesh.db"))) })
	t.Run("redis", func(t *testing.T) { test(t, openRedis(t, redisModule(t, startRedis(t).address))) })
}

// placeFor asks for a request to be let through, and returns which limit refuses it.
func placeFor(t *testing.T, s Store, id string, more Admission) Limit {
	t.Helper()
	more.KeyID, more.RequestID = "key", id
	v, err := s.Admit(t.Context(), more)
	if err != nil {
		t.Fatal(err)
	}
	return v.Refused
}

func TestPlaceThatIsKeptIsFreeWhenItsGatewayHasDied(t *testing.T) {
	server := startRedis(t)
	dying, s := openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))
	limits := Limits{MaxConcurrency: 1}
	first := requestID(1)
	if refused := placeFor(t, dying, first, Admission{Limits: limits, Keeps: true, Pending: Event{Model: "m", Cost: 7}}); refused != "" {
		t.Fatal(refused)
	}
	if refused := placeFor(t, dying, requestID(2), Admission{Uncounted: true, Pending: Event{Model: "m", Cost: 5}}); refused != "" {
		t.Fatalf("a part was refused by %q", refused)
	}
	dying.Settle(Event{KeyID: "key", RequestID: first, Model: "m", Cost: 3})
	settledAll(t, dying)
	if refused := placeFor(t, s, requestID(3), Admission{Limits: limits}); refused != LimitConcurrency {
		t.Errorf("beside one that is kept: %q", refused)
	}
	closeRedis(t, dying)
	eventually(t, "the place is given up", func() bool {
		s.client.Del(t.Context(), "mesh:reaper")
		if err := s.reapAll(t.Context(), map[string]time.Time{dying.instance: time.Now().Add(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		return placeFor(t, s, requestID(3), Admission{Limits: limits}) == ""
	})
	b := readRedis(t, s, "key")
	if b.ids[first].Cost != 3 || b.ids[requestID(2)].Cost != 5 || b.total != "8" || b.entries != 2 {
		t.Errorf("%+v", b)
	}
	if parts := s.client.HLen(t.Context(), s.key("key", "parts")).Val(); parts != 0 || b.pending != 1 {
		t.Errorf("%d are pending, and %d parts", b.pending, parts)
	}
}

func TestWithoutRedisACompareTakesOnePlaceToo(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	limits := Limits{MaxConcurrency: 1}
	begun, later := requestID(1), requestID(2)
	if refused := placeFor(t, s, begun, Admission{Limits: limits, Keeps: true}); refused != "" {
		t.Fatal(refused)
	}
	server.kill()
	s.breaker.trip("", io.EOF)
	if refused := placeFor(t, s, requestID(3), Admission{Uncounted: true}); refused != "" {
		t.Errorf("a part of what has begun with Redis: %q", refused)
	}
	s.Settle(Event{KeyID: "key", RequestID: begun})
	if refused := placeFor(t, s, later, Admission{Limits: limits, Keeps: true}); refused != LimitConcurrency {
		t.Errorf("beside what has begun with Redis: %q", refused)
	}
	s.Leave("key", begun)
	if refused := placeFor(t, s, later, Admission{Limits: limits, Keeps: true}); refused != "" {
		t.Errorf("after it: %q", refused)
	}
	s.Settle(Event{KeyID: "key", RequestID: later})
	server.start()
	eventuallyIn(t, time.Minute, "Redis is back", func() bool { return !s.degraded() && s.journal.count() == 0 })
	settledAll(t, s)
	admitRedis(t, s, Admission{KeyID: "another"})
	if refused := placeFor(t, s, requestID(4), Admission{Limits: limits}); refused != LimitConcurrency {
		t.Errorf("beside what has begun without Redis: %q", refused)
	}
	s.Leave("key", later)
	if refused := placeFor(t, s, requestID(4), Admission{Limits: limits}); refused != "" {
		t.Errorf("after that: %q", refused)
	}
	s.Settle(Event{KeyID: "key", RequestID: requestID(3)})
	settledAll(t, s)
	if b := readRedis(t, s, "key"); b.pending != 1 {
		t.Errorf("%d are pending", b.pending)
	}
}
