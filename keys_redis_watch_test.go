package mesh

import (
	"context"
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

// change changes a key that the gateway looks after.
func (s *redisKeys) change(ctx context.Context, id string, change func(*StoredKey)) error {
	k, err := s.changeManaged(ctx, id, func(k *StoredKey) error { change(k); return nil })
	if err == nil && k == nil {
		err = errNoSuchKey
	}
	return err
}

// revoke deletes such a key.
func (s *redisKeys) revoke(ctx context.Context, id string) error {
	found, err := s.revokeManaged(ctx, id)
	if err == nil && !found {
		err = errNoSuchKey
	}
	return err
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
	const id = "team-a"
	limited := func(i int, rpm int64) func() bool {
		return func() bool { k := find(i); return k != nil && k.RPM == rpm && k.id == id }
	}
	changed := func(change func(*StoredKey)) func() error {
		return func() error { return writer.change(ctx, id, change) }
	}
	none := func() error { return nil }
	gone := func(i int) func() bool { return func() bool { return find(i) == nil } }
	if !gone(1)() || !gone(2)() {
		t.Fatal("the keys are there already")
	}
	for _, step := range []struct {
		what   string
		change func() error
		ok     func() bool
	}{
		{"a new key works", func() error {
			return writer.create(ctx, []*StoredKey{{Terms: Key{id: id, RPM: 1}, secret: secretNumber(1)}})
		}, limited(1, 1)},
		{"its limit is another", changed(func(k *StoredKey) { k.Terms.RPM = 2 }), limited(1, 2)},
		{"it is suspended", changed(func(k *StoredKey) { k.Terms.Suspended = true }), func() bool { return find(1).Suspended }},
		{"it is not suspended", changed(func(k *StoredKey) { k.Terms.Suspended = false }), func() bool { return !find(1).Suspended }},
		{"its new secret works", changed(func(k *StoredKey) { k.rotate(secretNumber(2), time.Hour, time.Now()) }), limited(2, 2)},
		{"the old one works on for a while", none, func() bool { k := find(1); return k.RPM == 2 && !k.Expires.IsZero() }},
		{"it is rotated at once", changed(func(k *StoredKey) { k.rotate(secretNumber(3), 0, time.Now()) }), limited(3, 2)},
		{"its last secret does not work", none, gone(2)},
		{"its first secret does not work", none, gone(1)},
		{"it is revoked", func() error { return writer.revoke(ctx, id) }, gone(3)},
		{"one that was written by hand works", func() error { return writer.write(ctx, secretNumber(1), &Key{id: id, RPM: 1}) }, limited(1, 1)},
		{"its limit is another too", func() error {
			_, err := writer.changeWritten(ctx, id, func(k *StoredKey) error { k.Terms.RPM = 2; return nil })
			return err
		}, limited(1, 2)},
		{"it is revoked too", func() error { return writer.revokeWritten(ctx, id) }, gone(1)},
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
