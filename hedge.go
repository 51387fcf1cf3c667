package mesh

import (
	"context"
	"errors"
	"sync"
	"time"
)

var errLost = errors.New("another upstream was faster")

// race is two candidates that are asked at the same time. Each attempt runs in a goroutine of its own, which ends before
// the request does.
type race struct {
	begun chan struct{} // the first has begun to answer
	once  sync.Once

	claims chan *answer // receives the winner
	ends   chan raceEnd

	mu      sync.Mutex // of what follows, and of the event
	decided bool
	winner  *answer // whose answer goes out; nil if none does

	quits   []context.CancelFunc // of those that run, in the order of their start
	running int
}

// heard says that an answer has begun.
func (r *race) heard() {
	if r != nil {
		r.once.Do(func() { close(r.begun) })
	}
}

// claim makes a the answer that goes out, unless there is one already.
func (a *answer) claim() bool {
	r := a.race
	if r == nil {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.decided {
		a.lost = r.winner != a
		return !a.lost
	}
	r.decided, r.winner = true, a
	a.x.asking.Lock()
	a.x.event.Upstream = a.by.upstream.Name
	a.x.asking.Unlock()
	r.claims <- a
	return true
}

// decide has no other answer go out any more.
func (r *race) decide() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decided = true
}

// start has another candidate join, unless the race is decided, and reports whether it did. begin is called before.
func (r *race) start(begin func(), run func(context.Context) *answer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.decided {
		return false
	}
	begin()
	ctx, quit := context.WithCancel(context.Background())
	r.quits = append(r.quits, quit)
	r.running++
	go func() {
		defer quit()
		var end raceEnd
		defer func() {
			if end.answer == nil {
				end.panicked = recover()
			}
			r.ends <- end
		}()
		end.answer = run(ctx)
	}()
	return true
}

// stop stops all but one, which may be none of them.
func (r *race) stop(but *answer) {
	for i, quit := range r.quits {
		if but == nil || but.runner != i {
			quit()
		}
	}
}

// raceEnd is how one attempt ended.
type raceEnd struct {
	answer   *answer
	panicked any
}

// hedged asks a candidate, and the next one too if the first has not begun to answer after a while.
func (x *exchange) hedged(store Store, req *chatRequest, candidates []candidate, at attempt, deadline time.Time) []*answer {
	r := &race{begun: make(chan struct{}), claims: make(chan *answer, 1), ends: make(chan raceEnd, 2)}
	run := func(at attempt, begin func()) bool {
		at.race, at.last, at.runner = r, !req.stream, len(r.quits)
		c := &candidates[at.place]
		prepare := func() {
			begin()
			at.ctx = x.besides(c)
		}
		return r.start(prepare, func(quit context.Context) *answer {
			at.quit = quit
			return x.try(req, c, at, deadline)
		})
	}
	run(at, func() {})
	timer := time.NewTimer(candidates[at.place].hedge)
	defer timer.Stop()
	hedge, begun := timer.C, r.begun
	var answers []*answer
	var winner *answer
	var panicked any
	for r.running > 0 {
		select {
		case <-begun:
			hedge, begun = nil, nil
		case <-hedge:
			hedge = nil
			if second, ok := x.second(store, candidates, at.place); ok {
				c := &candidates[second.place]
				if !run(second, func() { x.begin(c) }) && second.probe { // which another request may make then
					c.upstream.circuit(c.as).note(time.Now(), c.upstream.rules, signNone, true)
				}
			}
		case winner = <-r.claims:
			r.stop(winner)
		case end := <-r.ends:
			r.running--
			if end.answer == nil {
				panicked = end.panicked
				r.decide()
				r.stop(nil)
				continue
			}
			answers = append(answers, end.answer)
			// where the second is refused, the first may yet answer
			if x.isFinal(end.answer) && (end.answer.runner == 0 || r.running == 0) {
				r.decide()
				r.stop(nil)
			}
			if winner != nil && winner != end.answer && req.stream {
				req.forget() // the other has no more use for it
			}
		}
	}
	if panicked != nil {
		panic(panicked)
	}
	return x.inOrder(answers)
}

// second takes the next candidate that may be asked.
func (x *exchange) second(store Store, candidates []candidate, first int) (attempt, bool) {
	for i := first + 1; i < len(candidates); i++ {
		probe, f := x.turn(store, &candidates[i], i)
		if f == nil {
			return attempt{place: i, probe: probe}, true
		}
		x.note(&candidates[i], f)
	}
	return attempt{}, false
}

// isFinal reports whether nobody else need be asked after an attempt that came to nothing.
func (x *exchange) isFinal(a *answer) bool {
	if a.committed || a.lost {
		return false
	}
	return x.r.Context().Err() != nil || a.timedOut || a.stopped() || !a.failure().retriable
}

// inOrder puts the answer that decides on the request last, and has the others count as lost if there is one.
func (x *exchange) inOrder(answers []*answer) []*answer {
	for i := range answers {
		if answers[i].committed { // before one that was refused meanwhile
			answers[0], answers[i] = answers[i], answers[0]
		}
	}
	for i, a := range answers {
		if !a.committed && !x.isFinal(a) {
			continue
		}
		last := len(answers) - 1
		answers[i], answers[last] = answers[last], a
		for _, other := range answers[:last] {
			other.lost = other.lost || !other.committed && x.isFinal(other)
		}
		break
	}
	return answers
}

// join returns the context of an attempt that ends with errLost when another was faster.
func (at attempt) join(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(at.quit, func() { cancel(errLost) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}
