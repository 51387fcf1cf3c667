package mesh

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAccessLogSaysWhatWasRefused(t *testing.T) {
	const expired = "rsk_01BX5ZZKBKACTAV9WEVGEMMVS2"
	g := startGateway(t, "127.0.0.1:1", "log\n"+strings.Replace(site("\tkey "+expired+" {\n\t\texpires 2020-01-01T00:00:00Z\n\t}"), "name tester", "name tester\n\t\tmodels test/plain", 1))
	const hi = `"messages":[{"role":"user","content":"Hi"}]`
	long := strings.Repeat("x", 300)
	cases := []struct {
		authorization, body  string
		error                string
		model, reason, field any
	}{
		{"Bearer " + testKey, `{"model":"tset/plain",` + hi + `}`, "model_not_found", "tset/plain", nil, nil},
		{"Bearer " + testKey, `{"model":"` + long + `",` + hi + `}`, "model_not_found", long[:maxModelName], nil, nil},
		{"Bearer " + testKey, `{"model":"test/other",` + hi + `}`, "forbidden", "test/other", nil, nil},
		{"Bearer " + testKey, `{"models":["gone/x"],` + hi + `}`, "model_not_found", "gone/x", nil, nil},
		{"Bearer " + testKey, `{"temperature":"hot","messages":7}`, "validation_error", nil, nil, "temperature"},
		{"Bearer " + testKey, `{"messages":[{"role":"user","content":"Hi"},{"role":3}]}`, "validation_error", nil, nil, "messages[1].role"},
		{"Bearer " + testKey, `7`, "invalid_request", nil, nil, nil},
		{"Bearer " + expired, `{` + hi + `}`, "unauthorized", nil, "expired", nil},
		{"Bearer " + otherKey, `{` + hi + `}`, "unauthorized", nil, "unknown", nil},
		{"Bearer rsk_short", `{` + hi + `}`, "unauthorized", nil, "malformed", nil},
		{testKey, `{` + hi + `}`, "unauthorized", nil, "malformed", nil},
		{"Bearer ", `{` + hi + `}`, "unauthorized", nil, "missing", nil},
		{"", `{` + hi + `}`, "unauthorized", nil, "missing", nil},
	}
	said := make(map[string]bool)
	ids := make([]string, len(cases)) // an entry is written after the answer, and perhaps after the next one's
	for i, tc := range cases {
		r := g.post(tc.body, "Authorization", tc.authorization)
		ids[i] = r.Header.Get("X-Request-Id")
		if code := r.errorCode(t); code != tc.error {
			t.Errorf("%.100s: %s, want %s", tc.body, code, tc.error)
		}
		if tc.reason == "unknown" || tc.reason == "malformed" || tc.reason == "missing" {
			said[fmt.Sprint(r.Status, r.decode(t)["error"])] = true
		}
	}
	if len(said) != 1 {
		t.Errorf("a client can tell why its key is not accepted: %v", said)
	}
	entries := accessLog(t, func() string {
		text, _ := os.ReadFile(filepath.Join(g.dir, "caddy.log"))
		return string(text)
	}, len(cases))
	byID := make(map[string]map[string]any)
	for _, entry := range entries {
		if mesh, ok := entry["mesh"].(map[string]any); ok {
			byID[fmt.Sprint(mesh["request_id"])] = entry
		}
	}
	for i, tc := range cases {
		wantFields(t, byID[ids[i]], map[string]any{"mesh": map[string]any{
			"outcome": "refused", "error": tc.error, "model": tc.model, "reason": tc.reason, "field": tc.field}})
	}
}
