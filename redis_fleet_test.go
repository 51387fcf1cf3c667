package mesh

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// startFleet runs four Caddys whose store is the Redis at these addresses, given as options of the store.
func startFleet(t *testing.T, store, upstream string) (fleet []*gateway) {
	t.Helper()
	config := "http://$ADDRESS {\n" + strings.NewReplacer(
		"store local $DIR/mesh.db", "store redis {\n\t\t"+store+"\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}",
		"name tester", "name tester\n\t\trpm 1000",
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
			fleet := startFleet(t, start(), up.address())
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
