package mesh

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// degradable is a gateway whose Redis can be made to swallow everything. It has a key in its configuration, testKey, and
// two in Redis.
type degradable struct {
	*gateway
	store *redisStore
	relay *relay
}

const (
	storedKey  = otherKey
	limitedKey = "rsk_01BX5ZZKBKACTAV9WEVGEMMVS0"
	limitedRPD = 50 // what limitedKey may do in a day
)

func startDegradable(t testing.TB, up *upstream, options string, args ...string) *degradable {
	t.Helper()
	server := startRedis(t, args...)
	keys := server.keys()
	for token, key := range map[string]*Key{storedKey: {id: "stored"}, limitedKey: {id: "limited", RPD: limitedRPD}} {
		secret, err := digestOf(token)
		if err != nil {
			t.Fatal(err)
		}
		if err := keys.write(t.Context(), secret, key); err != nil {
			t.Fatal(err)
		}
	}
	d := &degradable{relay: startRelay(t, server.address)}
	store := "store redis " + d.relay.address() + " {\n\t\tjournal $DIR/journal.db\n\t\t" + options + "\n\t}"
	d.gateway = startGateway(t, up.address(), strings.Replace(site(""), "store local $DIR/mesh.db", store, 1))
	d.store = runningStore()
	eventually(t, "changes to keys are heard of", d.store.keys.listens)
	for _, token := range []string{testKey, storedKey} {
		eventually(t, "Redis lets a request through", func() bool {
			return d.post(chatBody, "Authorization", "Bearer "+token).StatusCode == http.StatusOK && !d.store.degraded()
		})
	}
	return d
}

// runningStore returns the store of the gateway in this process.
func runningStore() (s *redisStore) {
	stores.Range(func(_, v any) bool { s = v.(*redisStore); return true })
	return s
}

// load sends n requests from a number of callers, with each of the keys in turn.
func (d *degradable) load(n, callers int, tokens ...string) *loadResult {
	result := &loadResult{status: make(map[string]map[int]int)}
	for _, token := range tokens {
		result.status[token] = make(map[int]int)
	}
	var next int
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for {
				result.mu.Lock()
				i := next
				next++
				result.mu.Unlock()
				if i >= n {
					return
				}
				result.request(d.gateway, tokens[i%len(tokens)])
			}
		})
	}
	all.Wait()
	slices.Sort(result.took)
	return result
}

type loadResult struct {
	mu     sync.Mutex
	status map[string]map[int]int // requests, by key and status
	took   []time.Duration
}

func (l *loadResult) request(g *gateway, token string) {
	began := time.Now()
	resp := g.send(http.MethodPost, chatPath, chatBody, "Authorization", "Bearer "+token)
	io.Copy(io.Discard, resp.Body) //nolint:errcheck // the status is enough
	resp.Body.Close()
	took := time.Since(began)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status[token][resp.StatusCode]++
	l.took = append(l.took, took)
}

// percentile returns how long that many of a hundred requests took at most.
func (l *loadResult) percentile(p int) time.Duration { return l.took[(len(l.took)-1)*p/100] }

// TestDegradedGatewayWaitsForAFewRequestsAndServesTheRest counts what is sent to a Redis that swallows everything: a
// request that sends nothing waits for nothing. The timeout is long, so that nothing but swallowing is late.
func TestDegradedGatewayWaitsForAFewRequestsAndServesTheRest(t *testing.T) {
	const callers = 4
	for _, onFailure := range []string{onFailureDegrade, onFailureRefuse} {
		t.Run(onFailure, func(t *testing.T) {
			up := startUpstream(t, answers(200, "application/json", completion))
			d := startDegradable(t, up, "timeout 2s\n\t\ton_failure "+onFailure)
			before := d.load(100, callers, testKey, storedKey)
			if r := d.load(1, 1, limitedKey); r.status[limitedKey][200] != 1 {
				t.Fatalf("%v", r.status)
			}
			d.store.keys.changed(digest{}, true) // no key is fresh any more
			commands := countCommands(d.store, nil)
			sent := func() int { return commands.of("hmget") + commands.of("evalsha "+d.store.admits.script.Hash()) }

			d.relay.hush()
			first := d.load(60, callers, testKey, storedKey, limitedKey)
			waited := sent()
			const most = maxFailures + callers + 2 // two keys, whose lookups end a moment after their requests have given up
			if waited > most || !d.store.degraded() {
				t.Errorf("%d commands were sent, degraded: %t; want %d at most", waited, d.store.degraded(), most)
			}
			after := d.load(1000, callers, testKey, storedKey, limitedKey)
			if n := sent() - waited; n != 0 {
				t.Errorf("%d commands were sent while the breaker was open", n)
			}
			for _, token := range []string{testKey, storedKey, limitedKey} {
				all := first.status[token]
				for status, n := range after.status[token] {
					all[status] += n
				}
				want := map[int]int{http.StatusOK: all[200] + all[429] + all[503]}
				switch {
				case onFailure == onFailureRefuse:
					want = map[int]int{http.StatusServiceUnavailable: want[200]}
				case token == limitedKey:
					want = map[int]int{http.StatusOK: limitedRPD - 1, http.StatusTooManyRequests: want[200] - (limitedRPD - 1)}
				}
				if !maps.Equal(all, want) {
					t.Errorf("key %s: %v, want %v", token, all, want)
				}
			}
			t.Logf("%d of the first 60 commands waited, for %s at most; 99 of 100 requests took up to %s before and %s after",
				waited, first.percentile(100), before.percentile(99), after.percentile(99))
		})
	}
}

// BenchmarkDegraded is what a request takes while Redis swallows everything, its timeout being 100 ms. Beside the usual
// numbers it reports what 99 of 100 requests took at most before and then, and what the slowest took of those that found
// out.
func BenchmarkDegraded(b *testing.B) {
	transport := http.DefaultTransport.(*http.Transport)
	transport.MaxIdleConnsPerHost, transport.DisableKeepAlives = 100, false
	for name, token := range map[string]string{"KeyOfTheCaddyfile": testKey, "KeyInRedis": storedKey} {
		for _, onFailure := range []string{onFailureDegrade, onFailureRefuse} {
			b.Run(name+"/"+onFailure, func(b *testing.B) {
				d := startDegradable(b, quiet(b, answers(200, "application/json", completion)), "on_failure "+onFailure, "--appendonly", "no")
				before := d.load(2000, 1, token)
				if d.store.degraded() {
					b.Fatal("Redis is too slow to begin with")
				}
				d.store.keys.changed(digest{}, true)
				d.relay.hush()
				first := d.load(10, 1, token)
				b.ResetTimer()
				after := d.load(max(b.N, 100), 1, token)
				b.ReportMetric(before.percentile(99).Seconds()*1e3, "ms-p99-before")
				b.ReportMetric(first.percentile(100).Seconds()*1e3, "ms-slowest-at-first")
				b.ReportMetric(after.percentile(99).Seconds()*1e3, "ms-p99-after")
			})
		}
	}
}
