package mesh

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// siteNumber is a site that differs from every other one, so that a reload is one.
func siteNumber(i int, more string) string {
	return fmt.Sprintf(inSite, fmt.Sprintf("header X-Generation %d\n", i)+site(more))
}

// TestReloadLeavesOpenStreamsAlone opens 100 streams, reloads three times while they flow, and lets them end when
// their configuration is long gone.
func TestReloadLeavesOpenStreamsAlone(t *testing.T) {
	const n = 100
	release := make(chan struct{})
	var flowing atomic.Int32
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, roleFrame)
		http.NewResponseController(w).Flush()
		flowing.Add(1)
		<-release
		for range 20 {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
			time.Sleep(10 * time.Millisecond)
		}
		io.WriteString(w, finishFrame+usageFrame+doneFrame)
	})
	const priced = "\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"
	p := startProcess(t, up.address(), siteNumber(0, priced))
	g := p.gateway()
	bodies := make(chan string, n)
	for range n {
		go func() {
			r := g.post(strings.Replace(streamBody, "plain", "priced", 1))
			bodies <- string(r.body)
		}()
	}
	eventually(t, "all streams flow", func() bool { return flowing.Load() == n })
	for i := range 3 {
		p.reload(siteNumber(i+1, priced))
	}
	close(release)
	p.reload(siteNumber(4, ""))
	want := roleFrame + strings.Repeat(wordFrame, 20) + finishFrame + doneFrame
	for range n {
		if got := <-bodies; got != want {
			t.Fatalf("got %q", got)
		}
	}
	p.kill(syscall.SIGTERM)
	events := readLedger(t, p.path("mesh.db"))
	if len(events) != n {
		t.Errorf("%d ledger entries", len(events))
	}
	for _, e := range events {
		if e.Cost != 4_500_000 || e.Outcome != OutcomeCompleted || e.Estimated {
			t.Errorf("%+v", e)
		}
	}
}

// readLedger opens a database that no process has open any more.
func readLedger(t *testing.T, path string) (events []Event) {
	t.Helper()
	store, err := (&LocalStore{path: path, maxEvents: defaultMaxEvents}).OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	defer store.Destruct()
	if err := store.(*localStore).events(func(e Event) bool { events = append(events, e); return true }); err != nil {
		t.Fatal(err)
	}
	return events
}

func TestReloadsLeaveNothingBehind(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), siteNumber(0, ""))
	g := p.gateway()
	reloads := func(from, n int) {
		for i := range n {
			p.reloadByAdmin(siteNumber(from+i, ""))
			if r := g.post(chatBody); r.StatusCode != 200 || r.Header.Get("X-Generation") != fmt.Sprint(from+i) {
				t.Fatalf("%s, generation %s", r.Status, r.Header.Get("X-Generation"))
			}
		}
	}
	reloads(1, 10) // whatever is made once is made
	goroutines, stacks := p.goroutines()
	files := p.fds()
	before := p.metrics()
	reloads(11, 100)
	const slack = 10 // connections that are about to be closed
	settled := func() bool { n, _ := p.goroutines(); return n <= goroutines+slack && p.fds() <= files+slack }
	for end := time.Now().Add(20 * time.Second); !settled(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			n, after := p.goroutines()
			t.Fatalf("%d goroutines and %d files, from %d and %d\nbefore:\n%s\nafter:\n%s", n, p.fds(), goroutines, files, stacks, after)
		}
	}
	if metrics := p.adminGet("/metrics"); strings.Contains(metrics, "error gathering") {
		t.Errorf("metrics: %s", metrics)
	}
	after := p.metrics()
	const completed = `caddy_mesh_requests_total{model="test/*",outcome="completed",upstream="up"}`
	if len(after) != len(before) || before[completed] != 10 || after[completed] != 110 {
		t.Errorf("%d series with %v requests, then %d with %v", len(before), before[completed], len(after), after[completed])
	}
}

// reloadByAdmin is reload without a process for each.
func (p *process) reloadByAdmin(caddyfile string) {
	p.t.Helper()
	p.write(caddyfile)
	config, err := os.ReadFile(p.path("Caddyfile"))
	if err != nil {
		p.t.Fatal(err)
	}
	var resp *http.Response
	// the endpoint of the configuration before may take the connection, and close it
	eventually(p.t, "the admin endpoint takes a configuration", func() bool {
		resp, err = p.admin.Post("http://127.0.0.1/load", "text/caddyfile", bytes.NewReader(config))
		return err == nil
	})
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		p.t.Fatalf("reload: %s %s", resp.Status, body)
	}
	awaitOneListener(p.t, p.url)
}

