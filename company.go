package mesh

import (
	"net/http"
	"sync"
	"time"
)

// company keeps a stream's client company while an upstream that has begun to answer says nothing: some send their header, and
// perhaps a first event, and then think for minutes. Its pings stand between events, never in one.
type company struct {
	w     http.ResponseWriter
	every time.Duration

	mu     sync.Mutex // of the client's side
	timer  *time.Timer
	last   time.Time // when something went out
	inside bool      // the beginning of an event has gone out, and its end has not
	over   bool
}

// keepCompany begins the pings of an answer that has been committed to.
func (a *answer) keepCompany() {
	every := a.x.h.pingEvery
	if every == 0 || a.x.silent || a.over {
		return
	}
	q := &company{w: a.x.w, every: every, last: time.Now()}
	a.company = q
	q.mu.Lock()
	defer q.mu.Unlock()
	q.timer = time.AfterFunc(every, q.ping)
}

func (q *company) ping() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over {
		return
	}
	if silent := time.Since(q.last); silent < q.every {
		q.timer.Reset(q.every - silent)
		return
	}
	if !q.inside {
		if _, err := q.w.Write(pingFrame); err != nil {
			return // the request's context will say so
		}
		if http.NewResponseController(q.w).Flush() != nil {
			return
		}
		q.last = time.Now()
	}
	q.timer.Reset(q.every)
}

// write sends what is the upstream's.
func (q *company) write(p []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, err := q.w.Write(p)
	q.last = time.Now()
	return err
}

func (q *company) flush() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return http.NewResponseController(q.w).Flush()
}

// within says whether an event has gone out in part, and reports whether there is somebody to know.
func (a *answer) within(inside bool) bool {
	if a.hold != nil {
		a.hold.mu.Lock()
		defer a.hold.mu.Unlock()
	}
	q := a.company
	if q == nil {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.inside = inside
	return true
}

func (q *company) end() {
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.over = true
	q.timer.Stop()
}

// end says that the attempt is over: nothing is let go any more, and nobody is pinged.
func (a *answer) end() {
	a.hold.end()
	a.over = true
	a.company.end()
}
