package mesh

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// clockOf has a store go by a clock of the test's.
func clockOf(now *atomic.Int64) func(*redisStore) {
	now.Store(time.Now().UnixNano())
	return func(s *redisStore) { s.now = func() time.Time { return time.Unix(0, now.Load()) } }
}

// loseAll has a Redis come back without anything it had.
func (r *redisServer) loseAll() {
	r.t.Helper()
	r.kill()
	if err := os.RemoveAll(filepath.Join(r.dir, "appendonlydir")); err != nil {
		r.t.Fatal(err)
	}
	r.start()
}

func TestWhatRedisConfirmedBeforeAnOutageOfADayIsNotSentAgain(t *testing.T) {
	for _, tc := range []struct {
		outage time.Duration
		again  bool
	}{
		{time.Minute, true}, {resendAge - time.Minute, true}, {resendAge + time.Minute, false},
	} {
		if known := 3*24*time.Hour - time.Hour; maxPending+resendAge > known { // REQUEST_TTL and CLOCKS of the scripts
			t.Errorf("Redis knows what it settled for %s only", known)
		}
		server := startRedis(t)
		var now atomic.Int64
		s := openStill(t, redisModule(t, server.address), clockOf(&now))
		want := make(map[string]Money)
		settleMany(s, 600, "key", want)
		s.work()
		expectBalance(t, s, "key", want)
		server.loseAll()
		now.Add(int64(tc.outage))
		if !tc.again {
			clear(want)
		}
		settleMany(s, 1, "key", want)
		s.work()
		expectBalance(t, s, "key", want)
	}
}

func TestWhatWasSentAgainMayBeLostAgain(t *testing.T) {
	server := startRedis(t)
	var now atomic.Int64
	s := openStill(t, redisModule(t, server.address), clockOf(&now))
	want := make(map[string]Money)
	settleMany(s, 300, "key", want)
	s.work()
	for range 3 {
		now.Add(int64(settledKept) - int64(time.Second))
		server.loseAll()
		settleMany(s, 1, "key", want)
		s.work()
		expectBalance(t, s, "key", want)
	}
}

func TestWhatIsSafeIsForgotten(t *testing.T) {
	server := startRedis(t)
	var now atomic.Int64
	s := openStill(t, redisModule(t, server.address), clockOf(&now))
	settleMany(s, 600, "key", map[string]Money{})
	s.work()
	now.Add(int64(resendWindow))
	s.work()
	if s.settled.count != 600 {
		t.Fatalf("%d are remembered, want 600", s.settled.count)
	}
	server.client().ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes")
	s.client.Ping(t.Context())        // notices
	now.Add(int64(2 * resendAge / 3)) // this process stood still
	s.work()
	if s.settled.count != 600 {
		t.Fatalf("%d are remembered after they were sent again, want 600", s.settled.count)
	}
	for range 10 { // connections that had ended as well were found since
		now.Add(int64(settledKept + time.Second))
		s.work()
	}
	if s.settled.count != 0 || s.settled.batches != nil {
		t.Errorf("%d are remembered for nothing", s.settled.count)
	}
}

func TestResendsAreRareWhereConnectionsEndAllTheTime(t *testing.T) {
	var r recentlySettled
	begin := time.Now()
	times := 0
	for now := begin; now.Sub(begin) < time.Hour; now = now.Add(100 * time.Millisecond) {
		if r.paced(now) {
			times++
		}
	}
	if times < 60 || times > 80 {
		t.Errorf("%d times in an hour", times)
	}
	if !r.paced(begin.Add(2*time.Hour)) || r.pause != firstResendPause {
		t.Errorf("after an hour of peace the next has to wait for %s", r.pause)
	}
}

func TestWhatAStoreCannotSendAgainBeforeItClosesIsInTheJournal(t *testing.T) {
	server := startRedis(t)
	module := redisModule(t, server.address)
	s := openStill(t, module)
	want := make(map[string]Money)
	settleMany(s, 100, "key", want)
	s.work()
	server.kill()
	s.breaker.trip("", errRedisDown) // a request found out first
	s.writeLast()
	if s.journal.count() != 100 {
		t.Errorf("%d are in the journal", s.journal.count())
	}
	server.loseAll()
	s = openRedis(t, module)
	settledAll(t, s)
	expectBalance(t, s, "key", want)
}