func TestRestartDoesNotRefillTheDay(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	limited := fmt.Sprintf(inSite, strings.Replace(site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"), "name tester", "name tester\n\t\trpd 60\n\t\tspend_cap_usd 100", 1))
	body := strings.Replace(chatBody, "plain", "priced", 1)
	p := startProcess(t, up.address(), limited)
	g := p.gateway()
	if got := g.postAll(500, body); got[200] != 60 || got[429] != 440 {
		t.Errorf("before: %v", got)
	}
	time.Sleep(100 * time.Millisecond) // what was settled 50 ms ago is safe
	for _, signal := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		p.restart(signal)
		r := g.post(body)
		if r.StatusCode != 429 {
			t.Errorf("after %s: %s", signal, r.Status)
		}
	}
	p.kill(syscall.SIGTERM)
	sum := Money(0)
	events := readLedger(t, p.path("mesh.db"))
	for _, e := range events {
		sum += e.Cost
	}
	if len(events) != 60 || sum != 60*4_500_000 {
		t.Errorf("%d entries, %s USD", len(events), sum)
	}
}

func TestDamagedDatabaseStopsTheStartAndStaysAsItIs(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), siteNumber(0, ""))
	g := p.gateway()
	for range 50 {
		g.post(chatBody)
	}
	// validating while the gateway has the database open is no conflict
	if out, code := p.run("validate", "--config", "Caddyfile"); code != 0 {
		t.Errorf("validate beside a running gateway: %s", out)
	}
	p.kill(syscall.SIGTERM)
	whole, err := os.ReadFile(p.path("mesh.db"))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"truncated": whole[:len(whole)/2],
		"foreign":   []byte(strings.Repeat("SQLite format 3\x00", 1000)),
		"text":      []byte("notes"),
	} {
		if err := os.WriteFile(p.path("mesh.db"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		out, code := p.run("run", "--config", "Caddyfile")
		if code == 0 || !strings.Contains(out, "opening local store "+p.path("mesh.db")) {
			t.Errorf("%s: exit code %d\n%s", name, code, out)
		}
		if after, _ := os.ReadFile(p.path("mesh.db")); string(after) != string(content) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	// a running gateway stays when it is given one
	if err := os.WriteFile(p.path("mesh.db"), whole, 0o600); err != nil {
		t.Fatal(err)
	}
	p.start()
	if err := os.WriteFile(p.path("other.db"), []byte("notes"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.write(strings.Replace(siteNumber(1, ""), "mesh.db", "other.db", 1))
	if out, code := p.run("reload", "--config", "Caddyfile"); code == 0 || !strings.Contains(out, "other.db") {
		t.Errorf("reload: exit code %d\n%s", code, out)
	}
	if r := g.post(chatBody); r.StatusCode != 200 {
		t.Errorf("after a bad reload: %s %s", r.Status, r.body)
	}
}

func TestValidateRefusesEveryBadCaddyfile(t *testing.T) {
	binary, err := buildCaddy()
	if err != nil {
		t.Fatal(err)
	}
	files := goldenFiles(t, "bad")
	p := &process{t: t, binary: binary, dir: t.TempDir()}
	var wg sync.WaitGroup
	turns := make(chan struct{}, runtime.NumCPU())
	for _, path := range files {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			caddyfile, want := readGolden(t, path)
			name := filepath.Base(path)
			if err := os.WriteFile(p.path(name), []byte(caddyfile), 0o600); err != nil {
				t.Error(err)
				return
			}
			out, code := p.run("validate", "--adapter", "caddyfile", "--config", name)
			inLog, _ := encodeJSON(strings.TrimSpace(strings.ReplaceAll(want, "Caddyfile:", name+":")))
			want = strings.Trim(string(inLog), `"`)
			if code == 0 || !strings.Contains(out, want) {
				t.Errorf("%s: exit code %d, want %q in\n%s", name, code, want, out)
			}
		})
	}
	wg.Wait()
}
