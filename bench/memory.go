//go:build linux

package main

import (
	"context"
	"fmt"
	"time"
)

// footprint is what a server has in memory.
type footprint struct {
	resident float64 // bytes
	live     float64 // bytes of heap and stacks after a garbage collection; NaN where the server does not say
}

const (
	openAtOnce   = 64                     // clients that open streams at the same time
	warmUp       = 500                    // requests before the first look
	settleTime   = 500 * time.Millisecond // for what a server does after the last stream has begun
	longestOpen  = 30 * time.Minute
	openDeadline = 5 * time.Minute
)

// openFrames is a stream that is open and silent after its first frame.
var openFrames = frames{count: 2, gap: longestOpen}

// measureMemory looks at a server with no stream, and then with each of the numbers of open streams. The server
// should have just started.
func measureMemory(ctx context.Context, t *target, prompt int, open []int) (looks []footprint, err error) {
	if err := warm(t, prompt); err != nil {
		return nil, err
	}
	var held []*client
	defer func() { closeAll(held) }()
	request := t.streamRequest(prompt, openFrames)
	for _, n := range append([]int{0}, open...) {
		more, err := openStreams(ctx, t, request, n-len(held))
		held = append(held, more...)
		if err != nil {
			return nil, fmt.Errorf("%s, opening %d streams: %w", t.name, n, err)
		}
		if err := wait(ctx, settleTime); err != nil {
			return nil, err
		}
		look, err := t.look(ctx)
		if err != nil {
			return nil, err
		}
		looks = append(looks, look)
	}
	return looks, nil
}

func warm(t *target, prompt int) error {
	c, err := dial(t.address)
	if err != nil {
		return err
	}
	defer c.Close()
	request := t.completionRequest(prompt)
	for range warmUp {
		if _, err := c.complete(request, false); err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
	}
	return nil
}

// openStreams returns as many connections as were asked for, each with a stream whose first frame has come. With an
// error it returns those it has opened.
func openStreams(ctx context.Context, t *target, request []byte, n int) ([]*client, error) {
	clients, err := dialAll(t.address, n, time.Now().Add(openDeadline))
	if err != nil {
		return nil, err
	}
	err = together(min(openAtOnce, n), func(first int) error {
		for i := first; i < n; i += openAtOnce {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := clients[i].openStream(request); err != nil {
				return err
			}
		}
		return nil
	})
	return clients, err
}

func (c *client) openStream(request []byte) error {
	if _, err := c.Write(request); err != nil {
		return err
	}
	s, err := c.readStream(false)
	if err != nil {
		return err
	}
	s.next()
	return s.err
}

// look returns what the server has in memory now, before a garbage collection and after it.
func (t *target) look(ctx context.Context) (f footprint, err error) {
	if f.resident, err = t.memory("VmRSS"); err != nil || t.caddy == nil {
		f.live = missing
		return f, err
	}
	f.live, err = t.caddy.live(ctx)
	return f, err
}
