package mesh

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// tellingProxy tells an upstream what placeholders say: of the site's own handlers, of the gateway, and of reverse_proxy.
const tellingProxy = `reverse_proxy {
	header_up X-Site "{http.mesh.key.name} {http.mesh.key.owner} {http.mesh.session_id} {vars.tier} {region} {re.chat.1}"
	header_up X-Request "{http.request.orig_uri} {http.request.uri} {http.request.header.X-Asked} {http.response.header.X-Of-Site}"
	header_up X-Attempt "{http.mesh.upstream} {http.mesh.model} {http.mesh.attempts} {http.reverse_proxy.upstream.hostport}"
	header_up X-Mapped {mapped}
	header_up X-Id {http.mesh.request_id}
	header_up X-Uuid {http.request.uuid}
}`

// tellingSite is a site whose handlers have put into a request what Caddy's can, with two upstreams, `up` and `first`.
func tellingSite(first string, models string) string {
	return `
	@chat path_regexp chat ^/tenant/(\w+)/v1/(.*)$
	rewrite @chat /v1/{re.chat.2}
	header X-Of-Site of-the-site
	vars tier gold
	map {http.mesh.key.owner} {region} {
		acme eu
	}
	map {http.mesh.upstream} {mapped} {
		first 1
	}
	mesh {
		store local $DIR/mesh.db
		key ` + testKey + ` {
			name tester
			owner acme
		}
		upstream up http://$UPSTREAM/v1 {
			` + tellingProxy + `
		}
		upstream first http://` + first + `/v1 {
			` + tellingProxy + `
		}
` + models + `
	}`
}

// hasBeenTold checks what an upstream was told, which each request has some ids beside.
func hasBeenTold(t *testing.T, r received, site, request, attempt string) {
	t.Helper()
	for name, want := range map[string]string{"X-Site": site, "X-Request": request, "X-Attempt": attempt} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s is %q and not %q", name, got, want)
		}
	}
	if id, uuid := r.Header.Get("X-Id"), r.Header.Get("X-Uuid"); !strings.HasPrefix(id, "req_") || len(uuid) != 36 {
		t.Errorf("the ids are %q and %q", id, uuid)
	}
}

const (
	toldOfSite    = "tester acme s-1 gold eu blue"
	toldOfRequest = "/tenant/blue/v1/chat/completions?a=b /v1/chat/completions?a=b asked of-the-site"
)

func (g *gateway) asTenant(path, body string) *reply {
	g.t.Helper()
	return g.do(http.MethodPost, "/tenant/blue/v1/chat/"+path+"?a=b", body, "X-Asked", "asked")
}

func TestPlaceholdersOfBothInAHedgeAreThoseOfAPlainAttempt(t *testing.T) {
	asked := make(chan struct{})
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); strings.Contains(string(body), `"slow"`) {
			close(asked)
			<-r.Context().Done()
			return
		}
		answers(200, "application/json", completion)(w, r)
	})
	hedged := make(chan struct{}) // both are asked
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-hedged:
			<-asked
		default:
		}
		answers(200, "application/json", completion)(w, r)
	})
	g := startGateway(t, up.address(), tellingSite(first.address(),
		"model test/fast first\nmodel test/second up\nmodel test/slow first {\n\thedge 1ms\n\tfallback test/second\n}"))
	session := `,"session_id":"s-1"`

	g.asTenant("completions", ask("test/fast", session))
	hasBeenTold(t, first.last(t), toldOfSite, toldOfRequest, "first test/fast 1 "+first.address())
	g.asTenant("completions", ask("test/second", session))
	hasBeenTold(t, up.last(t), toldOfSite, toldOfRequest, "up test/second 1 "+up.address())

	close(hedged)
	r := g.asTenant("completions", ask("test/slow", session))
	if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Attempts") != "2" {
		t.Fatalf("%s %v %s", r.Status, r.Header, r.body)
	}
	one, other := first.last(t), up.last(t)
	hasBeenTold(t, one, toldOfSite, toldOfRequest, "first test/slow 1 "+first.address())
	hasBeenTold(t, other, toldOfSite, toldOfRequest, "up test/slow 2 "+up.address())
	for _, name := range []string{"X-Id", "X-Uuid"} {
		if a, b := one.Header.Get(name), other.Header.Get(name); a != b {
			t.Errorf("%s of one request is %q and %q", name, a, b)
		}
	}
	if id := one.Header.Get("X-Id"); id != r.Header.Get("X-Request-Id") {
		t.Errorf("the upstreams were told of %s, the client of %s", id, r.Header.Get("X-Request-Id"))
	}
}

func TestPlaceholdersOfACallInACompareAreThoseOfAPlainAttempt(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), tellingSite(up.address(), "model test/* up"))
	r := g.asTenant("compare", `{"models":["test/a","test/b","test/c"],"session_id":"s-1","comparison_model":"test/judge","messages":[{"role":"user","content":"Hi"}]}`)
	ids := make(map[string]string)
	for _, result := range r.comparison(t).Results {
		ids[result.Model] = result.RequestID
	}
	uuids := make(map[string]bool)
	calls := up.received()
	for _, call := range calls {
		var asked struct{ Model string }
		if err := json.Unmarshal(call.body, &asked); err != nil {
			t.Fatal(err)
		}
		model := "test/" + asked.Model
		hasBeenTold(t, call, toldOfSite, strings.ReplaceAll(toldOfRequest, "completions", "compare"), "up "+model+" 1 "+up.address())
		if id := call.Header.Get("X-Id"); id != ids[model] && model != "test/judge" {
			t.Errorf("the upstream of %s was told of %s, the client of %s", model, id, ids[model])
		}
		uuids[call.Header.Get("X-Uuid")] = true
	}
	if len(calls) != 4 || len(uuids) != 1 {
		t.Errorf("%d calls had %d ids of the client's request", len(calls), len(uuids))
	}
}

// TestPlaceholdersMayBeReadWhileTheyChange is one for the race detector.
func TestPlaceholdersMayBeReadWhileTheyChange(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), tellingSite(up.address(),
		"model test/second up\nmodel test/first first {\n\thedge 1ms\n\tfallback test/second\n}"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				if r := g.asTenant("completions", ask("test/first", "")); r.StatusCode != 200 {
					t.Errorf("%s %s", r.Status, r.body)
				}
			}
			g.asTenant("compare", `{"models":["test/first","test/second"],"messages":[{"role":"user","content":"Hi"}]}`).comparison(t)
		})
	}
	wg.Wait()
}
