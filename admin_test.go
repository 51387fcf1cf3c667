package mesh

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// health returns what the admin endpoint says of the gateway's stores.
func (p *process) health() (status int, body string) {
	p.t.Helper()
	resp, err := p.admin.Get("http://127.0.0.1/mesh/health")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var raw json.RawMessage
	if err := json.NewDecoder(resp.Body).Decode(&raw); err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

func TestHealthNamesTheStore(t *testing.T) {
	p := startProcess(t, "127.0.0.1:1", siteNumber(0, ""))
	want := `{"status":"ok","stores":[{"name":"local:` + p.path("mesh.db") + `","store":"local ` + p.path("mesh.db") + `","degraded":false,"on_failure":"","waiting":0}]}`
	if status, body := p.health(); status != 200 || body != want {
		t.Errorf("%d %s", status, body)
	}
}

func TestHealthTellsOfAnOutage(t *testing.T) {
	server := startRedis(t)
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), "http://$ADDRESS {\nmesh {\n\tstore redis {\n\t\taddress "+server.address+"\n\t\tjournal $DIR/journal.db\n\t}\n"+
		"\tkey "+testKey+"\n\tupstream up http://$UPSTREAM/v1\n\tmodel test/* up\n}\n}\n")
	g := p.gateway()
	healthy := func() bool { status, _ := p.health(); return status == 200 }
	eventually(t, "the store is reached", healthy)
	server.kill()
	eventually(t, "the outage shows", func() bool { g.post(chatBody); return !healthy() })
	if r := g.post(chatBody); r.StatusCode != http.StatusOK {
		t.Errorf("degraded: %s %s", r.Status, r.body)
	}
	if status, body := p.health(); status != 503 {
		t.Errorf("%d %s", status, body)
	}
	server.start()
	eventually(t, "the store is back", healthy)
}

// asksAdmin is an app that asks the admin endpoint while its configuration starts.
type asksAdmin struct{}

func init() { caddy.RegisterModule(asksAdmin{}) }

// CaddyModule returns the Caddy module information.
func (asksAdmin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "asks_admin", New: func() caddy.Module { return asksAdmin{} }}
}

func (asksAdmin) Start() error {
	adminAtStart <- adminStatuses()
	return nil
}

func (asksAdmin) Stop() error { return nil }

var adminAtStart = make(chan [2]int, 1)

// adminStatuses returns with what the endpoint answers that it has no store, and not one of a name.
func adminStatuses() (statuses [2]int) {
	for i, path := range []string{keysPath, keysPath + "?store=local:x"} {
		err := serveKeys(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, path, nil))
		if refusal, ok := errors.AsType[caddy.APIError](err); ok {
			statuses[i] = refusal.HTTPStatus
		}
	}
	return statuses
}

func TestAdminSaysWhetherThereIsNoStoreOrNoneYet(t *testing.T) {
	if err := caddy.Load([]byte(`{"admin":{"disabled":true,"config":{"persist":false}},"apps":{"asks_admin":{}}}`), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	if got := <-adminAtStart; got != [2]int{503, 503} {
		t.Errorf("while Caddy starts: %v", got)
	}
	if got := adminStatuses(); got != [2]int{404, 404} {
		t.Errorf("without a mesh handler: %v", got)
	}
}
