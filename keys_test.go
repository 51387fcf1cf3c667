package mesh

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// keyedSite is a site whose store has keys.
func keyedSite(server *redisServer, more string) string {
	store := "store redis " + server.address + " {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}"
	return strings.Replace(site(more), "store local $DIR/mesh.db", store, 1)
}

func TestKeysOfTheStoreAreKeysLikeAnyOther(t *testing.T) {
	server := startRedis(t)
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), keyedSite(server, "\tkey "+otherKey+" {\n\t\tname configured\n\t}\n\tmodel a/b up"))
	keys := server.keys()
	const token = "rsk_01BX5ZZKBKACTAV9WEVGEMMVS0"
	secret, err := digestOf(token)
	if err != nil {
		t.Fatal(err)
	}
	noModel := strings.Replace(chatBody, `"model":"test/plain",`, "", 1)
	hour := time.Now().Add(time.Hour)
	for _, tc := range []struct {
		name   string
		key    *Key
		body   string
		status int
		code   string
	}{
		{"no such key", nil, chatBody, 401, "unauthorized"},
		{"plain", &Key{id: "k1", Expires: hour}, chatBody, 200, ""},
		{"suspended", &Key{id: "k1", Suspended: true}, chatBody, 403, "forbidden"},
		{"expired", &Key{id: "k1", Expires: hour.Add(-2 * time.Hour)}, chatBody, 401, "unauthorized"},
		{"another model", &Key{id: "k1", Models: []string{"a/*"}}, chatBody, 403, "forbidden"},
		{"its model", &Key{id: "k1", Models: []string{"a/*"}, DefaultModel: "a/b"}, noModel, 200, ""},
		{"a default nobody serves", &Key{id: "k1", DefaultModel: "b/c"}, noModel, 404, "model_not_found"},
		{"the first of two", &Key{id: "k2", RPD: 2}, chatBody, 200, ""},
		{"the second", &Key{id: "k2", RPD: 2}, chatBody, 200, ""},
		{"one too many", &Key{id: "k2", RPD: 2}, chatBody, 429, "rate_limit_exceeded"},
		{"plain again", &Key{id: "k1"}, chatBody, 200, ""},
	} {
		if tc.key != nil {
			keys.mustWrite(t, secret, tc.key)
		}
		var last *reply
		soon(t, tc.name, func() bool {
			last = g.post(tc.body, "Authorization", "Bearer "+token)
			return last.StatusCode == tc.status && last.errorCode(t) == tc.code
		})
		t.Logf("%s: %s", tc.name, last.body)
	}
	// counters belong to the id: a new secret does not make them new
	other, _ := digestOf("rsk_01BX5ZZKBKACTAV9WEVGEMMVS1")
	keys.mustWrite(t, secret, &Key{id: "k2", RPD: 2})
	keys.mustWrite(t, other, &Key{id: "k2", RPD: 2})
	if err := keys.delete(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	soon(t, "the new secret works as the old one did", func() bool {
		return g.post(chatBody, "Authorization", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS1").StatusCode == 429
	})
	soon(t, "the old secret does not work", func() bool {
		return g.post(chatBody, "Authorization", "Bearer "+token).StatusCode == 401
	})
	// what the configuration says comes first
	configured, _ := digestOf(otherKey)
	keys.mustWrite(t, configured, &Key{id: "k3", Suspended: true})
	time.Sleep(20 * time.Millisecond)
	if r := g.post(chatBody, "Authorization", "Bearer "+otherKey); r.StatusCode != 200 {
		t.Errorf("a configured key that the store has too: %s", r.Status)
	}
}

func TestStoreIsAskedOnlyForWhatMayBeAKey(t *testing.T) {
	server := startRedis(t)
	g := startGateway(t, freeAddress(t), keyedSite(server, ""))
	before := server.calls("hmget")
	for _, authorization := range []string{"", "Bearer", "Bearer x", "Basic " + testKey, "Bearer " + testKey + "0", "Bearer " + testKey[:29],
		"Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS!", "Bearer " + testKey} {
		g.do(http.MethodGet, "/v1/models", "", "Authorization", authorization)
	}
	if n := server.calls("hmget") - before; n != 0 {
		t.Errorf("%d lookups", n)
	}
	start := time.Now()
	for range 10 {
		g.do(http.MethodGet, "/v1/models", "", "Authorization", "Bearer "+otherKey)
	}
	most := 2 + int(time.Since(start)/(unknownFor/2)) // the second if the subscription began after the first
	if n := server.calls("hmget") - before; n < 1 || n > most {
		t.Errorf("%d lookups of one unknown key", n)
	}
}

func TestOutageIsNotTheFaultOfAKey(t *testing.T) {
	server := startRedis(t)
	secret, _ := digestOf(otherKey)
	server.keys().mustWrite(t, secret, &Key{id: "known"}) // before there is anybody to hear of it: what a message has named is not served
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), keyedSite(server, ""))
	eventually(t, "changes to keys are heard of", runningStore().keys.listens)
	known := func() *reply { return g.post(chatBody, "Authorization", "Bearer "+otherKey) }
	soon(t, "the key works", func() bool { return known().StatusCode == 200 })
	server.kill()
	for range 5 {
		if r := known(); r.StatusCode != 200 {
			t.Errorf("a known key: %s %s", r.Status, r.body)
		}
		if r := g.post(chatBody); r.StatusCode != 200 {
			t.Errorf("a configured key: %s %s", r.Status, r.body)
		}
		r := g.post(chatBody, "Authorization", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS9")
		if r.StatusCode != 503 || r.errorCode(t) != "store_unavailable" || r.Header.Get("Retry-After") == "" {
			t.Errorf("a key that nothing is known of: %s %s", r.Status, r.body)
		}
	}
}

