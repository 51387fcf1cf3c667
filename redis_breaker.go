package mesh

import (
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
)

// breaker keeps requests away from a Redis that does not answer in time. It opens after a number of failures in a row,
// an answer that comes too late being one. Open, it costs a request one atomic load: no request ever tries whether
// Redis is back. The store's heart does that alone, at its own pace, and closes the breaker when it was answered in
// time; so nothing rushes at a Redis that has just come back but requests that are let through anyway.
//
// It is one for all nodes of a Cluster. What is tried, before it closes, is the part of the data that failed.
type breaker struct {
	isOpen   atomic.Bool
	failures atomic.Int32 // in a row

	changed chan struct{} // it has opened

	mu      sync.Mutex // for changes
	suspect string     // a key id whose data could not be reached; empty where nothing could
	trouble trouble
	logger  *zap.Logger
}

// maxFailures is how many failures in a row open the breaker.
const maxFailures = 3

func (b *breaker) open() bool { return b.isOpen.Load() }

// note takes in how a command about a key went.
func (b *breaker) note(keyID string, err error) {
	if err == nil || isScriptFault(err) {
		if b.failures.Load() != 0 {
			b.failures.Store(0)
		}
		return
	}
	if b.failures.Add(1) >= maxFailures && !b.open() {
		b.trip(keyID, err)
	}
}

// trip opens the breaker.
func (b *breaker) trip(keyID string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.suspect = keyID
	b.trouble.note(b.logger, err)
	b.isOpen.Store(true)
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// close lets commands through again.
func (b *breaker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures.Store(0)
	b.isOpen.Store(false)
	b.trouble.note(b.logger, nil)
}

// suspected returns the key whose data is to be tried.
func (b *breaker) suspected() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.suspect
}
