package mesh

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// keyTable is a source of keys in memory. The test is told of each lookup, and may hold it back or let it fail.
type keyTable struct {
	refuse  bool     // on_failure
	breaker *breaker // nil where there never is an outage
	before  func(secret digest) error
	lookups atomic.Int64

	mu   sync.Mutex
	keys map[digest]*Key
}

func (s *keyTable) set(secret digest, k *Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = make(map[digest]*Key)
	}
	s.keys[secret] = k
}

func (s *keyTable) LookUpKey(ctx context.Context, secret digest) (*Key, error) {
	s.lookups.Add(1)
	s.mu.Lock()
	k := s.keys[secret]
	s.mu.Unlock()
	if s.before != nil {
		if err := s.before(secret); err != nil {
			return nil, err
		}
	}
	return k, ctx.Err()
}

func (s *keyTable) WatchKeys(func(digest, bool)) (stop func()) { return func() {} }

func (s *keyTable) Away() <-chan struct{} {
	if s.breaker == nil {
		return nil
	}
	return s.breaker.opened()
}

func (s *keyTable) KeysOutliveOutage() bool { return !s.refuse }

// secretNumber is the digest of one of any number of secrets.
func secretNumber(i int) digest {
	return sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(i)))
}

// wantKey finds a key by its secret and checks its name; "" stands for no key.
func wantKey(t testing.TB, c *keyCache, secret digest, name string) {
	t.Helper()
	k, err := c.FindKey(t.Context(), secret)
	switch {
	case err != nil:
		t.Errorf("%v, want key %q", err, name)
	case k == nil && name != "":
		t.Errorf("no key, want %q", name)
	case k != nil && k.Name != name:
		t.Errorf("key %q, want %q", k.Name, name)
	}
}

func TestManyWhoWantOneKeyLookItUpOnce(t *testing.T) {
	source := new(keyTable)
	source.set(secretNumber(1), &Key{Name: "one"})
	c := newKeyCache(source, time.Minute)
	release := make(chan struct{})
	source.before = func(digest) error { <-release; return nil }
	var ready, found sync.WaitGroup
	for i := range 1000 {
		ready.Add(1)
		found.Go(func() {
			ready.Done()
			wantKey(t, c, secretNumber(1), "one")
			wantKey(t, c, secretNumber(2+i%2), "")
		})
	}
	ready.Wait()
	close(release)
	found.Wait()
	if n := source.lookups.Load(); n != 3 {
		t.Errorf("%d lookups of 3 digests", n)
	}
}

func TestWhatWasLookedUpBeforeAChangeIsNotKept(t *testing.T) {
	for _, all := range []bool{false, true} {
		source, secret := new(keyTable), secretNumber(1)
		source.set(secret, &Key{Name: "before"})
		c := newKeyCache(source, time.Minute)
		started, release := make(chan struct{}, 10), make(chan struct{})
		var first atomic.Bool
		source.before = func(digest) error {
			if first.CompareAndSwap(false, true) {
				started <- struct{}{}
				<-release
			}
			return nil
		}
		var early sync.WaitGroup
		early.Go(func() { wantKey(t, c, secret, "before") })
		<-started
		source.set(secret, &Key{Name: "after"})
		c.changed(secret, all)
		wantKey(t, c, secret, "after") // while the early lookup is still under way
		close(release)
		early.Wait()
		wantKey(t, c, secret, "after")

		source.set(secret, nil)
		c.changed(secret, all)
		wantKey(t, c, secret, "")
		source.set(secret, &Key{Name: "again"})
		wantKey(t, c, secret, "")
		c.changed(secret, all)
		wantKey(t, c, secret, "again")
		if n := source.lookups.Load(); n != 4 {
			t.Errorf("all %t: %d lookups, want 4", all, n)
		}
	}
}

// keyClock lets the test say what time it is for the cache.
func keyClock(c *keyCache) (pass func(time.Duration)) {
	now := time.Now()
	c.now = func() time.Time { return now }
	return func(d time.Duration) { now = now.Add(d) }
}

