package mesh

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestReloadsDoNotMultiplyWorkers reloads twice while jobs run.
func TestReloadsDoNotMultiplyWorkers(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		var running, most, entered, excess atomic.Int64
		open := make(chan struct{})
		most.Store(3)
		up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			if n := running.Add(1); n > most.Load() {
				excess.Store(n)
			}
			entered.Add(1)
			<-open
			running.Add(-1)
			answers(200, "application/json", completion)(w, r)
		})
		config := func(workers int) string {
			return jobSite(store, "", fmt.Sprintf("\tasync {\n\t\tworkers %d\n\t}", workers))
		}
		g := startGateway(t, up.address(), config(3))
		var paths []string
		for range 8 {
			paths = append(paths, g.submit(asyncBody))
		}
		eventually(t, "three run", func() bool { return entered.Load() == 3 })
		most.Store(2)
		for _, more := range []string{"", "\n# changed"} {
			g.load("http://$ADDRESS {\n" + strings.Replace(config(2), "name tester", "name tester"+more, 1) + "\n}\n")
		}
		time.AfterFunc(300*time.Millisecond, func() { close(open) }) // in which others would begin
		for _, path := range paths {
			g.becomes(path, JobCompleted)
		}
		if n := excess.Load(); n > 0 || entered.Load() != 8 {
			t.Errorf("%d ran at a time; the upstream was asked %d times", n, entered.Load())
		}
	})
}

// TestSitesWithOneQueueShareItsWorkers has two sites of one configuration.
func TestSitesWithOneQueueShareItsWorkers(t *testing.T) {
	var running, excess atomic.Int64
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if n := running.Add(1); n > 2 {
			excess.Store(n)
		}
		time.Sleep(50 * time.Millisecond) // in which others would begin
		running.Add(-1)
		answers(200, "application/json", completion)(w, r)
	})
	config := jobSite("store local $DIR/mesh.db", "", "\tasync {\n\t\tworkers 2\n\t}")
	g := startGateway(t, up.address(), "handle /v1/* {\n"+config+"\n}\nhandle_path /llm/* {\n"+config+"\n}")
	var paths []string
	for range 8 {
		paths = append(paths, g.submit(asyncBody))
	}
	for _, path := range paths {
		g.becomes(path, JobCompleted)
	}
	if n := excess.Load(); n > 0 {
		t.Errorf("%d ran at a time", n)
	}
}