// keyless is a store that has no keys.
type keyless struct{}

func (keyless) StoreKey() string { return "keyless" }

func (keyless) OpenStore() (Store, error) { return new(crowded), nil }

// TestStoreWithoutKeysIsNotOpenedForOne asks after the configuration's end, when nothing has the store open.
func TestStoreWithoutKeysIsNotOpenedForOne(t *testing.T) {
	ref := &storeRef{module: keyless{}}
	h := &Handler{store: ref, logger: zap.NewNop()}
	if err := ref.keep(); err != nil {
		t.Fatal(err)
	}
	if err := ref.letGo(); err != nil {
		t.Fatal(err)
	}
	ref.module = nil // whoever opens it now panics
	if k, err := h.findKey(t.Context(), digest{}); k != nil || err != nil {
		t.Errorf("%v, %v", k, err)
	}
}

// unopenable is a store that cannot be opened.
type unopenable struct{}

func (unopenable) StoreKey() string { return "unopenable" }

func (unopenable) OpenStore() (Store, error) { return nil, errors.New("the disk is on fire") }

func TestStoreThatCannotBeOpenedIsLoggedAndNotForEachRequest(t *testing.T) {
	logs, logged := observer.New(zap.DebugLevel)
	h := &Handler{store: &storeRef{module: unopenable{}}, logger: zap.New(logs)}
	for range 20 {
		r := httptest.NewRequest(http.MethodPost, chatPath, strings.NewReader(chatBody))
		r.Header.Set("Authorization", "Bearer "+testKey)
		w := httptest.NewRecorder()
		if err := h.ServeHTTP(w, r, nil); err != nil || w.Code != http.StatusServiceUnavailable || strings.Contains(w.Body.String(), "fire") {
			t.Fatalf("%v, %d %s", err, w.Code, w.Body)
		}
	}
	if entries := logged.FilterLevelExact(zap.ErrorLevel).All(); len(entries) != 1 || entries[0].ContextMap()["error"] != "the disk is on fire" {
		t.Errorf("logged %v", entries)
	}
	if n := logged.FilterMessage("request refused").Len(); n != 20 {
		t.Errorf("the debug log has %d of 20 requests", n)
	}
}