func TestChangesNobodyTellsOfTakeEffectInTime(t *testing.T) {
	source := new(keyTable)
	c := newKeyCache(source, time.Minute)
	pass := keyClock(c)
	source.set(secretNumber(1), &Key{Name: "one"})
	wantKey(t, c, secretNumber(1), "one")
	wantKey(t, c, secretNumber(2), "")
	source.set(secretNumber(1), nil)
	source.set(secretNumber(2), &Key{Name: "two"})
	pass(unknownFor/2 - 1)
	wantKey(t, c, secretNumber(2), "")
	pass(unknownFor/2 + 1)
	wantKey(t, c, secretNumber(2), "two")
	pass(knownFor - unknownFor - 1)
	wantKey(t, c, secretNumber(1), "one")
	pass(1)
	wantKey(t, c, secretNumber(1), "")
	if n := source.lookups.Load(); n != 4 {
		t.Errorf("%d lookups, want 4", n)
	}
}

func TestUnknownKeyIsForgottenInTimeWheneverItCame(t *testing.T) {
	for step := range 50 {
		u := newUnknownKeys(maxDelay)
		start := time.Unix(1_000_000, 0)
		u.has(digest{}, start)
		added := start.Add(time.Duration(step) * unknownFor / 20)
		u.add(secretNumber(step), added)
		for _, pause := range []time.Duration{unknownFor / 7, unknownFor} {
			for now := added; now.Before(added.Add(2 * unknownFor)); now = now.Add(pause) {
				if age := now.Sub(added); u.has(secretNumber(step), now) && age > unknownFor {
					t.Fatalf("added %s after the start, still there at the age of %s", added.Sub(start), age)
				}
			}
		}
	}
}

func TestUnknownKeyIsForgottenInTimeThoughItIsSeldomAskedFor(t *testing.T) {
	u, start := newUnknownKeys(maxDelay), time.Unix(1_000_000, 0)
	u.add(secretNumber(1), start)
	if !u.has(secretNumber(1), start.Add(unknownFor*9/10-unknownFor/2)) {
		t.Error("forgotten at once")
	}
	u.has(secretNumber(1), start.Add(unknownFor*9/10))
	if u.has(secretNumber(1), start.Add(unknownFor*11/10)) {
		t.Error("still there")
	}
}

// TestFloodOfUnknownKeysTouchesNobodyElse keeps the clock still, so that the flood uses up all that it may.
func TestFloodOfUnknownKeysTouchesNobodyElse(t *testing.T) {
	source := new(keyTable)
	c := newKeyCache(source, time.Minute)
	keyClock(c)
	const good = 1000
	for i := range good {
		source.set(secretNumber(i), &Key{Name: "good"})
		wantKey(t, c, secretNumber(i), "good")
		c.changed(secretNumber(i), false)
		wantKey(t, c, secretNumber(i), "good")
	}
	const most = firstBurst + firstRate*int64(maxDelay)/int64(time.Second) + 1 // no time passes
	before := source.lookups.Load() - good                                     // those of the good keys were first lookups too
	flood := make(chan int)
	var floods sync.WaitGroup
	var refused atomic.Int64
	for range 300 {
		floods.Go(func() {
			for i := range flood {
				k, err := c.FindKey(t.Context(), secretNumber(good+i))
				switch {
				case errors.Is(err, errManyUnknown):
					refused.Add(1)
				case k != nil || err != nil:
					t.Errorf("%v, %v", k, err)
				}
			}
		})
	}
	for i := range 100_000 {
		flood <- i
	}
	close(flood)
	floods.Wait()
	if n := source.lookups.Load() - before; n > most || refused.Load() < 100_000-most {
		t.Errorf("%d lookups, %d refused", n, refused.Load())
	}
	if len(c.known) > good || len(c.unknown.recent)+len(c.unknown.older) > maxUnknown || len(c.flights) > 0 {
		t.Errorf("%d known, %d and %d unknown, %d in flight", len(c.known), len(c.unknown.recent), len(c.unknown.older), len(c.flights))
	}
	// nothing is left for the unknown now, but all that was ever known or is announced goes on
	if _, err := c.FindKey(t.Context(), secretNumber(1<<30)); !errors.Is(err, errManyUnknown) {
		t.Errorf("an unknown key: %v", err)
	}
	before = source.lookups.Load()
	for i := range good {
		wantKey(t, c, secretNumber(i), "good")
	}
	if n := source.lookups.Load() - before; n != 0 {
		t.Errorf("%d lookups of good keys", n)
	}
	c.changed(digest{}, true)
	source.set(secretNumber(1<<30), &Key{Name: "new"})
	c.changed(secretNumber(1<<30), false)
	wantKey(t, c, secretNumber(1<<30), "new")
	for i := range good {
		wantKey(t, c, secretNumber(i), "good")
	}
}

