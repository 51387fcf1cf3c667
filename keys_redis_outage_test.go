package mesh

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// findKeys asks a store for n keys and returns how many found theirs.
func findKeys(t *testing.T, s *redisStore, n int) (found int) {
	t.Helper()
	for i := range n {
		k, err := s.FindKey(t.Context(), secretNumber(i))
		if (k == nil) != errors.Is(err, errUnavailable) {
			t.Errorf("key %d: %v, %v", i, k, err)
		}
		if k != nil {
			found++
		}
	}
	return found
}

// TestKeysInRedisOutliveAnOutageThatNoRequestWaitsFor sends a thousand requests with keys that have to be
// looked up into an outage.
func TestKeysInRedisOutliveAnOutageThatNoRequestWaitsFor(t *testing.T) {
	for name, outage := range outages {
		for _, onFailure := range []string{onFailureDegrade, onFailureRefuse} {
			t.Run(name+", "+onFailure, func(t *testing.T) {
				server := startRedis(t)
				const n = 200
				keys := server.keys()
				for i := range n {
					keys.mustWrite(t, secretNumber(i), &Key{id: "a", Name: "known"})
				}
				relay := startRelay(t, server.address)
				module := redisModule(t, relay.address())
				module.Timeout = caddy.Duration(500 * time.Millisecond)
				module.OnFailure = onFailure
				s := openRedis(t, module)
				eventually(t, "all keys are known", func() bool {
					return s.keys.listens() && !s.degraded() && findKeys(t, s, n) == n
				})
				s.keys.changed(digest{}, true)
				commands := countCommands(s, nil)
				outage.begin(server, relay)
				want := 0
				if onFailure == onFailureDegrade {
					want = n
				}
				for range 5 {
					if found := findKeys(t, s, n); found != want {
						t.Errorf("%d keys outlive the outage, want %d", found, want)
					}
				}
				if k, err := s.FindKey(t.Context(), secretNumber(n)); !errors.Is(err, errUnavailable) {
					t.Errorf("a key that was never seen: %v, %v", k, err)
				}
				const most = maxFailures + 1 // a request gives up a moment before its lookup does, and lets the next one begin
				if n := commands.of("hmget"); n > most || !s.degraded() {
					t.Errorf("%d lookups reached for Redis, degraded: %t; want %d at most", n, s.degraded(), most)
				}

				outage.end(server, relay)
				server.client().HSet(t.Context(), keys.hash(secretNumber(0)), "name", "changed") // nobody is told
				s.keys.changed(digest{}, true)
				eventually(t, "keys are looked up again", func() bool {
					k, err := s.FindKey(t.Context(), secretNumber(0))
					return err == nil && k.Name == "changed" && !s.degraded()
				})
			})
		}
	}
}

func TestLookupsThatRedisRefusesAreNoOutage(t *testing.T) {
	server := startRedis(t, "--user", "app", "on", ">hunter2", "~mesh:{*", "~mesh:instance:*", "~mesh:keyids", "+@all", "&*")
	module := redisModule(t, server.address)
	module.Username, module.Password = "app", "hunter2"
	s := openRedis(t, module)
	logs, logged := observer.New(zap.InfoLevel)
	s.keys.source.(*redisKeys).logger = zap.New(logs)
	for i := range 5 * maxFailures {
		if k, err := s.FindKey(t.Context(), secretNumber(i)); !errors.Is(err, errUnavailable) {
			t.Errorf("%v, %v", k, err)
		}
	}
	if s.degraded() {
		t.Error("took it for an outage")
	}
	if entries := logged.All(); len(entries) != 1 || !strings.Contains(fmt.Sprint(entries[0].ContextMap()["error"]), "NOPERM") {
		t.Errorf("logged %v", entries)
	}
}

// TestPartOfAClusterThatHasAKeyIsTriedBeforeTheBreakerCloses checks that the name the heart writes to is where the key is.
func TestPartOfAClusterThatHasAKeyIsTriedBeforeTheBreakerCloses(t *testing.T) {
	client := startCluster(t)[0].client()
	s := &redisStore{redisConfig: redisConfig{prefix: "mesh"}}
	for i := range 10 {
		hash := (&redisKeys{prefix: s.prefix}).hash(secretNumber(i))
		probe := s.key(hash, "probe")
		if want, got := client.ClusterKeySlot(t.Context(), hash).Val(), client.ClusterKeySlot(t.Context(), probe).Val(); got != want {
			t.Errorf("%s is in slot %d, its key in %d", probe, got, want)
		}
	}
}
