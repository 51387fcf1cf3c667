package mesh

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

func init() { caddy.RegisterModule(new(instant)) }

// instant is an upstream's handler that has the answer at hand.
type instant struct{}

func (*instant) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_instant", New: func() caddy.Module { return new(instant) }}
}

func (*instant) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return err
	}
	w.Header()["Content-Type"] = jsonType
	_, err := w.Write(instantAnswer)
	return err
}

var (
	jsonType      = []string{"application/json"}
	instantAnswer = []byte(completion)
)

// BenchmarkPath is what a completion costs in the gateway itself: without Caddy's server before it and without
// reverse_proxy behind it, but with what the local store writes.
func BenchmarkPath(b *testing.B) {
	ctx, err := caddy.ProvisionContext(&caddy.Config{AppsRaw: caddy.ModuleMap{"mesh": []byte("{}")}})
	if err != nil {
		b.Fatal(err)
	}
	module, err := ctx.LoadModuleByID("http.handlers.mesh", fmt.Appendf(nil, `{
		"store": {"module": "local", "path": %q},
		"keys": [{"key": %q, "rpm": 1000000000, "spend_cap_usd": "1000000000"}],
		"upstreams": [{"name": "up", "base_path": "/v1", "api_key": "sk-upstream", "handle": {"handler": "test_instant"}}],
		"models": [{"name": "test/priced", "upstreams": [{"upstream": "up"}], "price": {"input": "2.50", "output": "10"}}],
		"default_model": "test/priced"
	}`, b.TempDir()+"/mesh.db", testKey))
	if err != nil {
		b.Fatal(err)
	}
	h := module.(*Handler)
	h.logger = zap.NewNop()
	if err := h.start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.Cleanup() })
	body := strings.Replace(chatBody, "plain", "priced", 1)
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(body))
		r.Header["Authorization"] = []string{"Bearer " + testKey}
		r.Header["Content-Type"] = jsonType
		log := new(caddyhttp.ExtraLogFields)
		r = r.WithContext(context.WithValue(r.Context(), caddyhttp.ExtraLogFieldsCtxKey, log))
		w := httptest.NewRecorder()
		if err := h.ServeHTTP(w, r, nil); err != nil || w.Code != http.StatusOK {
			b.Fatal(err, w.Code, w.Body.String())
		}
	}
}

func BenchmarkBearer(b *testing.B) {
	r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", nil)
	r.Header["Authorization"] = []string{"Bearer " + testKey}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := bearer(r); !ok {
			b.Fatal("no key")
		}
	}
}

func BenchmarkReadAnswer(b *testing.B) {
	body := []byte(completion)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if said := readAnswer(body, nil); !said.hasUsage {
			b.Fatal("no usage")
		}
	}
}

func BenchmarkDescribeLimits(b *testing.B) {
	header := make(http.Header)
	b.ReportAllocs()
	for b.Loop() {
		Limits{RPM: 60, RPD: 10_000}.describe(Verdict{Minute: Window{Used: 12, Reset: 30e9}, Day: Window{Used: 345, Reset: 3600e9}}, header)
	}
}
