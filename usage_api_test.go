package mesh

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"go.etcd.io/bbolt"
)

// usageStores are stores of both kinds.
func usageStores(t *testing.T) map[string]UsageStore {
	t.Helper()
	local := newLocalStore(filepath.Join(t.TempDir(), "mesh.db"), defaultMaxEvents)
	if err := local.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { local.Destruct() }) //nolint:errcheck // the test is over
	return map[string]UsageStore{"local": local, "redis": openRedis(t, redisModule(t, startRedis(t).address))}
}

// eventAt is a request that began at a time.
func eventAt(began time.Time, keyID string) Event {
	id := ulid.MustNew(ulid.Timestamp(began), ulid.DefaultEntropy())
	return Event{RequestID: "req_" + id.String(), KeyID: keyID, KeyName: "name of " + keyID, Owner: "owner of " + keyID, Time: began.Add(time.Second), Outcome: OutcomeCompleted}
}

// TestSumsAreThoseOfTheLedger settles requests of the last 34 days, and compares sums over random hours with those of
// the events themselves.
func TestSumsAreThoseOfTheLedger(t *testing.T) {
	for name, store := range usageStores(t) {
		t.Run(name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2))
			now := time.Now().UTC()
			hoursAgo := func(most int) time.Time { return now.Add(-time.Duration(random.IntN(most)) * time.Hour) }
			const days = 29 // sessions are kept for 30
			outcomes := []Outcome{OutcomeCompleted, OutcomeError, OutcomeClientGone, OutcomeCut}
			var all []Event
			for range 500 {
				e := eventAt(hoursAgo(days*24).Add(-time.Duration(random.IntN(3600))*time.Second), fmt.Sprint("key", random.IntN(3)))
				e.Model = fmt.Sprint("test/m", random.IntN(3))
				e.SessionID = []string{"", "s1", "=s2"}[random.IntN(3)]
				e.Outcome = outcomes[random.IntN(len(outcomes))]
				e.PromptTokens, e.CachedTokens, e.CompletionTokens, e.Cost = random.Int64N(1000), random.Int64N(10), random.Int64N(100), Money(random.Int64N(1e9))
				all = append(all, e)
				store.Settle(e)
				if random.IntN(10) == 0 {
					store.Settle(e) // twice
				}
			}
			labels, err := store.UsageKeys(t.Context())
			if err != nil || labels["key1"] != (KeyLabel{"name of key1", "owner of key1"}) {
				t.Errorf("%v %v", err, labels)
			}
			for i := range 60 {
				q := UsageQuery{From: hoursAgo(days * 24).Truncate(time.Hour), To: hoursAgo(days * 24).Truncate(time.Hour)}
				if q.To.Before(q.From) {
					q.From, q.To = q.To, q.From
				}
				if i%4 == 0 {
					q.From, q.To = now.Add(-days*24*time.Hour).Truncate(24*time.Hour), now
				}
				if random.IntN(3) > 0 {
					q.KeyID = fmt.Sprint("key", random.IntN(3))
				}
				switch random.IntN(4) {
				case 0:
					q.Sessions = true
				case 1:
					q.Sessions, q.SessionID = true, "=s2"
				}
				want, got := make(map[string]usageSums), make(map[string]usageSums)
				into := func(m map[string]usageSums, keyID, day, session, model string, sums usageSums) {
					place := strings.Join([]string{keyID, day, session, model}, "|")
					s := m[place]
					s.add(sums)
					m[place] = s
				}
				to := q.To
				if i%4 == 0 {
					to = now.Add(time.Hour)
				}
				for _, e := range all {
					began := e.began()
					if began.Before(q.From) || !began.Before(to) || q.KeyID != "" && e.KeyID != q.KeyID ||
						q.Sessions && e.SessionID == "" || q.SessionID != "" && e.SessionID != q.SessionID {
						continue
					}
					session := e.SessionID
					if !q.Sessions {
						session = ""
					}
					used := usedBy(&e)
					into(want, e.KeyID, began.Format(time.DateOnly), session, e.Model, used.sums())
				}
				err := store.Usage(t.Context(), q, func(row UsageRow) { into(got, row.KeyID, row.Day, row.Session, row.Model, row.usageSums) })
				if err != nil {
					t.Fatal(err)
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("%+v:\ngot  %v\nwant %v", q, got, want)
				}
			}
			var last string
			n := 0
			err = store.KeyEvents(t.Context(), "key1", time.Time{}, time.Time{}, func(e *Event) bool {
				if n++; e.KeyID != "key1" {
					t.Errorf("an event of %s", e.KeyID)
				}
				last = e.RequestID
				return true
			})
			want := 0
			for _, e := range all {
				if e.KeyID == "key1" {
					want++
				}
			}
			if err != nil || n != want {
				t.Errorf("%v: %d events, want %d", err, n, want)
			}
			for keyID, found := range map[string]bool{"key1": true, "key2": false} {
				e, err := store.KeyEvent(t.Context(), keyID, last)
				if err != nil || (e != nil) != found {
					t.Errorf("%s: %v %v", keyID, e, err)
				}
			}
		})
	}
}

