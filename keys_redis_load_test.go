package mesh

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestFloodOfUnknownKeysHardlyReachesRedis(t *testing.T) {
	server := startRedis(t)
	keys := server.keys()
	const good = 100
	for i := range good {
		keys.mustWrite(t, secretNumber(i), &Key{id: "good", Name: "good"})
	}
	c := openCache(t, keys)
	for i := range good {
		wantKey(t, c, secretNumber(i), "good")
	}
	before, start := server.calls("hmget"), time.Now()
	flooded := make(chan struct{})
	var next, refused, slowest atomic.Int64
	var floods, others sync.WaitGroup
	for range 500 {
		floods.Go(func() {
			for i := next.Add(1); i <= 100_000; i = next.Add(1) {
				k, err := c.FindKey(t.Context(), secretNumber(good+int(i)))
				if k != nil {
					t.Error("a key that is not there")
				}
				if err != nil {
					refused.Add(1)
				}
			}
		})
	}
	others.Go(func() { // good keys go on, and are looked up anew in between
		for i := 0; ; i++ {
			select {
			case <-flooded:
				return
			default:
			}
			if i%100 == 0 {
				c.changed(secretNumber(i/100%good), false)
			}
			began := time.Now()
			wantKey(t, c, secretNumber(i%good), "good")
			slowest.Store(max(slowest.Load(), int64(time.Since(began))))
			time.Sleep(100 * time.Microsecond)
		}
	})
	others.Go(func() { // a new key is written in the middle of it
		keys.mustWrite(t, secretNumber(-1), &Key{id: "new", Name: "new"})
		soon(t, "a new key works", func() bool { k, _ := c.FindKey(t.Context(), secretNumber(-1)); return k != nil })
	})
	floods.Wait()
	took := time.Since(start)
	close(flooded)
	others.Wait()
	calls := server.calls("hmget") - before
	t.Logf("%s: %d lookups in Redis, %d refused, slowest good key %s", took, calls, refused.Load(), time.Duration(slowest.Load()))
	const slack = 500 // lookups of good keys
	if most := firstBurst + int(firstRate*(took+maxDelay).Seconds()) + slack + int(took/(10*time.Millisecond)); calls > most {
		t.Errorf("%d lookups in Redis, at most %d were expected", calls, most)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if known, unknown := len(c.known), len(c.unknown.recent)+len(c.unknown.older); known > good+1 || unknown > maxUnknown || len(c.flights) > 0 {
		t.Errorf("in memory: %d known, %d unknown, %d in flight", known, unknown, len(c.flights))
	}
}

func TestThousandRequestsWithOneKeyAreOneCommand(t *testing.T) {
	server := startRedis(t)
	keys := server.keys()
	keys.mustWrite(t, secretNumber(1), &Key{id: "a", Name: "one"})
	c := openCache(t, keys)
	eventually(t, "the subscription has begun", c.listens)
	before := server.calls("hmget")
	var all sync.WaitGroup
	begin := make(chan struct{})
	for range 1000 {
		all.Go(func() {
			<-begin
			wantKey(t, c, secretNumber(1), "one")
		})
	}
	close(begin)
	all.Wait()
	if n := server.calls("hmget") - before; n != 1 {
		t.Errorf("%d commands", n)
	}
}

func TestClosedCacheLeavesNothingRunning(t *testing.T) {
	server := startRedis(t)
	running := goleak.IgnoreCurrent()
	client := redis.NewClient(&redis.Options{Addr: server.address, DialerRetries: 1})
	for i := range 3 {
		if i == 2 {
			server.kill() // it ends while the subscriber tries to come back, too
		}
		c := newKeyCache(newRedisKeys(client, "mesh", newBreaker("away", zap.NewNop()), zap.NewNop()), time.Minute)
		c.open()
		c.FindKey(t.Context(), secretNumber(1)) //nolint:errcheck // there may be no server
		c.close()
	}
	client.Close()
	goleak.VerifyNone(t, running)
}
