package mesh

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestStopTellsThoseItDoesNotWaitFor stops a Caddy whose grace_period is shorter than its requests: streams that have
// begun, one of them of a configuration before, an answer that has not, and a compare, at upstreams with each policy.
func TestStopTellsThoseItDoesNotWaitFor(t *testing.T) {
	for _, policy := range []string{hangupCancel, hangupDrain, hangupFree} {
		t.Run(policy, func(t *testing.T) {
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if strings.Contains(string(body), `"quick"`) {
					answers(200, "application/json", completion)(w, r)
					return
				}
				if strings.Contains(string(body), `"stream":true`) {
					streams(false, roleFrame, wordFrame)(w, r)
				}
				select {
				case <-r.Context().Done():
				case <-time.After(time.Minute):
				}
			})
			text := site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}")
			text = strings.Replace(text, "api_key sk-upstream", "api_key sk-upstream\n\t\ton_hangup "+policy, 1)
			config := "{\n\t$OPTIONS\n\tgrace_period 300ms\n}\n" + fmt.Sprintf(inSite, text)
			p := startProcess(t, up.address(), config)
			g := p.gateway()
			var all sync.WaitGroup
			asked := func(n int) {
				t.Helper()
				eventually(t, "the upstream is asked", func() bool { return len(up.received()) == n })
			}
			ask := func(path, body string, check func(r *reply)) {
				all.Go(func() {
					r := g.do(http.MethodPost, path, body, "Content-Type", "application/json")
					check(r)
				})
			}
			cut := func(r *reply) {
				want := roleFrame + wordFrame + errorFrame(errEnding.code, errEnding.message, r.Header.Get("X-Request-Id"))
				if string(r.body) != want {
					t.Errorf("got  %q\nwant %q", r.body, want)
				}
			}
			ask(chatPath, chatFor("test/priced", `"stream":true`), cut)
			asked(1)
			p.reload(strings.Replace(config, "mesh {", "header X-Generation 2\nmesh {", 1))
			ask(chatPath, chatFor("test/priced", `"stream":true`), cut)
			ask(chatPath, chatFor("test/priced"), func(r *reply) {
				if r.StatusCode != http.StatusServiceUnavailable || r.errorCode(t) != errEnding.code || r.Header.Get("Retry-After") == "" {
					t.Errorf("%s %s", r.Status, r.body)
				}
			})
			ask(comparePath, `{"models":["test/quick","test/priced"],"skip_comparison":true,"messages":[{"role":"user","content":"hi"}]}`, func(r *reply) {
				if r.StatusCode != http.StatusOK || !strings.Contains(string(r.body), `"partial":true`) || !strings.Contains(string(r.body), errEnding.code) {
					t.Errorf("%s %s", r.Status, r.body)
				}
			})
			asked(5)
			p.kill(syscall.SIGTERM)
			all.Wait()
			var charged, outcomes []string
			sum := Money(0)
			for _, e := range readLedger(t, p.path("mesh.db")) {
				outcomes = append(outcomes, fmt.Sprint(e.Outcome, " ", e.Error))
				if sum += e.Cost; e.Cost > 0 {
					charged = append(charged, fmt.Sprint(e.Outcome, " ", e.Estimated))
				}
			}
			if len(outcomes) != 5 || strings.Count(strings.Join(outcomes, ","), errEnding.code) != 4 {
				t.Errorf("the ledger says %q", outcomes)
			}
			if strings.Join(charged, ",") != "cut true,cut true" {
				t.Errorf("charged were %q", charged)
			}
		})
	}
}
