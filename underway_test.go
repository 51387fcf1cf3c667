package mesh

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// crowd counts the requests that are at an upstream at the same time.
type crowd struct{ now, most, all atomic.Int64 }

func (c *crowd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := c.now.Add(1)
	for most := c.most.Load(); n > most && !c.most.CompareAndSwap(most, n); most = c.most.Load() {
	}
	c.all.Add(1)
	time.Sleep(20 * time.Millisecond)
	c.now.Add(-1)
	answers(200, "application/json", completion)(w, r)
}

// sharedSites runs two Caddys on one Redis, whose key has the options.
func sharedSites(t *testing.T, up *upstream, options string) []*gateway {
	server := startRedis(t)
	config := "http://$ADDRESS {\n" + strings.Replace(keyedSite(server, ""), "name tester", "name tester\n"+options, 1) + "\n}\n"
	return []*gateway{startProcess(t, up.address(), config).gateway(), startProcess(t, up.address(), config).gateway()}
}

// eachKindOfStore runs a test with one gateway on a local store, and with two on one Redis.
func eachKindOfStore(t *testing.T, up *upstream, options string, test func(t *testing.T, gateways []*gateway)) {
	t.Run("local", func(t *testing.T) {
		test(t, []*gateway{startGateway(t, up.address(), strings.Replace(site(""), "name tester", "name tester\n"+options, 1))})
	})
	t.Run("two on one Redis", func(t *testing.T) { test(t, sharedSites(t, up, options)) })
}

func TestNoMoreRequestsAreUnderWayThanTheKeyMayHave(t *testing.T) {
	c := new(crowd)
	up := startUpstream(t, c.ServeHTTP)
	eachKindOfStore(t, up, "max_concurrency 10", func(t *testing.T, gateways []*gateway) {
		c.most.Store(0)
		before := c.all.Load()
		var mu sync.Mutex
		got := make(map[int]int64)
		var clients sync.WaitGroup
		for i := range 200 {
			clients.Go(func() {
				r := gateways[i%len(gateways)].post(chatBody)
				mu.Lock()
				defer mu.Unlock()
				got[r.StatusCode]++
				if r.StatusCode == 429 && (r.Header.Get("Retry-After") != "1" || !strings.Contains(string(r.body), "10 requests at the same time")) {
					t.Errorf("%v %s", r.Header, r.body)
				}
			})
		}
		clients.Wait()
		t.Logf("%v, at most %d at a time", got, c.most.Load())
		if most := c.most.Load(); most > 10 || most < 2 {
			t.Errorf("%d requests were under way at the same time", most)
		}
		if got[200]+got[429] != 200 || got[200] < 10 || c.all.Load()-before != got[200] {
			t.Errorf("%v, and the upstream had %d", got, c.all.Load()-before)
		}
	})
}

func TestClientThatSendsOneRequestAfterAnotherIsNeverTooMany(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	eachKindOfStore(t, up, "max_concurrency 1", func(t *testing.T, gateways []*gateway) {
		for i := range 500 {
			if r := gateways[i%len(gateways)].post(chatBody); r.StatusCode != 200 {
				t.Fatalf("request %d: %s %s", i, r.Status, r.body)
			}
		}
	})
}

func TestRequestForWhichNoTurnComesIsRefused(t *testing.T) {
	hold := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		<-hold
		answers(200, "application/json", completion)(w, r)
	})
	g := startGateway(t, up.address(), strings.Replace(site(""), "name tester", "max_concurrency 1", 1))
	first := make(chan *reply)
	go func() { first <- g.post(chatBody) }()
	eventually(t, "the first is under way", func() bool { return len(up.received()) == 1 })
	if r := g.post(streamBody); r.StatusCode != 429 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	close(hold)
	if r := <-first; r.StatusCode != 200 {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestTokensOfTheMinuteAreLimited(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion)) // 1200 tokens
	eachKindOfStore(t, up, "tpm 2000", func(t *testing.T, gateways []*gateway) {
		awayFromMinuteEnd(t)
		var r *reply
		admitted := 0
		eventually(t, "the limit is reached", func() bool {
			r = gateways[admitted%len(gateways)].post(chatBody)
			if r.StatusCode == 200 {
				admitted++
			}
			time.Sleep(200 * time.Millisecond) // until the tokens have been counted
			return r.StatusCode == 429
		})
		if admitted < 2 || !strings.Contains(string(r.body), "Rate limit reached: 2000 tokens per minute. Try again in ") {
			t.Errorf("after %d: %s", admitted, r.body)
		}
		t.Logf("after %d: %s", admitted, r.body)
		for name, want := range map[string]string{
			"RateLimit-Policy":             `"tpm";q=2000;w=60`,
			"X-Ratelimit-Limit-Tokens":     "2000",
			"X-Ratelimit-Remaining-Tokens": "0",
			"X-Ratelimit-Limit-Requests":   "",
		} {
			if got := r.Header.Get(name); got != want {
				t.Errorf("%s %q, want %q", name, got, want)
			}
		}
		if after := r.Header.Get("Retry-After"); after == "" || r.Header.Get("X-Ratelimit-Reset-Tokens") != after+"s" ||
			r.Header.Get("RateLimit") != `"tpm";r=0;t=`+after {
			t.Errorf("%v", r.Header)
		}
	})
}

