package mesh

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// lookupTimeout is that of the caches below, whose clock is the test's.
const lookupTimeout = 100 * time.Millisecond

// staleCache is a cache that knows a number of keys, all of which have to be looked up again.
func staleCache(t *testing.T, source *keyTable, known int) *keyCache {
	source.breaker = newBreaker("away", zap.NewNop())
	c := newKeyCache(source, lookupTimeout)
	for i := range known {
		source.set(secretNumber(i), &Key{Name: "known"})
		wantKey(t, c, secretNumber(i), "known")
	}
	c.changed(digest{}, true)
	source.lookups.Store(0)
	return c
}

// wantOutlived finds a key while the source cannot say, and checks that it is served if it was known before.
func wantOutlived(t *testing.T, c *keyCache, secret digest, known bool) {
	t.Helper()
	k, err := c.FindKey(t.Context(), secret)
	if known && (err != nil || k == nil || k.Name != "known") || !known && !errors.Is(err, errUnavailable) {
		t.Errorf("known %t: %v, %v", known, k, err)
	}
}

func TestSourceThatIsAwayIsNotAsked(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		source := &keyTable{refuse: refuse}
		c := staleCache(t, source, 100)
		source.breaker.trip("", errors.New("unreachable"))
		for i := range 200 { // half of them were never seen
			wantOutlived(t, c, secretNumber(i), i < 100 && !refuse)
		}
		c.changed(secretNumber(7), false) // what is named is not what was known
		wantOutlived(t, c, secretNumber(7), false)
		if n := source.lookups.Load(); n != 0 {
			t.Errorf("refuse %t: %d lookups", refuse, n)
		}
		source.breaker.close()
		source.set(secretNumber(1), &Key{Name: "changed"})
		wantKey(t, c, secretNumber(1), "changed")
		wantKey(t, c, secretNumber(7), "known")
		wantKey(t, c, secretNumber(150), "")
	}
}

func TestLookupCostsARequestNoMoreThanTheTimeout(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			source := &keyTable{refuse: refuse}
			c := staleCache(t, source, 100)
			source.before = func(digest) error { time.Sleep(10 * lookupTimeout); return nil } // longer than it was told to
			c.unknown.pace.next = time.Now().Add(maxDelay / 5)                                // as in a flood
			var requests sync.WaitGroup
			for i := range 300 { // those that lead a lookup, those that have to wait for a turn, and those that join
				requests.Go(func() {
					time.Sleep(time.Duration(i) * lookupTimeout / 1000)
					began := time.Now()
					wantOutlived(t, c, secretNumber(i%150), i%150 < 100 && !refuse)
					if waited := time.Since(began); waited > lookupTimeout {
						t.Errorf("refuse %t, request %d waited %s", refuse, i, waited)
					}
				})
			}
			requests.Wait()
			c.flying.Wait()
			if len(c.flights) > 0 {
				t.Errorf("%d lookups do not end", len(c.flights))
			}
		})
	}
}

func TestWhoWaitsForALookupStopsAsSoonAsTheSourceIsAway(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			source := &keyTable{refuse: refuse}
			c := staleCache(t, source, 100)
			source.before = func(digest) error { time.Sleep(lookupTimeout / 2); return errors.New("unreachable") }
			began := time.Now()
			var requests sync.WaitGroup
			for i := range 300 {
				requests.Go(func() { wantOutlived(t, c, secretNumber(i%150), i%150 < 100 && !refuse) })
			}
			synctest.Wait()
			source.breaker.trip("", errors.New("unreachable"))
			requests.Wait()
			if waited := time.Since(began); waited > 0 {
				t.Errorf("refuse %t: waited on for %s", refuse, waited)
			}
			c.flying.Wait()
			if n := source.lookups.Load(); n > keyTurns+firstTurns {
				t.Errorf("%d lookups, though there are only %d and %d turns", n, keyTurns, firstTurns)
			}
		})
	}
}

// TestOutageEndsWithoutARush has a thousand requests for a hundred keys come at the moment the source is back.
func TestOutageEndsWithoutARush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := new(keyTable)
		c := staleCache(t, source, 100)
		var now, most atomic.Int64
		source.before = func(digest) error {
			defer now.Add(-1)
			for n := now.Add(1); ; {
				if before := most.Load(); n <= before || most.CompareAndSwap(before, n) {
					break
				}
			}
			time.Sleep(time.Millisecond)
			return nil
		}
		source.breaker.trip("", errors.New("unreachable"))
		wantOutlived(t, c, secretNumber(0), true)
		source.breaker.close()
		var requests sync.WaitGroup
		for i := range 1000 {
			requests.Go(func() { wantKey(t, c, secretNumber(i%100), "known") })
		}
		requests.Wait()
		if n := source.lookups.Load(); n != 100 || most.Load() != keyTurns {
			t.Errorf("%d lookups of 100 keys, up to %d at a time; want 100, up to %d", n, most.Load(), keyTurns)
		}
	})
}
