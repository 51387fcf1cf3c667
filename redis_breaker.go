package mesh

import (
	"fmt"
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

	opening atomic.Value // a chan struct{}, which is closed while the breaker is open

	changed chan struct{}   // it has opened
	failed  func()          // is told of each failure; may be nil
	turned  func(open bool) // is told of each change, and must not wait; may be nil

	mu      sync.Mutex // for changes
	suspect string     // the hash tag of data that could not be reached; empty where nothing could
	trouble trouble
	logger  *zap.Logger
}

// maxFailures is how many failures in a row open the breaker.
const maxFailures = 3

// newBreaker returns a closed breaker, whose message is for the log while it is open.
func newBreaker(message string, logger *zap.Logger) *breaker {
	b := &breaker{changed: make(chan struct{}, 1), trouble: trouble{message: message}, logger: logger}
	b.opening.Store(make(chan struct{}))
	return b
}

func (b *breaker) open() bool { return b.isOpen.Load() }

// opened returns a channel that is closed as soon as the breaker is open.
func (b *breaker) opened() <-chan struct{} { return b.opening.Load().(chan struct{}) }

// noteTimed takes in how a command went that could take no longer than the timeout. Nothing but an answer to one of
// these ends a row of failures.
func (b *breaker) noteTimed(suspect string, err error) {
	if err != nil && !isScriptFault(err) {
		b.note(suspect, err)
		return
	}
	if b.failures.Load() != 0 {
		b.failures.Store(0)
	}
}

// note takes in how a command went that no request waits for. Its answer says nothing, because it may have taken
// longer than a request can wait.
func (b *breaker) note(suspect string, err error) {
	if err == nil || isScriptFault(err) {
		return
	}
	if b.failed != nil {
		b.failed()
	}
	if b.failures.Add(1) >= maxFailures && !b.open() {
		b.trip(suspect, err)
	}
}

// trip opens the breaker.
func (b *breaker) trip(suspect string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open() {
		return
	}
	b.suspect = suspect
	b.isOpen.Store(true)
	close(b.opening.Load().(chan struct{}))
	if b.turned != nil {
		b.turned(true)
	}
	select {
	case b.changed <- struct{}{}:
	default:
	}
	b.trouble.note(b.logger, err) // last: a log may be slow to take it, and no request is to wait meanwhile
}

// close lets commands through again.
func (b *breaker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.open() {
		return
	}
	b.failures.Store(0)
	b.isOpen.Store(false)
	b.opening.Store(make(chan struct{}))
	if b.turned != nil {
		b.turned(false)
	}
	b.trouble.note(b.logger, nil)
}

// suspected returns the hash tag of the data that is to be tried.
func (b *breaker) suspected() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.suspect
}

// unanswered marks the error of a command that Redis did not answer, or not in time, as one that is to be expected of
// a store.
func unanswered(err error) error {
	if isScriptFault(err) {
		return err
	}
	return fmt.Errorf("%w: %w", errUnavailable, err)
}
