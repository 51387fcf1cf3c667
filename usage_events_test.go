package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// eventsPage is what POST /v1/usage/events answers.
type eventsPage struct {
	Events        []publicEvent
	Total         int64
	Limit, Offset int
}

func (g *gateway) events(t testing.TB, body string) (page eventsPage) {
	t.Helper()
	r := g.do(http.MethodPost, eventsPath, body)
	if err := json.Unmarshal(r.body, &page); err != nil || r.StatusCode != 200 {
		t.Fatalf("%v: %s %s", err, r.Status, r.body)
	}
	return page
}

// openStore returns the store that the gateway has open, whose key begins in one of some ways.
func (g *gateway) openStore(prefixes ...string) (found UsageStore) {
	g.t.Helper()
	stores.Range(func(key, v any) bool {
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key.(string), p) }) {
			found = v.(UsageStore)
		}
		return found == nil
	})
	if found == nil {
		g.t.Fatal("the store is not open")
	}
	return found
}

// enteredWhenTheyEnded has the ledger of a key be as it would be if its requests had been settled when they ended.
func (s *redisStore) enteredWhenTheyEnded(t testing.TB, events []Event) {
	t.Helper()
	ledger := s.key(events[0].KeyID, "ledger")
	eventually(t, "all is in Redis", func() bool { return s.client.XLen(t.Context(), ledger).Val() == int64(len(events)) })
	pipe := s.client.TxPipeline()
	pipe.Del(t.Context(), ledger)
	for i, e := range slices.SortedFunc(slices.Values(events), func(a, b Event) int { return a.Time.Compare(b.Time) }) {
		entry, _ := encodeEvent(&e)
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: ledger, ID: fmt.Sprint(e.Time.UnixMilli(), "-", i), Values: []any{"event", entry}})
	}
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestListedEventsBeganInTheTimeAskedFor settles requests of the last 40 days, many of them in the same few minutes, and compares
// what is listed with all that there are.
func TestListedEventsBeganInTheTimeAskedFor(t *testing.T) {
	server := startRedis(t)
	for name, store := range map[string]string{
		"local": "store local $DIR/mesh.db",
		"redis": "store redis {\n\t\taddress " + server.address + "\n\t\tjournal $DIR/journal.db\n\t\ttimeout 5s\n\t}",
	} {
		t.Run(name, func(t *testing.T) {
			up := startUpstream(t, answers(200, "application/json", completion))
			g := startGateway(t, up.address(), "mesh {\n"+store+"\nkey "+testKey+"\nupstream up http://$UPSTREAM/v1\nmodel test/* up\ndefault_model test/plain\n}")
			ledger := g.openStore("local:"+g.dir+"/", "redis:"+server.address)
			digest := sha256.Sum256([]byte(testKey))
			keyID := hex.EncodeToString(digest[:len(digest)/2])
			random := rand.New(rand.NewPCG(5, 6))
			now := time.Now().UTC().Truncate(time.Millisecond)
			var all []Event
			settle := func(began time.Time) {
				e := eventAt(began, keyID)
				e.Time = began.Add(time.Duration(random.Int64N(int64(10 * time.Minute))))
				e.Model = fmt.Sprint("test/m", random.IntN(2))
				if random.IntN(3) == 0 {
					e.Outcome, e.SessionID = OutcomeError, "s"
				}
				all = append(all, e)
				ledger.Settle(e)
			}
			busy := now.Add(-26 * time.Hour).Truncate(time.Hour).Add(54 * time.Minute)
			for range 150 {
				settle(busy.Add(time.Duration(random.Int64N(int64(10 * time.Minute)))).Truncate(time.Millisecond))
				settle(now.Add(-time.Duration(random.Int64N(int64(29 * 24 * time.Hour)))))
			}
			settle(busy)
			settle(busy.Add(5 * time.Minute))
			for range 20 {
				settle(now.Add(-36*24*time.Hour - time.Duration(random.Int64N(int64(4*24*time.Hour)))))
			}
			if s, ok := ledger.(*redisStore); ok {
				s.enteredWhenTheyEnded(t, all)
			}
			slices.SortFunc(all, func(a, b Event) int { return b.began().Compare(a.began()) })
			at := func(t time.Time) string { return t.Format(time.RFC3339Nano) }
			times := [][2]string{
				{at(busy), at(busy.Add(5 * time.Minute))},
				{at(busy.Add(2 * time.Minute)), at(busy.Add(9 * time.Minute))},
				{at(busy.Add(time.Microsecond)), at(busy.Add(5*time.Minute + time.Microsecond))},
				{at(busy), at(busy)}, {"", at(busy)}, {at(busy), ""}, {"", ""}, {at(now.Add(time.Hour)), ""},
				{at(now.Add(-36*24*time.Hour - 90*time.Minute)), at(busy.Add(time.Minute))},
				{at(now.Add(-38*24*time.Hour - 90*time.Minute)), at(now.Add(-37*24*time.Hour - 7*time.Minute))},
				{at(now.Add(-25 * time.Hour)), at(time.Now().Add(time.Hour))},
			}
			for range 15 {
				a := now.Add(-time.Duration(random.Int64N(int64(29 * 24 * time.Hour))))
				times = append(times, [2]string{at(a), at(a.Add(time.Duration(random.Int64N(int64(50 * time.Hour)))))})
			}
			for i, bounds := range times {
				var from, to time.Time
				body := `"limit":200`
				if bounds[0] != "" {
					from, _ = time.Parse(time.RFC3339, bounds[0])
					body += `,"since":"` + bounds[0] + `"`
				}
				if bounds[1] != "" {
					to, _ = time.Parse(time.RFC3339, bounds[1])
					body += `,"until":"` + bounds[1] + `"`
				}
				recent := now.Sub(from) < keptSessions
				for filter, wanted := range map[string]func(*Event) bool{
					"":                                    func(*Event) bool { return true },
					`,"model":"test/m1"`:                  func(e *Event) bool { return e.Model == "test/m1" },
					`,"status":"error"`:                   func(e *Event) bool { return e.Outcome == OutcomeError },
					`,"session_id":"s","model":"test/m0"`: func(e *Event) bool { return recent && e.SessionID == "s" && e.Model == "test/m0" },
				} {
					if strings.Contains(filter, "session") && !recent {
						continue // their sums are not kept for as long
					}
					want := make(map[string]bool)
					for _, e := range all {
						if began := e.began(); !began.Before(from) && (to.IsZero() || began.Before(to)) && wanted(&e) {
							want[e.RequestID] = true
						}
					}
					page := g.events(t, "{"+body+filter+"}")
					listed := page.Events
					for len(listed) < len(want) && len(page.Events) > 0 {
						page = g.events(t, fmt.Sprintf(`{%s%s,"offset":%d}`, body, filter, len(listed)))
						listed = append(listed, page.Events...)
					}
					got := make(map[string]bool)
					for _, e := range listed {
						got[e.RequestID] = true
						if !want[e.RequestID] {
							t.Errorf("%d %s%s: one of %s", i, body, filter, e.CreatedAt)
						}
					}
					if page.Total != int64(len(want)) || len(listed) != len(want) || len(got) != len(want) {
						t.Errorf("%d %s%s: a total of %d, %d listed, %d of them once, want %d", i, body, filter, page.Total, len(listed), len(got), len(want))
					}
				}
			}
			first := g.events(t, `{"since":"`+at(busy)+`","until":"`+at(busy.Add(10*time.Minute))+`","limit":10}`)
			rest := g.events(t, `{"since":"`+at(busy)+`","until":"`+at(busy.Add(10*time.Minute))+`","limit":5,"offset":5}`)
			if len(first.Events) != 10 || len(rest.Events) != 5 || first.Total != rest.Total || first.Events[5].RequestID != rest.Events[0].RequestID {
				t.Errorf("%+v %+v", first, rest)
			}
		})
	}
}
