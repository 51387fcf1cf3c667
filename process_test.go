package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// buildDir holds the command, if a test needs it.
var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "mesh"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// A reload or a restart closes idle connections, perhaps while a test sends its next request on one.
	http.DefaultTransport.(*http.Transport).DisableKeepAlives = true
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

var buildCaddy = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "caddy")
	out, err := exec.Command("go", "build", "-o", path, "./cmd/caddy").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building cmd/caddy: %w\n%s", err, out)
	}
	return path, nil
})

// process is a Caddy in a process of its own, with everything it keeps in a folder of the test's.
type process struct {
	t    testing.TB
	url  string // of $ADDRESS, without a path
	dir  string
	vars *strings.Replacer

	binary string
	admin  *http.Client
	child  *child
}

// startProcess runs a Caddy with a Caddyfile and returns as soon as it listens on $ADDRESS. $UPSTREAM stands for an
// upstream's address, $DIR for the process's folder, and $OPTIONS, inside a block of global options, for those that
// keep it to itself; a Caddyfile without $OPTIONS gets such a block.
func startProcess(t testing.TB, upstream, caddyfile string) *process {
	t.Helper()
	binary, err := buildCaddy()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "mesh") // t.TempDir is too long for a socket: 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	p := &process{t: t, url: "http://" + address, dir: dir, binary: binary}
	p.vars = strings.NewReplacer("$UPSTREAM", upstream, "$DIR", dir, "$ADDRESS", address,
		"$OPTIONS", "admin unix//"+p.path("admin")+"\n\tskip_install_trust\n\tauto_https disable_redirects\n\tdebug")
	p.admin = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, // each would be a file and two goroutines of the process
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", p.path("admin"))
		},
	}}
	t.Cleanup(func() {
		p.kill(os.Kill)
		os.RemoveAll(dir)
	})
	p.write(caddyfile)
	p.start()
	return p
}

func (p *process) path(name string) string { return filepath.Join(p.dir, name) }

// write sets the Caddyfile, for a reload or a restart.
func (p *process) write(caddyfile string) {
	p.t.Helper()
	if !strings.Contains(caddyfile, "$OPTIONS") {
		caddyfile = "{\n\t$OPTIONS\n}\n" + caddyfile
	}
	if err := os.WriteFile(p.path("Caddyfile"), []byte(p.vars.Replace(caddyfile)), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// command returns caddy with arguments, as seen from the process's folder.
func (p *process) command(args ...string) *exec.Cmd {
	cmd := exec.Command(p.binary, args...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), "HOME="+p.dir, "XDG_DATA_HOME="+p.path("data"), "XDG_CONFIG_HOME="+p.path("config"))
	return cmd
}

// start runs the process; after a kill, with all that it had kept.
func (p *process) start() {
	p.t.Helper()
	p.child = startChild(p.t, p.command("run", "--config", "Caddyfile"), p.path("log"))
	eventually(p.t, "Caddy listens", func() bool {
		if p.child.over() {
			p.t.Fatalf("Caddy ended:\n%s", p.log())
		}
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// kill sends a signal that ends the process, and waits for the end. It does nothing if that has come already.
func (p *process) kill(signal os.Signal) {
	p.t.Helper()
	if p.child == nil {
		return
	}
	if err := p.child.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("sending %s: %v", signal, err)
	}
	select {
	case <-p.child.ended:
	case <-time.After(30 * time.Second):
		p.t.Errorf("%s did not end the process", signal)
		p.child.end()
	}
}

// restart ends the process with a signal and starts it again on the same data.
func (p *process) restart(signal os.Signal) {
	p.t.Helper()
	p.kill(signal)
	p.start()
}

// reload replaces the running configuration, as `caddy reload` does.
func (p *process) reload(caddyfile string) {
	p.t.Helper()
	p.write(caddyfile)
	if out, code := p.run("reload", "--config", "Caddyfile"); code != 0 {
		p.t.Fatalf("reload: exit code %d\n%s", code, out)
	}
	awaitOneListener(p.t, p.url)
}

// run runs another caddy command beside the process, and returns what it prints.
func (p *process) run(args ...string) (output string, code int) {
	p.t.Helper()
	cmd := p.command(args...)
	out, err := cmd.CombinedOutput()
	if _, failed := errors.AsType[*exec.ExitError](err); err != nil && !failed {
		p.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// log returns everything the process has printed, over all restarts.
func (p *process) log() string {
	p.t.Helper()
	all, err := os.ReadFile(p.path("log"))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(all)
}

// fds returns how many files the process has open, sockets included. It needs Linux.
func (p *process) fds() int {
	p.t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.child.Pid))
	if err != nil {
		p.t.Skip("counting open files: ", err)
	}
	return len(open)
}

// goroutines returns how many goroutines the process has, and what they are doing.
func (p *process) goroutines() (n int, stacks string) {
	p.t.Helper()
	stacks = p.adminGet("/debug/pprof/goroutine?debug=1")
	if _, err := fmt.Sscanf(stacks, "goroutine profile: total %d", &n); err != nil {
		p.t.Fatalf("%v in %.200q", err, stacks)
	}
	return n, stacks
}

// adminGet returns what the admin endpoint answers.
func (p *process) adminGet(path string) string {
	p.t.Helper()
	resp, err := p.admin.Get("http://127.0.0.1" + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		p.t.Fatalf("%s: %s, %v, %s", path, resp.Status, err, body)
	}
	return string(body)
}

// gateway returns the requests that a gateway in the test's own process offers, sent to this one.
func (p *process) gateway() *gateway {
	return &gateway{t: p.t, url: p.url, dir: p.dir, vars: p.vars}
}

const inSite = "http://$ADDRESS {\n%s\n}\n"

// TestProcessIsItsOwn tries the tests' own tools: that they tell the truth.
func TestProcessIsItsOwn(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site("")))
	g := p.gateway()
	served := func() {
		t.Helper()
		if r := g.post(chatBody); r.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
	served()
	if n, stacks := p.goroutines(); n < 5 || !strings.Contains(stacks, "net/http") {
		t.Errorf("%d goroutines:\n%s", n, stacks)
	}
	before := p.fds()
	for range 10 { // some that are open now may be about to be closed
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	eventually(t, "the process has more files open", func() bool { return p.fds() >= before+5 })

	p.reload(fmt.Sprintf(inSite, "respond /reloaded yes\n"+site("")))
	if r := g.do(http.MethodGet, "/reloaded", ""); !bytes.Equal(r.body, []byte("yes")) {
		t.Errorf("after a reload: %s %s", r.Status, r.body)
	}
	p.write("http://$ADDRESS {\n\tnonsense\n}")
	if out, code := p.run("reload", "--config", "Caddyfile"); code != 1 || !strings.Contains(out, "Caddyfile:8") {
		t.Errorf("a bad reload: exit code %d\n%s", code, out)
	}
	served()

	p.write(fmt.Sprintf(inSite, site("")))
	for _, signal := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		pid := p.child.Pid
		p.restart(signal)
		served()
		if p.child.Pid == pid {
			t.Errorf("%s: still the same process", signal)
		}
	}
	// Caddy says so last, when it has served for a moment
	eventually(t, "the log tells of three starts", func() bool { return strings.Count(p.log(), "serving initial configuration") == 3 })
}
