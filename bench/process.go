//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// process is a server that this program has started, with what it has started itself.
type process struct {
	name  string
	pid   int // and the id of its group
	log   string
	ended chan struct{} // is closed when it has ended
}

const (
	startTimeout = 60 * time.Second
	endTimeout   = 30 * time.Second
)

// start runs a command in a group of its own, which an interrupt from the keyboard does not reach: it is ended in order.
func (r *rig) start(name string, cmd *exec.Cmd) (*process, error) {
	p := &process{name: name, log: filepath.Join(r.dir, name+".log"), ended: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}

	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, context.Canceled
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p.pid = cmd.Process.Pid
	r.processes = append(r.processes, p)
	go func() {
		defer close(p.ended)
		cmd.Wait() //nolint:errcheck // a killed process has no other way to end
	}()
	return p, nil
}

// stop asks the process to end, and makes it. It reports whether the process ended when it was asked.
func (p *process) stop() bool {
	p.signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(endTimeout):
	}
	asked := p.hasEnded()
	p.kill() // what it had started too
	return asked
}

// kill ends it as a power cut does.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.ended
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// signal reaches the process and those it has started. Where all have ended there is no group any more.
func (p *process) signal(s syscall.Signal) { syscall.Kill(-p.pid, s) } //nolint:errcheck

// ready waits until probe succeeds.
func (p *process) ready(ctx context.Context, probe func() error) error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := probe()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ended:
			return fmt.Errorf("%s has ended:\n%s", p.name, p.said())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not ready: %w\n%s", p.name, err, p.said())
		}
	}
}

// said is the end of what the process has printed.
func (p *process) said() []byte {
	all, err := os.ReadFile(p.log)
	if err != nil {
		return []byte(err.Error())
	}
	return bytes.TrimSpace(all[max(0, len(all)-3000):])
}

// freeAddress returns an address of loopback that nothing listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// dials reports whether something listens.
func dials(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// wait lets time pass, unless the run is ended.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// raiseFileLimit lets this process and its children have as many connections as the system allows.
func raiseFileLimit() error {
	var limit syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	limit.Cur = limit.Max
	return errors.Join(err, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
}
