package mesh

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

// hangupSite is a site with jobs at an upstream with an on_hangup.
func hangupSite(store, hangup string) string {
	return fmt.Sprintf(inSite, strings.Replace(jobSite(store, "", ""), "api_key sk-upstream", "api_key sk-upstream\n\t\ton_hangup "+hangup, 1))
}

// end ends the process with a signal, and has something happen when it is about to.
func (p *process) end(meanwhile func()) {
	p.t.Helper()
	if err := p.child.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	eventually(p.t, "it has the signal", func() bool { return strings.Contains(p.log(), "exiting; byeee") })
	meanwhile()
	p.kill(syscall.SIGTERM)
}

func (g *gateway) publicEvent(requestID string) (e publicEvent) {
	g.t.Helper()
	eventually(g.t, "the ledger has it", func() bool {
		var found struct{ Event publicEvent }
		r := g.do(http.MethodGet, requestsPath+requestID, "")
		if err := json.Unmarshal(r.body, &found); err != nil {
			g.t.Fatalf("%v in %s", err, r.body)
		}
		e = found.Event
		return r.StatusCode == http.StatusOK
	})
	return e
}

// TestJobThatEndsWhileItsProcessDoesHasEnded lets the upstream answer after the signal.
func TestJobThatEndsWhileItsProcessDoesHasEnded(t *testing.T) {
	for _, hangup := range []string{"drain", "cancel"} {
		t.Run(hangup, func(t *testing.T) {
			jobStores(t, func(t *testing.T, store string) {
				gate, up := startGate(t)
				config := hangupSite(store, hangup)
				p := startProcess(t, up.address(), config)
				g := p.gateway()
				paths := []string{g.submit(asyncBody)}
				eventually(t, "it runs", func() bool { return gate.entered.Load() == 1 })
				p.reload(strings.Replace(config, "name tester", "name tester\n# changed", 1))
				paths = append(paths, g.submit(asyncBody)) // each is another configuration's
				eventually(t, "both run", func() bool { return gate.entered.Load() == 2 })
				p.end(gate.let)
				p.start()
				for _, path := range paths {
					j := g.job(path)
					if j.Status != JobCompleted || !strings.Contains(string(j.Response), "Hello") {
						t.Errorf("%+v", j)
					}
					if e := g.publicEvent(j.RequestID); e.Outcome != OutcomeCompleted || e.StatusCode != 200 || e.Estimated || e.Cost != 4_500_000 {
						t.Errorf("%+v", e)
					}
				}
				if n := gate.entered.Load(); n != 2 {
					t.Errorf("the upstream was asked %d times", n)
				}
			})
		})
	}
}

// TestEndOfAProcessDoesNotWaitForDrains has an upstream that does not answer. One of its jobs was cancelled before.
func TestEndOfAProcessDoesNotWaitForDrains(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		gate, up := startGate(t)
		p := startProcess(t, up.address(), hangupSite(store, "drain 1h"))
		g := p.gateway()
		running, cancelled := g.submit(asyncBody), g.submit(asyncBody)
		eventually(t, "both run", func() bool { return gate.entered.Load() == 2 })
		g.do(http.MethodDelete, cancelled, "").job(t, http.StatusOK)
		p.end(func() {
			eventually(t, "the upstream is left", func() bool { return gate.left.Load() == 2 })
		})
		p.start()
		eventually(t, "it runs again", func() bool { return gate.entered.Load() == 3 })
		gate.let()
		g.becomes(running, JobCompleted)
		j := g.job(cancelled)
		if e := g.publicEvent(j.RequestID); j.Status != JobCancelled || e.Outcome != OutcomeClientGone || e.StatusCode != clientClosedRequest ||
			e.ErrorCode != "" || !e.Estimated || e.Cost == 0 {
			t.Errorf("%s, %+v", j.Status, e)
		}
		if n := gate.entered.Load(); n != 3 {
			t.Errorf("the upstream was asked %d times", n)
		}
	})
}

// TestCancelledJobWhoseProcessDiesIsNoError kills it while the answer is drained.
func TestCancelledJobWhoseProcessDiesIsNoError(t *testing.T) {
	gate, up := startGate(t)
	p := startProcess(t, up.address(), hangupSite("store local $DIR/mesh.db", "drain 1h"))
	g := p.gateway()
	path := g.submit(asyncBody)
	eventually(t, "it runs", func() bool { return gate.entered.Load() == 1 })
	j := g.do(http.MethodDelete, path, "").job(t, http.StatusOK)
	p.restart(syscall.SIGKILL)
	if e := g.publicEvent(j.RequestID); e.Outcome != OutcomeLost || e.StatusCode != clientClosedRequest || e.ErrorCode != "" || e.Cost == 0 {
		t.Errorf("%+v", e)
	}
	if j := g.job(path); j.Status != JobCancelled {
		t.Errorf("%+v", j)
	}
}
