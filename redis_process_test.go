package mesh

import (
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestWholeAnswersAreInTheLedgerOnceWhateverIsKilled has two Caddys share a Redis. Redis is killed while they serve, its
// connections are broken, and one Caddy is killed and started again. With MESH_TEST_LONG set it is 20,000 requests and
// five kills of Redis.
func TestWholeAnswersAreInTheLedgerOnceWhateverIsKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("takes most of a minute: two leases must run out")
	}
	server := startRedis(t, "--appendfsync", "always")
	relay := startRelay(t, server.address)
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(5 * time.Millisecond)
		answers(200, "application/json", completion)(w, r)
	})
	config := "http://$ADDRESS {\n" + strings.NewReplacer(
		"store local $DIR/mesh.db", "store redis "+relay.address()+" {\n\t\ttimeout 2s\n\t\tjournal $DIR/journal.db\n\t}",
		"model test/* up", "model test/* up {\n\t\tprice 1.000001 10.000003\n\t}",
	).Replace(site("")) + "\n}\n"
	caddys := []*process{startProcess(t, up.address(), config), startProcess(t, up.address(), config)}

	var mu sync.Mutex
	whole := make(map[string]bool) // the requests whose answer came whole
	var stop atomic.Bool
	var clients sync.WaitGroup
	for i := range 16 {
		clients.Go(func() {
			for !stop.Load() {
				if id := wholeAnswer(caddys[i%2].url); id != "" {
					mu.Lock()
					whole[id] = true
					mu.Unlock()
				} else {
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	kills, atLeast := 3, 0
	if os.Getenv("MESH_TEST_LONG") != "" {
		kills, atLeast = 5, 20_000
	}
	for range kills {
		time.Sleep(400 * time.Millisecond)
		relay.reset()
		time.Sleep(200 * time.Millisecond)
		server.kill()
		time.Sleep(400 * time.Millisecond)
		server.start()
	}
	for _, c := range caddys {
		eventuallyIn(t, time.Minute, "Redis counts again, and has what waited in the journal", func() bool {
			status, body := c.health()
			return status == http.StatusOK && strings.Contains(body, `"waiting":0}`)
		})
	}
	time.Sleep(time.Second) // what was served without Redis until just now is in it, or in the journal
	caddys[0].kill(os.Kill)
	time.Sleep(200 * time.Millisecond)
	caddys[0].start()
	time.Sleep(500 * time.Millisecond)
	for enough := false; !enough; time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		enough = len(whole) >= atLeast
		mu.Unlock()
	}
	stop.Store(true)
	clients.Wait()

	client := server.client()
	names := client.Keys(t.Context(), "mesh:{*}:account").Val()
	if len(names) != 1 {
		t.Fatalf("accounts: %v", names)
	}
	of := strings.TrimSuffix(names[0], "account")
	eventuallyIn(t, 2*time.Minute, "nothing is pending", func() bool { return client.HLen(t.Context(), of+"pending").Val() == 0 })
	entries := make(map[string]bool)
	var sum Money
	lost, missing := 0, 0
	for _, m := range client.XRange(t.Context(), of+"ledger", "-", "+").Val() {
		e := decodeEvent(t, m.Values["event"].(string))
		if entries[e.RequestID] {
			t.Errorf("%s is in the ledger twice", e.RequestID)
		}
		entries[e.RequestID] = true
		sum += e.Cost
		if e.Outcome == OutcomeLost {
			lost++
		}
	}
	for id := range whole {
		if !entries[id] {
			missing++
		}
	}
	total := client.HGet(t.Context(), of+"account", "total").Val()
	if missing > 0 || total != strconv.FormatInt(int64(sum), 10) || sum == 0 {
		t.Errorf("%d of %d answers are not in the ledger; its sum is %d, spend is %s", missing, len(whole), sum, total)
	}
	t.Logf("%d whole answers, %d entries, %d of them by estimate", len(whole), len(entries), lost)
}

// wholeAnswer returns the id of a request whose answer came whole, or nothing.
func wholeAnswer(url string) string {
	r, err := http.NewRequest(http.MethodPost, url+chatPath, strings.NewReader(chatBody))
	if err != nil {
		return ""
	}
	r.Header.Set("Authorization", "Bearer "+testKey)
	r.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return ""
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != 200 || int64(len(body)) != answer.ContentLength {
		return ""
	}
	return answer.Header.Get("X-Request-Id")
}
