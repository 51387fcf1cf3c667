package mesh

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// endTime is how long the end of the process waits for requests that it has ended.
const endTime = 5 * time.Second

var errEnding = &apiError{
	status: http.StatusServiceUnavailable, code: "gateway_stopping",
	message: "The gateway was stopped before the answer was complete.", retryAfter: time.Second,
}

// inHand are the requests of this process that hold a store, and what they ask of upstreams, those of configurations that
// have ended included. A Caddy that is stopped waits for them, but no longer than its grace_period: what is left then is
// ended, so that its client is told and its account is closed.
var inHand = attempts{all: make(map[*inAttempt]struct{})}

type attempts struct {
	requests atomic.Int64

	mu    sync.Mutex
	all   map[*inAttempt]struct{}
	ended bool
}

// inAttempt is one attempt.
type inAttempt struct {
	cancel context.CancelFunc
	ended  atomic.Bool // because the process ends
}

// begin notes an attempt that cancel ends.
func (l *attempts) begin(cancel context.CancelFunc) *inAttempt {
	a := &inAttempt{cancel: cancel}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		a.end()
		return a
	}
	l.all[a] = struct{}{}
	return a
}

// over forgets an attempt.
func (l *attempts) over(a *inAttempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, a)
}

func (a *inAttempt) end() {
	a.ended.Store(true)
	a.cancel()
}

// endAll ends all attempts, and waits until their requests have ended.
func (l *attempts) endAll() {
	l.mu.Lock()
	l.ended = true
	for a := range l.all {
		a.end()
	}
	l.mu.Unlock()
	for end := time.Now().Add(endTime); l.requests.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}

// endRequests is for the end of a configuration. Requests outlive it unless the process ends too.
func endRequests() {
	if caddy.Exiting() {
		inHand.endAll()
	}
}

// acquire is for a request that is about to use the store. Until release, the end of the process waits for it.
func (x *exchange) acquire() (Store, error) {
	store, err := x.h.store.acquire()
	if err == nil && !x.inHand {
		x.inHand = true
		inHand.requests.Add(1)
	}
	return store, err
}

// leave is the end of a request.
func (x *exchange) leave() {
	if x.inHand {
		inHand.requests.Add(-1)
	}
}
