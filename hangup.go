package mesh

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Hangup is what becomes of a request whose client leaves before its end. Providers bill differently for what they
// are not let finish.
type Hangup struct {
	// `cancel` stops the upstream at once and charges an estimate of what it did. `drain` reads the answer to its end
	// and charges what the upstream says it used. `free` stops the upstream and charges nothing. Default: `cancel`.
	Policy string `json:"policy,omitempty"`

	// How long to drain an answer before it is cancelled after all. Default: 30 seconds.
	DrainTimeout caddy.Duration `json:"drain_timeout,omitempty"`

	// How many answers to drain at once; those beyond are cancelled. Default: 100.
	MaxDrains int64 `json:"max_drains,omitempty"`

	draining atomic.Int64
}

const (
	hangupCancel = "cancel"
	hangupDrain  = "drain"
	hangupFree   = "free"

	defaultDrainTimeout = 30 * time.Second
	defaultMaxDrains    = 100
)

func (h *Hangup) check() error {
	switch h.Policy {
	case "", hangupCancel, hangupDrain, hangupFree:
	default:
		return fmt.Errorf("on_hangup: %q is none of cancel, drain and free", h.Policy)
	}
	if h.DrainTimeout < 0 || h.MaxDrains < 0 {
		return fmt.Errorf("on_hangup: a limit of drain is negative")
	}
	return nil
}

func (h *Hangup) provision() {
	if h.DrainTimeout == 0 {
		h.DrainTimeout = caddy.Duration(defaultDrainTimeout)
	}
	if h.MaxDrains == 0 {
		h.MaxDrains = defaultMaxDrains
	}
}

// attempt returns the context of a request to the upstream, on behalf of a client whose own is client.
func (h *Hangup) attempt(client context.Context, deadline time.Time) (context.Context, context.CancelFunc) {
	if h.Policy != hangupDrain {
		return context.WithDeadlineCause(client, deadline, errOutOfTime)
	}
	ctx, cancel := context.WithDeadlineCause(context.WithoutCancel(client), deadline, errOutOfTime)
	stop := context.AfterFunc(client, func() { h.drain(ctx, cancel) })
	return ctx, func() {
		stop()
		cancel()
	}
}

// drain lets a request whose client has left go on for a while.
func (h *Hangup) drain(ctx context.Context, cancel context.CancelFunc) {
	defer h.draining.Add(-1)
	if h.draining.Add(1) > h.MaxDrains {
		cancel()
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(h.DrainTimeout)):
		cancel()
	case <-endOfDrain(ctx):
		cancel()
	}
}

// drainEndKey is the key of a context's endOfDrain.
type drainEndKey struct{}

// drainable returns a context for requests that are cancelled at end, also where they are drained.
func drainable(parent context.Context) (ctx context.Context, end context.CancelFunc) {
	ended, end := context.WithCancel(parent)
	return context.WithValue(parent, drainEndKey{}, ended.Done()), end
}

// endOfDrain returns what ends the drains of a request, or nil where only the upstream does.
func endOfDrain(ctx context.Context) <-chan struct{} {
	ended, _ := ctx.Value(drainEndKey{}).(<-chan struct{})
	return ended
}