func TestEstimateThatIsReplacedLeavesNoTraceInSums(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	e := eventAt(time.Now(), "key")
	e.SessionID, e.Model = "s", "test/a"
	admitRedis(t, s, Admission{KeyID: "key", RequestID: e.RequestID})
	lost := e
	lost.Outcome, lost.Cost, lost.PromptTokens = OutcomeLost, 500, 7
	enterNow(t, s, settlement{Kind: settleLost, Event: lost})
	e.Cost, e.CompletionTokens = 900, 3
	enterNow(t, s, settlement{Kind: settleEvent, Event: e})
	used := usedBy(&e)
	for _, q := range []UsageQuery{{}, {Sessions: true}} {
		q.KeyID, q.From, q.To = "key", time.Now().Add(-48*time.Hour).Truncate(time.Hour), time.Now().Add(time.Hour).UTC().Truncate(time.Hour)
		var sums usageSums
		if err := s.Usage(t.Context(), q, func(row UsageRow) { sums.add(row.usageSums) }); err != nil || sums != used.sums() {
			t.Errorf("%v %+v, want %+v", err, sums, used.sums())
		}
	}
}

func TestOldDatabaseGetsSums(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := newLocalStore(path, defaultMaxEvents)
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	const n = 30
	for range n {
		e := eventAt(time.Now(), "key")
		e.Model, e.Cost = "test/a", 2
		s.Settle(e)
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	forgetSums(t, s)
	if err := s.Destruct(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing to do
		s = newLocalStore(path, defaultMaxEvents)
		if err := s.open(); err != nil {
			t.Fatal(err)
		}
		var sums usageSums
		events := 0
		q := UsageQuery{From: time.Now().Add(-time.Hour), To: time.Now().Add(time.Hour)}
		if err := s.Usage(t.Context(), q, func(row UsageRow) { sums.add(row.usageSums) }); err != nil || sums.All.Requests != n || sums.All.Cost != 2*n {
			t.Errorf("%v %+v", err, sums)
		}
		if err := s.KeyEvents(t.Context(), "key", time.Time{}, time.Time{}, func(*Event) bool { events++; return true }); err != nil || events != n {
			t.Errorf("%v %d", err, events)
		}
		if err := s.Destruct(); err != nil {
			t.Fatal(err)
		}
	}
}

// usageAnswer is what POST /v1/usage answers.
func (g *gateway) usage(t testing.TB, body string, headers ...string) (u usageReport) {
	t.Helper()
	r := g.do(http.MethodPost, usagePath, body, headers...)
	if r.StatusCode != 200 {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	if err := json.Unmarshal(r.body, &u); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
	return u
}

func TestUsageOfAKey(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("User-Agent") == "fail" {
			answers(400, "application/json", `{"error":{"message":"no"}}`)(w, r)
			return
		}
		answers(200, "application/json", completion)(w, r)
	})
	redis := startRedis(t)
	for name, store := range map[string]string{
		"local": "store local $DIR/mesh.db",
		"redis": "store redis {\n\t\taddress " + redis.address + "\n\t\tjournal $DIR/journal.db\n\t\ttimeout 5s\n\t}",
	} {
		t.Run(name, func(t *testing.T) {
			p := startProcess(t, up.address(), "http://$ADDRESS {\nmesh {\n"+store+"\nkey "+testKey+" {\nname tester\nowner acme\nrpm 100\nspend_cap_usd 1\n}\nkey "+otherKey+"\n"+
				"upstream up http://$UPSTREAM/v1\nmodel paid/* up {\nprice 2.50 10.00\n}\nmodel test/* up\ndefault_model test/plain\n}\n}\n")
			g := p.gateway()
			post := func(members string, headers ...string) string {
				r := g.post(`{`+members+`,"messages":[{"role":"user","content":"Hi"}]}`, headers...)
				return r.Header.Get("X-Request-Id")
			}
			first := post(`"model":"paid/a","session_id":"s1"`)
			for range 3 {
				post(`"model":"test/b"`)
			}
			failed := post(`"model":"paid/a","session_id":"s2"`, "User-Agent", "fail")
			others := post(`"model":"test/b"`, "Authorization", "Bearer "+otherKey)

			u := g.usage(t, `{"group_by":["day","session"]}`)
			if u.TotalRequests != 5 || u.SuccessfulRequests != 4 || u.ErrorRequests != 1 || u.PromptTokens != 4000 || u.CompletionTokens != 800 ||
				u.TotalTokens != 4800 || u.TotalCost.String() != "0.0045" || len(u.ByModel) != 2 || u.ByModel[0].Model != "paid/a" || u.ByModel[0].TotalRequests != 2 ||
				len(u.ByDay) == 0 || len(u.BySession) != 2 || u.BySession[0].Session != "s1" {
				t.Errorf("%+v", u)
			}
			now := time.Now().UTC()
			for body, want := range map[string]int64{
				`{}`:                      5,
				`{"model":"test/b"}`:      3,
				`{"status":"error"}`:      1,
				`{"status":"success"}`:    4,
				`{"session_id":"s1"}`:     1,
				`{"session_id":"nobody"}`: 0,
				`{"group_by":"model"}`:    5,
				`{"since":null}`:          5,
				`{"since":"` + now.Add(-time.Hour).Format(time.RFC3339) + `"}`:                                                                 5,
				`{"since":"` + now.Add(2*time.Hour).Format(time.RFC3339) + `"}`:                                                                0,
				`{"until":"` + now.Add(-2*time.Hour).Format(time.RFC3339) + `"}`:                                                               0,
				`{"since":"` + now.AddDate(0, 0, -1).Format(time.DateOnly) + `","until":"` + now.AddDate(0, 0, 1).Format(time.DateOnly) + `"}`: 5,
			} {
				if u := g.usage(t, body); u.TotalRequests != want {
					t.Errorf("%s: %d, want %d", body, u.TotalRequests, want)
				}
			}
			if u := g.usage(t, "", "Authorization", "Bearer "+otherKey); u.TotalRequests != 1 {
				t.Errorf("the other key: %+v", u)
			}

			var page struct {
				Events               []publicEvent
				Total, Limit, Offset int
			}
			r := g.do(http.MethodPost, eventsPath, `{"limit":2,"offset":1}`)
			if err := json.Unmarshal(r.body, &page); err != nil || page.Total != 5 || page.Limit != 2 || page.Offset != 1 || len(page.Events) != 2 ||
				page.Events[0].Model != "test/b" || page.Events[0].RequestID < page.Events[1].RequestID || strings.Contains(string(r.body), `"upstream"`) {
				t.Errorf("%v %s", err, r.body)
			}
			r = g.do(http.MethodGet, requestsPath+first, "")
			var one struct {
				RequestID string `json:"request_id"`
				Outcome   string
				Event     publicEvent
			}
			if err := json.Unmarshal(r.body, &one); err != nil || one.RequestID != first || one.Outcome != "completed" || one.Event.Cost.String() != "0.0045" || one.Event.SessionID != "s1" {
				t.Errorf("%v %s", err, r.body)
			}
			if r := g.do(http.MethodGet, requestsPath+failed, ""); !strings.Contains(string(r.body), `"status":"error"`) {
				t.Errorf("%s", r.body)
			}
			for _, id := range []string{others, "nonsense", "req_01ARZ3NDEKTSV4RRFFQ69G5FAV"} {
				if r := g.do(http.MethodGet, requestsPath+id, ""); r.StatusCode != 404 || r.errorCode(t) != "not_found" {
					t.Errorf("%s: %s %s", id, r.Status, r.body)
				}
			}
			var standing struct {
				AsOf time.Time `json:"as_of"`
				Key  map[string]struct {
					Current any
					Limit   any
					Pct     *float64
					Resets  *int `json:"resets_in_seconds"`
				}
			}
			for range 2 { // it counts nothing
				r = g.do(http.MethodGet, standingPath, "")
				if err := json.Unmarshal(r.body, &standing); err != nil {
					t.Fatalf("%v %s", err, r.body)
				}
			}
			// a new minute may have begun meanwhile
			if k := standing.Key; k["rpd"].Current != 5.0 || k["rpd"].Limit != nil || k["rpm"].Limit != 100.0 || k["rpm"].Resets == nil ||
				k["spend"].Current != "0.0045" || k["spend"].Limit != "1" || *k["spend"].Pct != 0.45 || k["spend"].Resets != nil {
				t.Errorf("%s", r.body)
			}

			for body, want := range map[string]string{
				`{"since":"yesterday","limit":0,"group_by":"week","status":7}`: "since group_by status limit",
				`{"limit":201}`: "limit", `{"offset":-1}`: "offset",
				`{"since":"2026-02-01","until":"2026-01-01"}`: "until",
			} {
				r := g.do(http.MethodPost, eventsPath, body)
				var said errorBody
				json.Unmarshal(r.body, &said)
				var places []string
				for _, d := range said.Error.Details {
					places = append(places, fmt.Sprint(d.Loc[1]))
				}
				wants := strings.Fields(want)
				slices.Sort(places)
				slices.Sort(wants)
				if r.StatusCode != 422 || !slices.Equal(places, wants) {
					t.Errorf("%s: %s %s", body, r.Status, r.body)
				}
			}

			table := p.mustMesh("usage", "--by", "owner,model")
			want := "OWNER MODEL REQUESTS ERRORS PROMPT TOKENS COMPLETION TOKENS USD " +
				"- test/b 1 0 1000 200 0 acme paid/a 2 1 1000 200 0.0045 acme test/b 3 0 3000 600 0 total 6 1 5000 1000 0.0045"
			if got := strings.Join(strings.Fields(table), " "); got != want {
				t.Errorf("%s", table)
			}
			post(`"model":"test/b","session_id":"=1+1"`)
			csv := p.mustMesh("usage", "--csv", "--by", "session", "--owner", "acme")
			if want := "session,requests,errors,prompt_tokens,cached_tokens,completion_tokens,cost_usd\n" +
				"'=1+1,1,0,1000,400,200,0\ns1,1,0,1000,400,200,0.0045\ns2,1,1,0,0,0,0\n"; csv != want {
				t.Errorf("%s", csv)
			}
			var report usageTable
			if err := json.Unmarshal([]byte(p.mustMesh("usage", "--json", "--by", "day,key", "--from", now.AddDate(0, 0, -1).Format(time.DateOnly))), &report); err != nil ||
				report.Total.TotalRequests != 7 || report.Lines[0].Day == "" || !slices.ContainsFunc(report.Lines, func(l usageLine) bool { return l.KeyName == "tester" }) {
				t.Errorf("%v %+v", err, report)
			}
			for want, args := range map[string][]string{
				"is none of day": {"usage", "--by", "week"}, "from: ": {"usage", "--from", "yesterday"}, "neither success": {"usage", "--status", "x"},
			} {
				if got, code := p.mesh(args...); code == 0 || !strings.Contains(got, want) {
					t.Errorf("%s: %d %s", args, code, got)
				}
			}

			p.restart(os.Kill)
			if u := g.usage(t, `{}`); u.TotalRequests != 6 || u.TotalCost.String() != "0.0045" {
				t.Errorf("after a kill: %+v", u)
			}
		})
	}
}

// forgetSums makes the store's database one from before there were sums.
func forgetSums(t *testing.T, s *localStore) {
	t.Helper()
	err := s.database.bolt.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketDays, bucketHours, bucketSessions, bucketLabels, bucketByKey} {
			if err := tx.DeleteBucket(name); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMesh).Delete(keyRolled)
	})
	if err != nil {
		t.Fatal(err)
	}
}