func TestFullCacheForgetsWhatIsNotUsed(t *testing.T) {
	source := new(keyTable)
	c := newKeyCache(source, time.Minute)
	c.maxKnown = 100
	pass := keyClock(c)
	for i := range 1000 {
		pass(10 * time.Millisecond)
		source.set(secretNumber(i), &Key{Name: fmt.Sprint(i)})
		wantKey(t, c, secretNumber(i), fmt.Sprint(i))
		wantKey(t, c, secretNumber(0), "0")
		c.changed(secretNumber(-1-i), false) // announced, while there is room
	}
	if len(c.known) != 100 {
		t.Errorf("%d keys", len(c.known))
	}
	if n := source.lookups.Load(); n != 1000 {
		t.Errorf("%d lookups, want 1000: the key in use was forgotten", n)
	}
	wantKey(t, c, secretNumber(-1), "") // there is no room to remember that it was announced
	source.set(secretNumber(-1), &Key{Name: "new"})
	c.changed(secretNumber(-1), false)
	wantKey(t, c, secretNumber(-1), "new")
}

func TestLookupGoesOnWhenItsClientLeaves(t *testing.T) {
	source := new(keyTable)
	source.set(secretNumber(1), &Key{Name: "one"})
	c := newKeyCache(source, time.Minute)
	gone, cancel := context.WithCancel(t.Context())
	source.before = func(digest) error { cancel(); return nil }
	c.FindKey(gone, secretNumber(1)) //nolint:errcheck // nobody is there to hear it
	wantKey(t, c, secretNumber(1), "one")
	if n := source.lookups.Load(); n != 1 {
		t.Errorf("%d lookups", n)
	}
}

func TestLookupThatPanicsLeavesNobodyWaiting(t *testing.T) {
	source := new(keyTable)
	c := newKeyCache(source, time.Minute)
	source.before = func(digest) error { panic("lookup") }
	if k, err := c.FindKey(t.Context(), secretNumber(1)); !errors.Is(err, errLookupDied) {
		t.Errorf("%v, %v", k, err)
	}
	source.before = nil
	wantKey(t, c, secretNumber(1), "")
}

// benchmarkFind finds keys of which the first 1,000 are known, a number of callers at a time.
func benchmarkFind(b *testing.B, first int) {
	source := new(keyTable)
	c := newKeyCache(source, time.Minute)
	for i := range 1000 {
		source.set(secretNumber(i), &Key{Name: "known"})
		c.changed(secretNumber(i), false)
	}
	var secrets [1000]digest
	for i := range secrets {
		secrets[i] = secretNumber(first + i)
		c.FindKey(b.Context(), secrets[i]) //nolint:errcheck // the source has no errors
	}
	c.knownFor, c.unknown.lifetime = time.Hour, time.Hour
	for i := range secrets {
		if c.known[secrets[i]] != nil {
			c.known[secrets[i]].until = time.Now().Add(time.Hour)
		}
	}
	before := source.lookups.Load()
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if _, err := c.FindKey(context.Background(), secrets[i%len(secrets)]); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.StopTimer()
	if n := source.lookups.Load() - before; n != 0 {
		b.Errorf("%d lookups", n)
	}
}

func BenchmarkFindKnownKey(b *testing.B)   { benchmarkFind(b, 0) }
func BenchmarkFindUnknownKey(b *testing.B) { benchmarkFind(b, 1000) }

func TestFindingAKeyInMemoryAllocatesNothing(t *testing.T) {
	source := new(keyTable)
	source.set(secretNumber(1), &Key{Name: "one"})
	c := newKeyCache(source, time.Minute)
	for i, name := range []string{1: "one", 2: ""} {
		wantKey(t, c, secretNumber(i), name)
		secret, ctx := secretNumber(i), t.Context()
		if n := testing.AllocsPerRun(1000, func() { c.FindKey(ctx, secret) }); n != 0 { //nolint:errcheck // in memory
			t.Errorf("key %q: %f allocations", name, n)
		}
	}
}
