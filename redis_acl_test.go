package mesh

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// readme returns the first group of what matches in README.md.
func readme(t *testing.T, pattern string) string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(pattern).FindSubmatch(text)
	if found == nil {
		t.Fatalf("README.md has no %s", pattern)
	}
	return string(found[1])
}

func sentinelRights(t *testing.T) string { return readme(t, "It needs `([^`]*sentinel[^`]*)`") }

// TestUserOfTheReadmeMayDoAllThatTheGatewayDoes gives a user exactly the rights that the README lists.
func TestUserOfTheReadmeMayDoAllThatTheGatewayDoes(t *testing.T) {
	rights := readme(t, `(?m)^ACL SETUSER mesh on >secret (.*)$`)
	for name, tc := range map[string]struct {
		start func(*testing.T) []*redisServer
		more  string
		db    int
	}{
		"one server": {start: func(t *testing.T) []*redisServer { return []*redisServer{startRedis(t)} }},
		"database 3": {
			start: func(t *testing.T) []*redisServer { return []*redisServer{startRedis(t)} },
			more:  readme(t, "with `db` `([^`]*)`"),
			db:    3,
		},
		"cluster": {
			start: func(t *testing.T) []*redisServer { return startCluster(t) },
			more:  readme(t, "In a Cluster it needs `([^`]*)`"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := tc.start(t)
			for _, n := range nodes {
				rules := append([]string{"on", ">hunter2"}, strings.Fields(rights+" "+tc.more)...)
				if err := n.client().ACLSetUser(t.Context(), "mesh", rules...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			requestsOfUser(t, nodes, tc.db)
			for _, n := range nodes {
				denied, err := n.client().ACLLog(t.Context(), 10).Result()
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range denied {
					t.Errorf("%s was denied (%s)", d.Object, d.Context)
				}
			}
		})
	}
}

// requestsOfUser sends whole requests, with a key of the configuration and one of the store's, and has happen what can
// happen to a request.
func requestsOfUser(t *testing.T, nodes []*redisServer, db int) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), strings.NewReplacer(
		"store local $DIR/mesh.db", "store redis "+strings.Join(addresses(nodes), " ")+" {\n\t\tusername mesh\n\t\tpassword hunter2\n\t\tdb "+
			strconv.Itoa(db)+"\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}",
		"name tester", "name tester\n\t\trpm 100\n\t\trpd 100\n\t\tspend_cap_usd 100 month hard",
		"model test/* up", "model test/* up {\n\t\tprice 2.50 10.00\n\t\tcontext_length 1000\n\t}",
	).Replace(site("")))
	administrator := redisModule(t, addresses(nodes)...)
	administrator.DB = db
	keys := openRedis(t, administrator).keys.source.(*redisKeys)
	secret, _ := digestOf(otherKey)
	keys.mustWrite(t, secret, &Key{id: "other", RPD: 100})
	eventually(t, "a key of the store works", func() bool {
		return g.post(chatBody, "Authorization", "Bearer "+otherKey).StatusCode == http.StatusOK
	})
	body := strings.Replace(chatBody, "{", `{"session_id":"s",`, 1)
	if r := g.post(body); r.StatusCode != http.StatusOK {
		t.Errorf("%s %s", r.Status, r.body)
	}

	g.usage(t, `{"group_by":["day","session"]}`)
	for _, request := range [][3]string{{"POST", eventsPath, `{}`}, {"GET", requestsPath + newRequestID(), ""}, {"GET", standingPath, ""}} {
		if r := g.do(request[0], request[1], request[2]); r.StatusCode >= 500 {
			t.Errorf("%s: %s %s", request[1], r.Status, r.body)
		}
	}
	for _, end := range []JobStatus{JobCompleted, JobCancelled} {
		path := g.submit(asyncBody)
		if end == JobCancelled {
			g.do(http.MethodDelete, path, "")
		}
		eventually(t, "the job ends", func() bool { return g.job(path).Status.ended() })
	}
	path := templatesPath + "/" + g.do(http.MethodPost, templatesPath, `{"name":"t","system":"x"}`).template(t, 201).ID
	g.do(http.MethodPatch, path, `{"model":"test/x"}`).template(t, 200)
	if r := g.do(http.MethodDelete, path, ""); r.StatusCode != http.StatusNoContent {
		t.Errorf("%s %s", r.Status, r.body)
	}

	user := redisModule(t, addresses(nodes)...)
	user.Username, user.Password, user.DB = "mesh", "hunter2", db
	s, dying := openRedis(t, user), openRedis(t, user)
	if err := s.client.Ping(t.Context()).Err(); err != nil { // as the subscription does when it is quiet
		t.Error(err)
	}
	managesKeys(t, s, keys)
	if err := s.Usage(t.Context(), UsageQuery{From: time.Now().Add(-time.Hour), To: time.Now()}, func(UsageRow) {}); err != nil {
		t.Error(err)
	}
	if _, err := s.TemplateScopes(t.Context()); err != nil {
		t.Error(err)
	}
	runsJobs(t, s)
	id := newRequestID()
	admitRedis(t, dying, Admission{KeyID: "lost", RequestID: id, Limits: Limits{TPM: 5, MaxConcurrency: 5}, Pending: Event{Model: "m", Cost: 1}})
	ledger := func() string {
		return fmt.Sprint(keys.client.XRange(t.Context(), "mesh:{lost}:ledger", "-", "+").Val())
	}
	eventually(t, "the key is registered", func() bool {
		return keys.client.SIsMember(t.Context(), "mesh:keyids", "lost").Val()
	})
	closeRedis(t, dying)
	eventually(t, "the request is charged by estimate", func() bool {
		keys.client.Del(t.Context(), "mesh:reaper") // it may be the turn of another
		if err := s.reapAll(t.Context(), map[string]time.Time{dying.instance: time.Now().Add(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(ledger(), `"lost"`)
	})
	s.Settle(Event{RequestID: id, KeyID: "lost", Model: "m", Cost: 2, Outcome: OutcomeCompleted}) // it lives after all
	eventually(t, "what it really cost replaces that", func() bool {
		return strings.Contains(ledger(), `"completed"`) && !strings.Contains(ledger(), `"outcome":"lost"`)
	})
	settledAll(t, s)
}

// runsJobs has happen to jobs what no request of a healthy gateway brings about.
func runsJobs(t *testing.T, user *redisStore) {
	for range 2 {
		j, a := newTestJob(Limits{}, 0)
		submitJob(t, user, j, a)
	}
	run := takeJob(t, user, "q")
	user.KeepJobs(t.Context(), "q", []*JobRun{run})
	if err := user.ReturnJob(t.Context(), run); err != nil {
		t.Error(err)
	}
	lease, wait := jobLease, maxJobWait
	t.Cleanup(func() { jobLease, maxJobWait = lease, wait })
	takeJob(t, user, "q")
	jobLease, maxJobWait = 0, 0
	if claimed, err := user.claimJob("q"); claimed == nil || err != nil {
		t.Errorf("%v, %v", claimed, err)
	}
	if err := user.SweepJobs(t.Context(), "q"); err != nil {
		t.Error(err)
	}
	place, _ := newTestJob(Limits{}, 0)
	if _, err := user.jobScript(0, "reserve", "q", place.ID, place.ID, 100); err != nil {
		t.Error(err)
	}
	if gone, err := user.withdrawJob(place); !gone || err != nil {
		t.Errorf("%t, %v", gone, err)
	}
	if err := user.leavePlace("q", place.ID); err != nil {
		t.Error(err)
	}
}

// managesKeys has a user do all that can be done to keys, also to those that an administrator writes.
func managesKeys(t *testing.T, user *redisStore, administrator *redisKeys) {
	secret, _ := digestOf("rsk_01BX5ZZKBKACTAV9WEVGEMMVS3")
	administrator.mustWrite(t, secret, &Key{id: "by-hand"})
	made, _ := mustCreate(t, user, Key{Name: "made"})
	second, _ := newSecret()
	mustChange(t, user, made.Terms.id, func(k *StoredKey) { k.rotate(second, time.Hour, time.Now()) })
	finds(t, user, "the key is found", second, func(k *Key) bool { return k != nil })
	for _, id := range []string{made.Terms.id, "by-hand"} {
		mustChange(t, user, id, func(k *StoredKey) { k.Terms.Suspended = true })
	}
	if page, err := user.ListKeys(t.Context(), "", 10); err != nil || len(page) < 2 {
		t.Errorf("%v, %v", page, err)
	}
	for _, id := range []string{made.Terms.id, "by-hand"} {
		if _, err := user.KeyUse(t.Context(), id); err != nil {
			t.Error(err)
		}
		if err := user.RevokeKey(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}
