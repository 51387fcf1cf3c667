//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

const (
	calibration   = 3 * time.Second // of as much traffic as goes, after which there is half of it
	reloadEvery   = time.Minute
	restartEvery  = 5 * time.Minute // of Redis
	outage        = time.Second
	settleTimeout = 3 * time.Minute // two leases must run out, on a slow machine

	// The ledger is compared with everything that was served, so that nothing of it may be dropped.
	soakLocal  = "local $DIR/mesh.db {\n\t\t\tmax_events 1000000000\n\t\t}"
	soakShared = "redis %s {\n\t\t\tjournal $DIR/journal.db\n\t\t\tmax_events 1000000000\n\t\t}"
)

// endurance is a soak: gateways, each with its traffic, and what happens to them meanwhile.
type endurance struct {
	*rig
	*options
	redis    *redisServer // nil where none is installed
	gateways []*soaked

	mu       sync.Mutex
	failures []string
}

// soaked is a gateway and what is known of it.
type soaked struct {
	*target
	shared  bool
	traffic *traffic
	vitals  []vitals
	reloads int // guarded by endurance.mu
}

// soak serves mixed traffic for a while, reloads and restarts what can be, and returns what was wrong at the end.
func soak(ctx context.Context, o *options) error {
	rig, err := newRig(ctx)
	if err != nil {
		return err
	}
	defer rig.close()
	s := &endurance{rig: rig, options: o}
	if err := s.start(ctx); err != nil {
		return err
	}
	if err := s.serve(ctx); err != nil {
		return err
	}
	if err := s.check(ctx); err != nil {
		return err
	}
	if len(s.failures) > 0 {
		return errors.New("the soak failed:\n\t" + strings.Join(s.failures, "\n\t"))
	}
	progress("everything is as it should be")
	return nil
}

func (s *endurance) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures = append(s.failures, fmt.Sprintf(format, args...))
}

// start runs one gateway with a store of its own, and two that share a Redis which syncs before it answers.
func (s *endurance) start(ctx context.Context) (err error) {
	sites := []struct{ name, site string }{{"local", fmt.Sprintf(meshSite, soakLocal)}}
	if redisInstalled() {
		if s.redis, err = s.startRedis(ctx, "always"); err != nil {
			return err
		}
		shared := fmt.Sprintf(meshSite, fmt.Sprintf(soakShared, s.redis.address))
		sites = append(sites, struct{ name, site string }{"redis-1", shared}, struct{ name, site string }{"redis-2", shared})
	} else {
		progress("redis-server is not installed: only the local store is tried")
	}
	for i, site := range sites {
		t := &target{name: site.name, header: []string{"Authorization: Bearer " + benchKey},
			launch: func(ctx context.Context) (*server, error) { return s.startCaddy(ctx, site.name, site.site) }}
		if err := t.start(ctx, func() []byte { return t.completionRequest(s.prompt) }); err != nil {
			return err
		}
		s.gateways = append(s.gateways, &soaked{target: t, shared: i > 0, traffic: newTraffic(t, s.prompt)})
	}
	return nil
}

// serve has traffic come for as long as the soak takes.
func (s *endurance) serve(ctx context.Context) error {
	progress("serving for %s", s.soak)
	for _, g := range s.gateways {
		g.traffic.start(s.connections)
	}
	end := time.Now().Add(s.soak)
	err := wait(ctx, min(calibration, s.soak/5))
	for _, g := range s.gateways {
		g.traffic.halve()
		progress("%s: %.0f requests/s from now on", g.name, g.traffic.rate())
	}
	if err == nil {
		err = s.disturb(ctx, end)
	}
	for _, g := range s.gateways {
		g.traffic.end()
	}
	return err
}

// disturb does what happens while there is traffic, until its time is over.
func (s *endurance) disturb(ctx context.Context, end time.Time) error {
	timed, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	var all sync.WaitGroup
	all.Go(func() { every(timed, min(reloadEvery, s.soak/5), func() { s.reload(ctx) }) })
	all.Go(func() { every(timed, max(time.Second, s.soak/60), func() { s.sample(ctx) }) })
	if s.redis != nil {
		all.Go(func() { every(timed, min(restartEvery, s.soak/4), func() { s.restartRedis(ctx) }) })
	}
	all.Wait()
	return ctx.Err()
}

// every calls f until the context ends, for the first time after d.
func every(ctx context.Context, d time.Duration, f func()) {
	ticks := time.NewTicker(d)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
			f()
		}
	}
}

func (s *endurance) reload(ctx context.Context) {
	for _, g := range s.gateways {
		times, err := g.caddy.reload(ctx)
		s.mu.Lock()
		g.reloads += times
		s.mu.Unlock()
		if err != nil {
			s.fail("%s: reload: %v", g.name, err)
		}
	}
}

func (s *endurance) restartRedis(ctx context.Context) {
	progress("killing Redis")
	s.redis.kill()
	if wait(ctx, outage) != nil {
		return
	}
	if err := s.redis.start(ctx); err != nil {
		s.fail("starting Redis again: %v", err)
	}
}

func (s *endurance) sample(ctx context.Context) {
	for _, g := range s.gateways {
		v, err := takeVitals(ctx, g.target)
		if err != nil {
			s.fail("%s: %v", g.name, err)
			return
		}
		g.vitals = append(g.vitals, v)
	}
}

// check ends the gateways and looks at what they leave behind.
func (s *endurance) check(ctx context.Context) error {
	if s.redis != nil {
		if err := s.waitForSettlements(ctx); err != nil {
			return err
		}
	}
	for _, g := range s.gateways {
		if !g.stop() {
			s.fail("%s did not end by itself:\n%s", g.name, g.said())
		}
		s.failures = append(s.failures, g.traffic.failures(g.name, g.reloads*s.connections)...)
		s.failures = append(s.failures, checkVitals(g.name, g.vitals)...)
	}
	local, err := readLocalLedger(s.gateways[0].caddy.dir + "/mesh.db")
	if err != nil {
		return err
	}
	s.compare("local ledger", local, false)
	if s.redis == nil {
		return nil
	}
	shared, err := readSharedLedger(ctx, s.redis.client())
	if err != nil {
		return err
	}
	s.compare("shared ledger", shared, true)
	return nil
}

func (s *endurance) compare(name string, l *ledger, shared bool) {
	var receipts []receipt
	unsure := 0
	for _, g := range s.gateways {
		if g.shared == shared {
			receipts = append(receipts, g.traffic.receipts()...)
			unsure += g.traffic.unanswered() + 1 // the request that found out whether the gateway was ready
		}
	}
	progress("%s: %d answers, %d entries, %d nano-dollars spent", name, len(receipts), len(l.entries), l.spend)
	for _, failure := range l.check(receipts, unsure) {
		s.fail("%s: %s", name, failure)
	}
}

// waitForSettlements waits until Redis has everything.
func (s *endurance) waitForSettlements(ctx context.Context) error {
	client := s.redis.client()
	defer client.Close()
	for end := time.Now().Add(settleTimeout); ; {
		left, err := s.unsettled(ctx, client)
		if err == nil && left == 0 {
			return nil
		}
		if time.Now().After(end) {
			s.fail("%d requests are not settled %s after the last one (%v)", left, settleTimeout, err)
			return nil
		}
		if err := wait(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}
