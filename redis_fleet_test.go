package mesh

import (
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// startFleet runs four Caddys whose store is the Redis at these addresses, given as options of the store, with a limit of
// the key's.
func startFleet(t *testing.T, store, limit, upstream string) (fleet []*gateway) {
	t.Helper()
	config := "http://$ADDRESS {\n" + strings.NewReplacer(
		"store local $DIR/mesh.db", "store redis {\n\t\t"+store+"\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}",
		"name tester", "name tester\n\t\t"+limit,
		"model test/* up", "model test/* up {\n\t\tprice 1 10\n\t}",
	).Replace(site("")) + "\n}\n"
	for range 4 {
		fleet = append(fleet, startProcess(t, upstream, config).gateway())
	}
	return fleet
}

// TestFleetAdmitsExactlyTheLimitInEachMinute sends at least 8,000 requests to four Caddys as fast as they go, on both
// sides of the end of a minute.
func TestFleetAdmitsExactlyTheLimitInEachMinute(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the end of a minute")
	}
	for name, start := range map[string]func() string{
		"one server": func() string { return "address " + startRedis(t).address },
		"cluster": func() string {
			store := "address"
			for _, node := range startCluster(t) {
				store += " " + node.address
			}
			return store
		},
	} {
		t.Run(name, func(t *testing.T) {
			up := startUpstream(t, answers(200, "application/json", completion))
			fleet := startFleet(t, start(), "rpm 1000", up.address())
			boundary := time.Now().Truncate(time.Minute).Add(time.Minute)
			if left := time.Until(boundary); left < 10*time.Second {
				boundary = boundary.Add(time.Minute)
			}
			time.Sleep(time.Until(boundary.Add(-8 * time.Second)))

			var sent, before, after, passed, others atomic.Int64
			var clients sync.WaitGroup
			for i := range 16 {
				clients.Go(func() {
					// until both sides have had more than they admit, but not into the next minute
					for sent.Load() < 8000 || after.Load() < 2000 && time.Now().Before(boundary.Add(50*time.Second)) {
						sent.Add(1)
						if time.Now().Before(boundary) {
							before.Add(1)
						} else {
							after.Add(1)
						}
						switch fleet[i%4].post(chatBody).StatusCode {
						case http.StatusOK:
							passed.Add(1)
						case http.StatusTooManyRequests:
						default:
							others.Add(1)
						}
					}
				})
			}
			clients.Wait()
			if before.Load() < 1100 || after.Load() < 1100 {
				t.Fatalf("the machine is too slow to tell: %d requests before the end of the minute, %d after", before.Load(), after.Load())
			}
			if passed.Load() != 2000 || others.Load() != 0 || len(up.received()) != 2000 {
				t.Errorf("%d of %d passed, %d had another answer, the upstream received %d", passed.Load(), sent.Load(), others.Load(), len(up.received()))
			}
			t.Logf("%d requests before the end of the minute, %d after, %d passed", before.Load(), after.Load(), passed.Load())
		})
	}
}

// pricedAnswers has a model whose every answer is of another length.
func pricedAnswers(w http.ResponseWriter, r *http.Request) {
	tokens := strconv.Itoa(1 + rand.N(100_000))
	answers(200, "application/json", strings.Replace(completion, `"completion_tokens":200`, `"completion_tokens":`+tokens, 1))(w, r)
}

// TestFailoverBehindAFleetLosesAndDoublesNothing kills the master behind three Sentinels while four Caddys serve. What the
// replica that takes over had not received yet is settled all the same.
func TestFailoverBehindAFleetLosesAndDoublesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the Sentinels to agree")
	}
	master := startRedis(t)
	replicas := []*redisServer{startReplica(t, master), startReplica(t, master)}
	store := "address " + strings.Join(startSentinels(t, master, len(replicas)), " ") + "\n\t\tmaster_name main"
	fleet := startFleet(t, store, "spend_cap_usd 1000000", startUpstream(t, pricedAnswers).address())

	var mu sync.Mutex
	answered := make(map[string]Money)
	var stop atomic.Bool
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for !stop.Load() {
				r := fleet[i%4].post(chatBody)
				if r.StatusCode != http.StatusOK {
					t.Errorf("%s %s", r.Status, r.body) // the policy is to degrade
					return
				}
				var said struct{ Cost Money }
				if err := json.Unmarshal(r.body, &said); err != nil || said.Cost == 0 {
					t.Errorf("%s: %v", r.body, err)
				}
				mu.Lock()
				answered[r.Header.Get("X-Request-Id")] = said.Cost
				mu.Unlock()
			}
		})
	}
	enough := func(n int) {
		t.Helper()
		eventually(t, "more is answered", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(answered) >= n
		})
	}
	enough(500)
	master.kill()
	var next *redisServer
	eventuallyIn(t, time.Minute, "a replica has taken over", func() bool {
		for _, replica := range replicas {
			if strings.Contains(replica.client().Info(t.Context(), "replication").Val(), "role:master") {
				next = replica
			}
		}
		return next != nil
	})
	mu.Lock()
	before := len(answered)
	mu.Unlock()
	enough(before + 500)
	stop.Store(true)
	clients.Wait()

	var sum Money
	for _, cost := range answered {
		sum += cost
	}
	client := next.client()
	eventuallyIn(t, time.Minute, "all is settled", func() bool {
		names := client.Keys(t.Context(), "mesh:{*}:account").Val()
		return len(names) == 1 && client.HGet(t.Context(), names[0], "total").Val() == strconv.FormatInt(int64(sum), 10)
	})
	of := strings.TrimSuffix(client.Keys(t.Context(), "mesh:{*}:account").Val()[0], "account")
	entered := make(map[string]bool)
	for _, m := range client.XRange(t.Context(), of+"ledger", "-", "+").Val() {
		e := decodeEvent(t, m.Values["event"].(string))
		if cost, ok := answered[e.RequestID]; !ok || entered[e.RequestID] || e.Cost != cost {
			t.Errorf("entered for %s (before: %t), answered for %s: %+v", e.Cost, entered[e.RequestID], cost, e)
		}
		entered[e.RequestID] = true
	}
	if len(entered) != len(answered) {
		t.Errorf("%d of %d answers are in the ledger", len(entered), len(answered))
	}
	eventuallyIn(t, time.Minute, "nothing is pending", func() bool { return client.HLen(t.Context(), of+"pending").Val() == 0 })
	t.Logf("%d requests, %d of them before the replica had taken over, for %s USD", len(answered), before, sum)
}
