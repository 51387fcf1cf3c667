package mesh

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

var errNoFirstByte = errors.New("no first byte in time")

// firstByteWait gives an attempt up whose answer has not begun in time.
type firstByteWait struct {
	over  atomic.Bool // it has begun, or was given up
	timer *time.Timer
}

// waitFor returns a context for an attempt that is given up after limit, unless heard is called. Without a limit it
// returns nil.
func waitFor(ctx context.Context, limit time.Duration) (context.Context, context.CancelCauseFunc, *firstByteWait) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := new(firstByteWait)
	w.timer = time.AfterFunc(limit, func() {
		if w.over.CompareAndSwap(false, true) {
			cancel(errNoFirstByte)
		}
	})
	return ctx, cancel, w
}

// heard says that the answer has begun.
func (w *firstByteWait) heard() {
	if w != nil && !w.over.Load() && w.over.CompareAndSwap(false, true) {
		w.timer.Stop()
	}
}
