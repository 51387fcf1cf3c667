//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// stuck is how much longer than planned a measurement may take before its connections give up.
const stuck = time.Minute

// together runs f n times at once and returns when all have ended.
func together(n int, f func(i int) error) error {
	ended := make(chan error, n)
	for i := range n {
		go func() { ended <- f(i) }()
	}
	var errs error
	for range n {
		if err := <-ended; err != nil && errs == nil {
			errs = err // the first says what is wrong; the others mostly follow from it
		}
	}
	return errs
}

// dialAll opens connections that give up at a deadline.
func dialAll(address string, n int, deadline time.Time) (clients []*client, err error) {
	for range n {
		c, err := dial(address)
		if err == nil {
			clients = append(clients, c)
			err = c.SetDeadline(deadline)
		}
		if err != nil {
			closeAll(clients)
			return nil, err
		}
	}
	return clients, nil
}

func closeAll(clients []*client) {
	for _, c := range clients {
		c.Close()
	}
}

// load is what a server did in a while, and what that cost everybody.
type load struct {
	requests                 float64
	elapsed                  time.Duration
	server, upstream, client time.Duration // CPU
}

func (l load) rate() float64 { return l.requests / l.elapsed.Seconds() }

// per1000 is a cost in seconds for 1,000 requests.
func (l load) per1000(cpu time.Duration) float64 { return cpu.Seconds() / l.requests * 1000 }

// counters are what a load is the difference of.
type counters struct {
	at                       time.Time
	requests                 int64
	server, upstream, client time.Duration
}

func (r *rig) count(t *target, requests int64) (c counters, err error) {
	c = counters{at: time.Now(), requests: requests, client: ownCPU()}
	var errs [2]error
	c.server, errs[0] = t.cpu()
	c.upstream, errs[1] = r.upstream.cpu()
	return c, errors.Join(errs[:]...)
}

func (c counters) since(before counters) load {
	return load{
		requests: float64(c.requests - before.requests),
		elapsed:  c.at.Sub(before.at),
		server:   c.server - before.server,
		upstream: c.upstream - before.upstream,
		client:   c.client - before.client,
	}
}

// saturate sends requests over each of the connections as fast as answers come, and looks at a while of that after a
// warm-up.
func (r *rig) saturate(ctx context.Context, t *target, request []byte, connections int, d time.Duration) (load, error) {
	clients, err := dialAll(t.address, connections, time.Now().Add(2*d+stuck))
	if err != nil {
		return load{}, err
	}
	defer closeAll(clients)
	var done atomic.Int64
	var stop atomic.Bool
	ended := make(chan error, 1)
	go func() {
		ended <- together(len(clients), func(i int) error {
			for !stop.Load() {
				if _, err := clients[i].complete(request, false); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}()
	measured, err := r.watch(ctx, t, done.Load, d)
	stop.Store(true)
	if failed := <-ended; failed != nil {
		return load{}, fmt.Errorf("%s at saturation: %w", t.name, failed)
	}
	if err == nil && measured.requests == 0 {
		err = fmt.Errorf("%s answered nothing in %s", t.name, d)
	}
	return measured, err
}

// watch returns what happens between the end of a warm-up and d later.
func (r *rig) watch(ctx context.Context, t *target, requests func() int64, d time.Duration) (load, error) {
	if err := wait(ctx, d/5); err != nil {
		return load{}, err
	}
	before, err := r.count(t, requests())
	if err != nil {
		return load{}, err
	}
	if err := wait(ctx, d); err != nil {
		return load{}, err
	}
	after, err := r.count(t, requests())
	return after.since(before), err
}
