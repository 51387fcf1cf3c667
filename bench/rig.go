//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// rig is what every run stands on: a folder, a Caddy with the module, an upstream, and the processes started so far.
type rig struct {
	dir      string
	binary   string // a Caddy
	upstream *server

	mu        sync.Mutex
	processes []*process
	closed    bool
}

// newRig builds Caddy and starts the upstream. When the context ends, so do all processes, and what waits for them fails.
func newRig(ctx context.Context) (*rig, error) {
	dir, err := os.MkdirTemp("", "mesh-bench")
	if err != nil {
		return nil, err
	}
	r := &rig{dir: dir, binary: filepath.Join(dir, "caddy")}
	context.AfterFunc(ctx, r.end)
	for _, step := range []func() error{raiseFileLimit, func() error { return r.build(ctx) }, r.startUpstream} {
		if err := step(); err != nil {
			r.close()
			return nil, err
		}
	}
	return r, nil
}

func (r *rig) build(ctx context.Context) error {
	progress("building cmd/caddy")
	out, err := exec.CommandContext(ctx, "go", "build", "-o", r.binary, "github.com/caddymesh/mesh/cmd/caddy").CombinedOutput()
	if err != nil {
		return fmt.Errorf("building cmd/caddy: %w\n%s", err, out)
	}
	return nil
}

// startUpstream executes this program again.
func (r *rig) startUpstream() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, upstreamCommand)
	if _, err = cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p, err := r.start("upstream", cmd)
	if err != nil {
		return err
	}
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return fmt.Errorf("the upstream has ended: %w\n%s", err, p.said())
	}
	r.upstream = &server{process: p, address: strings.TrimSpace(address)}
	return nil
}

// end kills every process, each by its id.
func (r *rig) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for _, p := range r.processes {
		if !p.hasEnded() { // its id may be another's by now
			p.kill()
		}
	}
	r.processes = nil
}

func (r *rig) close() {
	r.end()
	if err := os.RemoveAll(r.dir); err != nil {
		progress("%v", err)
	}
}

// progress tells the person who waits what is done now. The standard output is for the table.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