func TestRequestThatHasEndedIsNotCountedWhileItsSettlementIsOnItsWay(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	limits := Limits{MaxConcurrency: 1}
	ask := func(i int) Limit {
		return admitRedis(t, s, Admission{KeyID: "key", RequestID: requestID(i), Limits: limits}).Refused
	}
	if refused := ask(1); refused != "" {
		t.Fatal(refused)
	}
	if refused := ask(2); refused != LimitConcurrency {
		t.Fatalf("the second was refused by %q", refused)
	}
	account := s.accounts.of("key")
	account.mu.Lock()
	account.settle(&Event{RequestID: requestID(1)}) // and nothing is sent
	account.mu.Unlock()
	if refused := ask(2); refused != "" {
		t.Fatalf("after the first had ended: %q", refused)
	}
	if refused := ask(3); refused != LimitConcurrency {
		t.Fatalf("the third was refused by %q", refused)
	}
	s.Settle(Event{RequestID: requestID(1), KeyID: "key"})
	s.Settle(Event{RequestID: requestID(2), KeyID: "key"})
	settledAll(t, s)
	account.mu.Lock()
	defer account.mu.Unlock()
	if len(account.underWay.ended) != 0 || len(account.underWay.requests) != 0 {
		t.Errorf("%+v", account.underWay)
	}
}

func TestWithoutRedisTheInstanceCountsWhatItHasUnderWay(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	admission := func(i int) Admission {
		return Admission{KeyID: "key", RequestID: requestID(i), Limits: Limits{MaxConcurrency: 2}}
	}
	if v := admitRedis(t, s, admission(1)); v.Refused != "" {
		t.Fatal(v.Refused)
	}
	server.kill()
	s.breaker.trip("", io.EOF)
	ask := func(i int) Limit {
		v, err := s.Admit(t.Context(), admission(i))
		if err != nil {
			t.Fatal(err)
		}
		return v.Refused
	}
	if refused := ask(2); refused != "" {
		t.Errorf("the second: %q", refused)
	}
	if refused := ask(3); refused != LimitConcurrency {
		t.Errorf("the third: %q", refused)
	}
	s.Settle(Event{RequestID: requestID(1), KeyID: "key"})
	if refused := ask(3); refused != "" {
		t.Errorf("after one has ended: %q", refused)
	}
	server.start()
	eventuallyIn(t, time.Minute, "Redis is back", func() bool { return !s.degraded() && s.journal.count() == 0 })
	settledAll(t, s)
	// the two that were let through without Redis are under way still
	if v := admitRedis(t, s, admission(4)); v.Refused != LimitConcurrency {
		t.Errorf("after the outage: %q", v.Refused)
	}
}

func TestRequestsOfADeadGatewayMakeRoom(t *testing.T) {
	server := startRedis(t)
	dying, s := openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.address))
	admission := func(i int) Admission {
		return Admission{KeyID: "key", RequestID: requestID(i), Limits: Limits{MaxConcurrency: 1}, Pending: Event{Model: "m"}}
	}
	if v := admitRedis(t, dying, admission(1)); v.Refused != "" {
		t.Fatal(v.Refused)
	}
	if v := admitRedis(t, s, admission(2)); v.Refused != LimitConcurrency {
		t.Fatalf("refused by %q", v.Refused)
	}
	closeRedis(t, dying)
	eventually(t, "the request is given up", func() bool {
		s.client.Del(t.Context(), "mesh:reaper")
		if err := s.reapAll(t.Context(), map[string]time.Time{dying.instance: time.Now().Add(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		return admitRedis(t, s, admission(2)).Refused == ""
	})
}

// crowded is a store in which there is never room.
type crowded struct {
	asked int
	void  bool
}

func (c *crowded) Admit(context.Context, Admission) (Verdict, error) {
	c.asked++
	return Verdict{Refused: LimitConcurrency, void: c.void}, nil
}

func (*crowded) Spent(context.Context, string, Period) (Money, error) { return 0, nil }

func (*crowded) Settle(Event)         {}
func (*crowded) Leave(string, string) {}
func (*crowded) Destruct() error      { return nil }

func TestClientThatLeavesWaitsForNoTurn(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	x := &exchange{h: &Handler{asks: collectors.ofStore("local")}, r: httptest.NewRequestWithContext(ctx, http.MethodPost, chatPath, nil)}
	store := new(crowded)
	if v, err := x.askStore(store, Admission{}); v.Refused != LimitConcurrency || err != nil || store.asked < 3 {
		t.Errorf("%+v, %v after %d times", v, err, store.asked)
	}
	leave()
	store.asked = 0
	if _, err := x.askStore(store, Admission{}); err != nil || store.asked > 2 {
		t.Errorf("%v after %d times", err, store.asked)
	}
}

// TestRequestThatRedisMayHaveCountedIsNotAskedForAgain because that was undone, and once undone it could not be counted.
func TestRequestThatRedisMayHaveCountedIsNotAskedForAgain(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	admission := func(i int) Admission {
		return Admission{KeyID: "key", RequestID: requestID(i), Limits: Limits{MaxConcurrency: 1}}
	}
	admitRedis(t, s, admission(1))
	v, err := s.admitUnanswered(admission(2), context.DeadlineExceeded)
	if err != nil || v.Refused != LimitConcurrency || !v.void {
		t.Errorf("%+v, %v", v, err)
	}
	x := &exchange{h: &Handler{asks: collectors.ofStore("local")}, r: httptest.NewRequest(http.MethodPost, chatPath, nil)}
	store := &crowded{void: true}
	if x.askStore(store, Admission{}); store.asked != 1 {
		t.Errorf("asked %d times", store.asked)
	}
}
