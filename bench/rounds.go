//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// contest is one run: targets that have their turns in rounds.
type contest struct {
	*rig
	*options
	*results
	rate float64
}

// compare measures everything that was asked for.
func compare(ctx context.Context, o *options) (*report, error) {
	rig, err := newRig(ctx)
	if err != nil {
		return nil, err
	}
	defer rig.close()
	targets, err := rig.targets(ctx, o)
	if err != nil {
		return nil, err
	}
	c := &contest{rig: rig, options: o, results: newResults(targets), rate: o.rate}
	if err := c.run(ctx); err != nil {
		return nil, err
	}
	machine, err := thisMachine(rig.binary)
	return &report{machine, o, c.rate, c.results}, err
}

func (c *contest) run(ctx context.Context) error {
	for _, t := range c.results.targets {
		if err := c.start(ctx, t); err != nil {
			return err
		}
	}
	if c.does(partCompletion) {
		if err := c.measureCompletions(ctx); err != nil {
			return err
		}
	}
	if c.does(partStream) {
		if err := c.inRounds(ctx, "streams", c.rounds, c.streamsOf); err != nil {
			return err
		}
	}
	if c.does(partMemory) {
		return c.inRounds(ctx, "memory", min(c.rounds, memoryRounds), c.memoryOf)
	}
	return nil
}

// leastProfile is how long a profile takes at least: the profiler looks a hundred times a second.
const leastProfile = 10 * time.Second

// memoryRounds are few because memory is nearly the same in each, and 5,000 streams take their time to open.
const memoryRounds = 2

func (c *contest) start(ctx context.Context, t *target) error {
	return t.start(ctx, func() []byte { return t.completionRequest(c.prompt) })
}

// inRounds gives each target its turn in each round.
func (c *contest) inRounds(ctx context.Context, what string, rounds int, measure func(context.Context, *target) error) error {
	for i := range rounds {
		progress("%s: round %d of %d", what, i+1, rounds)
		for _, t := range c.results.targets {
			if err := measure(ctx, t); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *contest) measureCompletions(ctx context.Context) error {
	if err := c.inRounds(ctx, "saturation", c.rounds, c.saturationOf); err != nil {
		return err
	}
	if c.profiles != "" {
		if err := c.inRounds(ctx, "CPU profiles", 1, c.profileOf); err != nil {
			return err
		}
	}
	if c.rate == 0 { // half of what the slowest can do: of more than that, there is only a queue to be measured
		for _, t := range c.results.targets {
			if half := c.summary(throughput, t.name).Median / 2; c.rate == 0 || half < c.rate {
				c.rate = half
			}
		}
	}
	return c.inRounds(ctx, fmt.Sprintf("%.0f requests/s", c.rate), c.rounds, c.latencyOf)
}

func (c *contest) saturationOf(ctx context.Context, t *target) error {
	l, err := c.saturate(ctx, t, t.completionRequest(c.prompt), c.connections, c.duration)
	if err != nil {
		return err
	}
	c.add(throughput, t, l.rate())
	c.add(saturatedCPU, t, l.per1000(l.server))
	c.add(clientCPU, t, l.per1000(l.client))
	c.add(upstreamCPU, t, l.per1000(l.upstream))
	return nil
}

// latencyOf sends at the fixed rate. The CPU is that of all of it, from the first request's time to the last answer.
func (c *contest) latencyOf(ctx context.Context, t *target) error {
	loop := newOpenLoop(t.completionRequest(c.prompt), c.rate)
	before, err := c.count(t, 0)
	if err != nil {
		return err
	}
	if err := loop.run(ctx, t.address, c.connections, c.duration); err != nil {
		return fmt.Errorf("%s %w", t.name, err)
	}
	after, err := c.count(t, loop.latencies.TotalCount())
	if err != nil {
		return err
	}
	l := after.since(before)
	c.add(latency50, t, quantile(loop.latencies, 50))
	c.add(latency99, t, quantile(loop.latencies, 99))
	c.add(latency999, t, quantile(loop.latencies, 99.9))
	c.add(pacedCPU, t, l.per1000(l.server))
	c.add(clientLate, t, quantile(loop.late, 99))
	return nil
}

func (c *contest) streamsOf(ctx context.Context, t *target) error {
	request := t.streamRequest(c.prompt, c.streams.frames)
	times, err := timeStreams(ctx, t, request, c.streams, c.duration)
	if err != nil {
		return err
	}
	c.add(firstFrame, t, quantile(times.first, 50))
	c.add(firstFrame99, t, quantile(times.first, 99))
	c.add(frameDelay, t, quantile(times.frames, 50))
	c.add(frameDelay99, t, quantile(times.frames, 99))
	return nil
}

// memoryOf starts the target anew: one that has been busy keeps memory that it may not need any more.
func (c *contest) memoryOf(ctx context.Context, t *target) error {
	t.stop()
	if err := c.start(ctx, t); err != nil {
		return err
	}
	looks, err := measureMemory(ctx, t, c.prompt, c.streams.open)
	if err != nil {
		return err
	}
	for i, n := range append([]int{0}, c.streams.open...) {
		c.add(metric{fmt.Sprintf(residentTotal, number(float64(n), 0)), "MB", 1}, t, looks[i].resident/1e6)
		c.add(metric{fmt.Sprintf(liveTotal, number(float64(n), 0)), "MB", 1}, t, looks[i].live/1e6)
	}
	last := len(looks) - 1
	most := float64(c.streams.open[last-1])
	c.add(residentEach, t, (looks[last].resident-looks[0].resident)/most/1000)
	c.add(liveEach, t, (looks[last].live-looks[0].live)/most/1000)
	return nil
}

// profileOf is a measurement of its own, because being profiled costs time.
func (c *contest) profileOf(ctx context.Context, t *target) error {
	if t.caddy == nil {
		return nil
	}
	if err := os.MkdirAll(c.profiles, 0o755); err != nil {
		return err
	}
	written := make(chan error, 1)
	d := max(c.duration, leastProfile)
	go func() { written <- t.caddy.profile(ctx, filepath.Join(c.profiles, t.name+".pprof"), d) }()
	_, err := c.saturate(ctx, t, t.completionRequest(c.prompt), c.connections, d)
	if failed := <-written; err == nil {
		err = failed
	}
	return err
}
