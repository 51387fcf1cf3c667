package mesh

import (
	"sync"
	"time"
)

// held is the beginning of a stream that has not said anything yet, while another candidate could be asked if that turns
// out to be an error; or, where the first event is waited for only so long, the header before it.
type held struct {
	forContent bool // until there is some; else until any event

	mu    sync.Mutex // the timer's release, against writes
	bytes []byte
	timer *time.Timer
	over  bool // the attempt is
}

const (
	maxHeld     = 64 << 10
	maxHeldTime = time.Second // from the first byte
)

// keep holds p back. The caller holds h.mu.
func (h *held) keep(a *answer, p []byte) error {
	if h.timer == nil && h.forContent {
		h.timer = time.AfterFunc(maxHeldTime, a.releaseHeld)
	}
	h.bytes = append(h.bytes, p...)
	if len(h.bytes) > maxHeld {
		return a.release()
	}
	return nil
}

// releaseHeld commits the answer with what it has said so far.
func (a *answer) releaseHeld() {
	a.hold.mu.Lock()
	defer a.hold.mu.Unlock()
	if !a.committed && !a.hold.over && a.release() == nil {
		a.flush() //nolint:errcheck // the next write will tell
	}
}

// release commits the answer. The caller holds a.hold.mu.
func (a *answer) release() error {
	if !a.claim() {
		return errLost
	}
	a.commit()
	bytes := a.hold.bytes
	a.hold.bytes = nil
	if len(bytes) == 0 {
		return nil
	}
	return a.send(bytes)
}

// end says that the attempt is over. From then on a.committed does not change.
func (h *held) end() {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.over = true
	if h.timer != nil {
		h.timer.Stop()
	}
}

// isHeld reports whether the answer is not committed yet.
func (a *answer) isHeld() bool {
	if a.hold == nil {
		return false
	}
	a.hold.mu.Lock()
	defer a.hold.mu.Unlock()
	return !a.committed
}

// letGo commits the answer if that was held back: it has said something.
func (a *answer) letGo() {
	if a.hold == nil {
		return
	}
	a.hold.mu.Lock()
	defer a.hold.mu.Unlock()
	if !a.committed {
		a.release() //nolint:errcheck // the next write will tell
	}
}
