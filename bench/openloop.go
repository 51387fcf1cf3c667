//go:build linux

package main

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// openLoop sends requests at a fixed rate, whether or not earlier ones have been answered, and measures each answer from
// the moment at which its request was due. A server that stalls is therefore charged for every request that was due
// meanwhile, not only for the few that were on their way (which is called coordinated omission).
type openLoop struct {
	request []byte
	rate    float64 // requests/s

	mu        sync.Mutex
	idle      []*lane
	waiting   []time.Time // when requests were due for which there was no connection
	underway  int
	latencies *hdrhistogram.Histogram // ns
	late      *hdrhistogram.Histogram // ns between due and sent, where a connection was idle: the client's own fault
	err       error
	drained   *sync.Cond
}

// lane is one connection and the request on it.
type lane struct {
	*client
	due time.Time // guarded by openLoop.mu
}

const longestLatency = int64(10 * time.Minute)

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, longestLatency, 3) }

// record enters a duration, and the nearest one there is where it is out of range.
func record(h *hdrhistogram.Histogram, d time.Duration) {
	h.RecordValue(min(max(int64(d), 1), longestLatency)) //nolint:errcheck // it is in range
}

// quantile returns microseconds.
func quantile(h *hdrhistogram.Histogram, percent float64) float64 {
	return float64(h.ValueAtPercentile(percent)) / 1000
}

func newOpenLoop(request []byte, rate float64) *openLoop {
	o := &openLoop{request: request, rate: rate, latencies: newHistogram(), late: newHistogram()}
	o.drained = sync.NewCond(&o.mu)
	return o
}

// run sends for as long as d says, and returns when all is answered.
func (o *openLoop) run(ctx context.Context, address string, connections int, d time.Duration) error {
	clients, err := dialAll(address, connections, time.Now().Add(2*d+stuck))
	if err != nil {
		return err
	}
	var readers sync.WaitGroup
	for _, c := range clients {
		l := &lane{client: c}
		o.idle = append(o.idle, l)
		readers.Go(func() { o.read(l) })
	}
	o.pace(ctx, d)
	o.drain()
	closeAll(clients)
	readers.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return o.err
}

// pace lets each request go at its time.
func (o *openLoop) pace(ctx context.Context, d time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	precise()
	start := time.Now()
	for i := 0; ; i++ {
		due := start.Add(time.Duration(float64(i) / o.rate * float64(time.Second)))
		if due.Sub(start) >= d || ctx.Err() != nil || o.failed() {
			return
		}
		sleepUntil(due)
		o.send(due)
	}
}

// precise makes the kernel wake this thread at its time: it may otherwise be late by 50 µs, to save power.
func precise() {
	const setTimerSlack = 29
	syscall.RawSyscall(syscall.SYS_PRCTL, setTimerSlack, 1000, 0) //nolint:errcheck // it is only less precise without
}

// sleepUntil is not time.Sleep because that is late by up to a millisecond when the program is idle: Go waits in
// epoll_wait, which counts in milliseconds.
func sleepUntil(t time.Time) {
	for left := time.Until(t); left > 0; left = time.Until(t) {
		pause := syscall.NsecToTimespec(int64(left))
		syscall.Nanosleep(&pause, nil) //nolint:errcheck // if a signal ends it early, there is some time left
	}
}

// send sends the request that was due at a time, or leaves it to the next connection that is idle.
func (o *openLoop) send(due time.Time) {
	o.mu.Lock()
	o.underway++
	if len(o.idle) == 0 {
		o.waiting = append(o.waiting, due)
		o.mu.Unlock()
		return
	}
	l := o.idle[len(o.idle)-1]
	o.idle = o.idle[:len(o.idle)-1]
	l.due = due
	record(o.late, time.Since(due))
	o.mu.Unlock()
	o.write(l)
}

func (o *openLoop) write(l *lane) {
	if _, err := l.Write(o.request); err != nil {
		o.fail(err)
	}
}

// read takes a connection's answers until it is closed.
func (o *openLoop) read(l *lane) {
	for {
		if _, err := l.answer(false); err != nil {
			o.fail(err)
			return
		}
		if o.answered(l, time.Now()) {
			o.write(l)
		}
	}
}

// answered enters an answer and reports whether the connection has its next request.
func (o *openLoop) answered(l *lane, at time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	record(o.latencies, at.Sub(l.due))
	if o.underway--; o.underway == 0 {
		o.drained.Signal()
	}
	if len(o.waiting) == 0 {
		o.idle = append(o.idle, l)
		return false
	}
	l.due, o.waiting = o.waiting[0], o.waiting[1:]
	return true
}

// drain waits for the answers that are still to come.
func (o *openLoop) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.underway > 0 && o.err == nil {
		o.drained.Wait()
	}
}

// fail keeps the first error. Those that come when all is answered are the connections being closed.
func (o *openLoop) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.underway > 0 && o.err == nil {
		o.err = fmt.Errorf("at %.0f requests/s: %w", o.rate, err)
	}
	o.drained.Signal()
}

func (o *openLoop) failed() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err != nil
}
