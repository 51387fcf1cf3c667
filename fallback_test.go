package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig"
)

const bad = `{"error":{"message":"down"}}`

// twoSites is a site with an upstream `bad` beside `up`, and models test/first at it and test/second at `up`.
func twoSites(bad string, first string) string {
	return site(fmt.Sprintf("\tupstream bad http://%s/v1\n\tmodel test/first bad {\n\t\tprice 1 2\n%s\n\t}\n"+
		"\tmodel test/second up {\n\t\tprice 2.50 10.00\n\t}\n", bad, first))
}

func ask(model, more string) string {
	return `{"model":"` + model + `"` + more + `,"messages":[{"role":"user","content":"Hi"}]}`
}

func TestModelsOfTheRequestAndFallbacksAnswerInTurn(t *testing.T) {
	first := startUpstream(t, answers(503, "application/json", bad))
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second"))
	for _, more := range []string{"", `,"models":["test/second"]`, `,"models":["test/first","test/second","test/third"]`} {
		r := g.post(ask("test/first", more))
		if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/second" ||
			r.Header.Get("X-Mesh-Routing-Attempts") != "2" || r.Header.Get("X-Mesh-Routing-Fallback") != "true" {
			t.Errorf("%s: %s %q", more, r.Status, r.Header)
		}
		if !strings.Contains(string(r.body), `"cost":"0.0045"`) {
			t.Errorf("not at the price of the model that served: %s", r.body)
		}
		if got := string(up.last(t).body); got != `{"model":"second","messages":[{"role":"user","content":"Hi"}]}` {
			t.Errorf("the second model received %s", got)
		}
	}
	for _, e := range g.ledger(3) {
		if e.Model != "test/second" || e.Cost != 4_500_000 || !reflect.DeepEqual(e.Tried, []Tried{{"test/first", "bad", "503"}}) {
			t.Errorf("ledger: %+v", e)
		}
	}
}

func TestModelsThatMayNotBeAskedAreRefusedBeforeAnythingIsCounted(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\trpm 1\n\t\tmodels test/a test/b\n\t}\n"+
		"\tupstream up http://$UPSTREAM/v1\n\tmodel test/a up {\n\t\tfallback test/c test/b\n\t}\n\tmodel test/b up\n\tmodel test/c up\n}")
	for _, tc := range []struct {
		models string
		status int
		code   string
		names  string
	}{
		{`["test/b","nobody/knows"]`, 404, "model_not_found", "nobody/knows"},
		{`["test/c"]`, 403, "forbidden", "test/c"},
		{`[` + strings.Repeat(`"test/b",`, 10) + `"test/b"]`, 422, "validation_error", "at most 10"},
	} {
		r := g.post(ask("test/a", `,"models":`+tc.models))
		if r.StatusCode != tc.status || r.errorCode(t) != tc.code || !strings.Contains(string(r.body), tc.names) {
			t.Errorf("%s: %s %s", tc.models, r.Status, r.body)
		}
	}
	if r := g.post(ask("test/a", "")); r.StatusCode != 200 {
		t.Errorf("something was counted: %s", r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

func TestFallbackThatTheKeyMayNotUseIsLeftOut(t *testing.T) {
	up := startUpstream(t, answers(503, "application/json", bad))
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\tmodels test/a test/b\n\t}\n"+
		"\tupstream up http://$UPSTREAM/v1\n\tmodel test/a up {\n\t\tfallback test/c test/b\n\t}\n\tmodel test/b up\n\tmodel test/c up\n}")
	r := g.post(ask("test/a", ""))
	if r.StatusCode != 502 || r.Header.Get("X-Mesh-Routing-Attempts") != "2" {
		t.Errorf("%s %q", r.Status, r.Header)
	}
	if got := string(up.last(t).body); !strings.Contains(got, `"model":"b"`) {
		t.Errorf("asked last: %s", got)
	}
}

func TestMistakesOfRoutingHaveAFileAndALine(t *testing.T) {
	const head = "http://localhost {\n\tmesh {\n\t\tupstream up http://127.0.0.1:1\n"
	for _, tc := range []struct{ block, line, want string }{
		{"\t\tmodel a/b up {\n\t\t\tfallback x/y\n\t\t}\n", "Caddyfile:5", "no model matches x/y"},
		{"\t\tmodel a/a up {\n\t\t\tfallback b/b\n\t\t}\n\t\tmodel b/b up {\n\t\t\tfallback c/c\n\t\t}\n\t\tmodel c/c up {\n\t\t\tfallback a/a\n\t\t}\n",
			"Caddyfile:5", "a/a → b/b → c/c → a/a"},
		{"\t\tmodel a/a up {\n\t\t\tfallback a/a\n\t\t}\n", "Caddyfile:5", "a/a → a/a"},
		{"\t\tmodel a/a up {\n\t\t\tprice 0.0000025 0.00001\n\t\t}\n", "Caddyfile:4", "USD per million tokens"},
		{"\t\tmodel a/a up {\n\t\t\tprice 2.5 10000000\n\t\t}\n", "Caddyfile:4", "USD per million tokens"},
	} {
		err := adapt(head + tc.block + "\t}\n}\n")
		if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), tc.line) {
			t.Errorf("%s: %v", tc.block, err)
		}
	}
	if err := adapt(head + "\t\tmodel a/* up {\n\t\t\tfallback a/b\n\t\t}\n\t}\n}\n"); err != nil {
		t.Errorf("a pattern may fall back to a name of its own: %v", err)
	}
}

func TestFallbackIsNotAskedOnceTheCapIsReached(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	first := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		d := sha256.Sum256([]byte(testKey))
		stores.Range(func(_, v any) bool { // another request of the key ends meanwhile
			v.(Store).Settle(Event{KeyID: hex.EncodeToString(d[:len(d)/2]), RequestID: newRequestID(), Cost: 2 * usd, Time: time.Now()})
			return true
		})
		answers(503, "application/json", bad)(w, r)
	})
	text := strings.Replace(twoSites(first.address(), "\t\tfallback test/second"), "name tester", "name tester\n\t\tspend_cap_usd 1 month", 1)
	g := startGateway(t, up.address(), text)
	r := g.post(ask("test/first", ""))
	if r.StatusCode != 502 || len(up.received()) != 0 {
		t.Errorf("%s %s; the fallback was asked %d times", r.Status, r.body, len(up.received()))
	}
	want := []Tried{{"test/first", "bad", "503"}, {"test/second", "up", "spend_cap"}}
	if list := g.ledger(2); !reflect.DeepEqual(list[0].Tried, want) && !reflect.DeepEqual(list[1].Tried, want) {
		t.Errorf("ledger: %+v", list)
	}
}

func adapt(text string) error {
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	return err
}

func BenchmarkRoute(b *testing.B) {
	for _, size := range []int{10, 500} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			up := &Upstream{Name: "up"}
			var models []*Model
			for i := range size {
				models = append(models, &Model{Name: fmt.Sprintf("provider/model-%d", i), Targets: []*Target{{Upstream: "up"}}})
			}
			for i := range size / 10 {
				models = append(models, &Model{Name: fmt.Sprintf("wild-%d/*", i), Targets: []*Target{{Upstream: "up"}}})
			}
			x := &exchange{h: &Handler{models: newModelTable(models, map[string]*Upstream{"up": up})}, key: new(Key)}
			names := []string{"provider/model-7", "wild-0/anything"}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if list, refusal := x.route(&chatRequest{model: names[i%2]}); refusal != nil || len(list) != 1 {
					b.Fatal(refusal)
				}
			}
		})
	}
}
