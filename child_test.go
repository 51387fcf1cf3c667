package mesh

import (
	"os"
	"os/exec"
	"testing"
)

// child is a process that a test runs.
type child struct {
	*os.Process
	ended chan struct{} // is closed when it has ended
}

// startChild runs a command, which adds what it prints to a file.
func startChild(t testing.TB, cmd *exec.Cmd, log string) *child {
	t.Helper()
	output, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{Process: cmd.Process, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		cmd.Wait() //nolint:errcheck // a killed process has no other way to end
	}()
	return c
}

// over reports whether it has ended.
func (c *child) over() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// end ends it as a power cut does.
func (c *child) end() {
	c.Kill() //nolint:errcheck // it may have ended
	<-c.ended
}
