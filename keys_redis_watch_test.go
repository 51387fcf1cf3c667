package mesh

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// soon polls for a second, which is how long a change may take, and returns how long it took. A machine that is busy
// gets as much more as its own timers were late meanwhile.
func soon(t testing.TB, what string, ok func() bool) time.Duration {
	t.Helper()
	late, stop := timersLate()
	defer stop()
	start := time.Now()
	for !ok() {
		if time.Since(start) > time.Second+late() {
			t.Errorf("not within a second, and the %s that timers were late: %s", late(), what)
			break
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

// timersLate adds up how late the machine's timers are.
func timersLate() (late func() time.Duration, stop func()) {
	const tick = time.Millisecond
	var sum atomic.Int64
	var measuring sync.WaitGroup
	stopped := make(chan struct{})
	measuring.Go(func() {
		for {
			began := time.Now()
			select {
			case <-time.After(tick):
				sum.Add(int64(time.Since(began) - tick))
			case <-stopped:
				return
			}
		}
	})
	return func() time.Duration { return time.Duration(sum.Load()) }, func() { close(stopped); measuring.Wait() }
}

// testChanges changes keys through one instance and expects the other to know it within a second. disturb is called
// before each change.
func testChanges(t *testing.T, writer *redisKeys, reader *keyCache, disturb func()) {
	ctx := t.Context()
	find := func(i int) *Key {
		k, err := reader.FindKey(ctx, secretNumber(i))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	limited := func(i int, rpm int64) func() bool {
		return func() bool { k := find(i); return k != nil && k.RPM == rpm && k.id == "team-a" }
	}
	gone := func(i int) func() bool { return func() bool { return find(i) == nil } }
	if !gone(1)() || !gone(2)() {
		t.Fatal("the keys are there already")
	}
	for _, step := range []struct {
		what   string
		change func() error
		ok     func() bool
	}{
		{"a new key works", func() error { return writer.write(ctx, secretNumber(1), &Key{id: "team-a", RPM: 1}) }, limited(1, 1)},
		{"its limit is another", func() error { return writer.write(ctx, secretNumber(1), &Key{id: "team-a", RPM: 2}) }, limited(1, 2)},
		{"it is suspended", func() error { return writer.suspend(ctx, secretNumber(1), true) }, func() bool { return find(1).Suspended }},
		{"it is not suspended", func() error { return writer.suspend(ctx, secretNumber(1), false) }, func() bool { return !find(1).Suspended }},
		{"its new secret works", func() error { return writer.rotate(ctx, secretNumber(1), secretNumber(2), time.Hour) }, limited(2, 2)},
		{"the old one works on for a while", func() error { return nil }, func() bool { k := find(1); return k.RPM == 2 && !k.Expires.IsZero() }},
		{"the old one is deleted", func() error { return writer.delete(ctx, secretNumber(1)) }, gone(1)},
		{"it is rotated at once", func() error { return writer.rotate(ctx, secretNumber(2), secretNumber(1), 0) }, gone(2)},
		{"back to the first secret", func() error { return nil }, limited(1, 2)},
	} {
		disturb()
		if err := step.change(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		t.Logf("%s after %s", step.what, soon(t, step.what, step.ok))
	}
}

func TestChangeOfAKeyTakesEffectElsewhereWithinASecond(t *testing.T) {
	server := startRedis(t)
	testChanges(t, server.keys(), openCache(t, server.keys()), func() {})
}

func TestChangeOfAKeyTakesEffectThoughTheSubscriberWasDisconnected(t *testing.T) {
	server := startRedis(t)
	reader := openCache(t, server.keys())
	testChanges(t, server.keys(), reader, func() {
		eventually(t, "there is a subscriber to disconnect", func() bool {
			return server.client().ClientKillByFilter(t.Context(), "TYPE", "pubsub").Val() > 0
		})
	})
}

// TestChangeOfAKeyTakesEffectWithoutPubSub forbids the subscription, and leaves the lookups.
func TestChangeOfAKeyTakesEffectWithoutPubSub(t *testing.T) {
	server := startRedis(t)
	if err := server.client().Do(t.Context(), "ACL", "SETUSER", "deaf", "on", ">secret", "~*", "+@all", "resetchannels").Err(); err != nil {
		t.Fatal(err)
	}
	logs, logged := observer.New(zap.InfoLevel)
	deaf := server.keys(func(o *redis.Options) { o.Username, o.Password = "deaf", "secret" })
	deaf.logger = zap.New(logs)
	c := newKeyCache(deaf, time.Minute)
	c.knownFor, c.unknown.lifetime = 400*time.Millisecond, 200*time.Millisecond // a second of a test is too short for the real ones
	c.open()
	t.Cleanup(c.close)
	testChanges(t, server.keys(), c, func() {})
	eventually(t, "the subscription fails again and again", func() bool { return server.rejected("subscribe") > 3 })
	if n := logged.Len(); n != 1 || !strings.Contains(fmt.Sprint(logged.All()[0].ContextMap()), "NOPERM") {
		t.Errorf("logged %v", logged.All())
	}
}

// TestSubscriberNoticesThatItsConnectionIsDead lets the network lose everything on it, without a word.
func TestSubscriberNoticesThatItsConnectionIsDead(t *testing.T) {
	server := startRedis(t)
	r := startRelay(t, server.address)
	subscriber := server.keys(func(o *redis.Options) { o.Addr = r.address() })
	subscriber.quiet = 3 * time.Second // an answer may take as long
	var all, one atomic.Int64
	stop := subscriber.WatchKeys(func(_ digest, isAll bool) {
		if isAll {
			all.Add(1)
		} else {
			one.Add(1)
		}
	})
	t.Cleanup(stop)
	eventually(t, "the subscription has begun", func() bool { return all.Load() == 1 })
	pings := server.calls("ping")
	eventuallyIn(t, time.Minute, "it is quiet", func() bool { return server.calls("ping") >= pings+2 }) // and that alone is no reason
	writer := server.keys()
	writer.mustWrite(t, secretNumber(1), &Key{id: "a"})
	eventually(t, "a change is heard of", func() bool { return one.Load() == 1 })
	if n := all.Load(); n != 1 {
		t.Errorf("%d subscriptions over a good connection", n)
	}
	r.lose()
	writer.mustWrite(t, secretNumber(1), &Key{id: "b"})
	eventuallyIn(t, time.Minute, "everything may have changed", func() bool { return all.Load() == 2 })
	writer.mustWrite(t, secretNumber(1), &Key{id: "c"})
	eventually(t, "changes are heard of again", func() bool { return one.Load() == 2 })
}
