package mesh

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestJobThatIsRunAgainPaysForOneChoice ends its process when the model has been chosen and asked.
func TestJobThatIsRunAgainPaysForOneChoice(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			jobStores(t, func(t *testing.T, store string) {
				if testing.Short() && signal == syscall.SIGKILL && strings.Contains(store, "redis") {
					t.Skip("a lease must run out")
				}
				gate := &upstreamGate{open: make(chan struct{})}
				up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
					if r.ContentLength > 500 { // to the classifier, which is told what to do
						routes(saying("paid/small"))(w, r)
						return
					}
					gate.ServeHTTP(w, r)
				})
				t.Cleanup(gate.let)
				p := startProcess(t, up.address(), fmt.Sprintf(inSite, jobSite(store, "", autoBlock)))
				g := p.gateway()
				path := g.submit(autoBody(`,"async_mode":true`))
				eventuallyIn(t, time.Minute, "it runs", func() bool { return gate.entered.Load() == 1 })
				eventually(t, "the choice is in the ledger", func() bool { return len(g.usageEvents()) == 1 })
				p.restart(signal)
				eventuallyIn(t, time.Minute, "it runs again", func() bool { return gate.entered.Load() == 2 })
				gate.let()
				id := g.becomes(path, JobCompleted).RequestID
				eventually(t, "the job is in the ledger", func() bool { return len(g.ledgerOf(id)) == 1 })
				if n := len(up.received()); n != 4 {
					t.Errorf("%d calls", n)
				}
				events, sum := g.usageEvents(), Money(0)
				for _, e := range events {
					sum += e.Cost
				}
				if len(events) != 2 || sum != 4_500_000+58_000 {
					t.Errorf("%+v", events)
				}
				if total := g.usage(t, "{}").TotalCost; total != sum {
					t.Errorf("%s of usage, %s in the ledger", total, sum)
				}
				for _, e := range events {
					if e.ParentID != "" && (e.ParentID != id || e.RequestID == id || dayOfRequest(e.RequestID) != dayOfRequest(id)) {
						t.Errorf("%+v", e)
					}
				}
			})
		})
	}
}

func TestJobHasTheModelThatWasAskedFor(t *testing.T) {
	config := strings.Replace(site(autoBlock), "default_model test/plain", "default_model auto", 1)
	g := startGateway(t, routed(t, saying("paid/small")).address(), config)
	for name, body := range map[string]string{
		"asked for":   autoBody(`,"async_mode":true`),
		"the default": `{"async_mode":true,"messages":[{"role":"user","content":"Hi"}]}`,
	} {
		submitted := g.post(body)
		job := submitted.job(t, http.StatusAccepted)
		if job.Model != autoModel {
			t.Errorf("%s: at its submit its model is %s", name, job.Model)
		}
		job = g.becomes(submitted.Header.Get("Location"), JobCompleted)
		if job.Model != autoModel || !strings.Contains(string(job.Response), `"x_resolved_model_id":"paid/small"`) {
			t.Errorf("%s: its model is %s; %s", name, job.Model, job.Response)
		}
	}
	for _, e := range g.ledger(4) {
		if e.Model == autoModel {
			t.Errorf("%+v", e)
		}
	}
}

// usageEvents are the entries of the ledger that the key's owner sees.
func (g *gateway) usageEvents() []publicEvent {
	g.t.Helper()
	var page struct{ Events []publicEvent }
	r := g.do(http.MethodPost, eventsPath, `{"limit":200}`)
	if err := json.Unmarshal(r.body, &page); err != nil {
		g.t.Fatalf("%v in %s", err, r.body)
	}
	return page.Events
}
