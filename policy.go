package mesh

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"
)

// The orders in which a model's upstreams are asked.
const (
	policyFirst        = "first"
	policyWeighted     = "weighted"
	policyLeastLatency = "least_latency"
	policyCheapest     = "cheapest"
)

func checkPolicy(name string) error {
	switch name {
	case "", policyFirst, policyWeighted, policyLeastLatency, policyCheapest:
		return nil
	}
	return fmt.Errorf("policy: %q is none of first, weighted, least_latency and cheapest", name)
}

// order puts the candidates of one model in the order of its policy.
func (x *exchange) order(policy string, req *chatRequest, list []candidate) {
	if len(list) < 2 {
		return
	}
	switch policy {
	case policyWeighted:
		drawByWeight(list, rand.Int64N)
	case policyLeastLatency:
		now := time.Now()
		slices.SortStableFunc(list, func(a, b candidate) int { return cmp.Compare(a.latency().known(now), b.latency().known(now)) })
		list[0].latency().look(now)
	case policyCheapest:
		cost := func(c candidate) Money { return c.price.cost(req.expected(c, x.h.answers.tokens())) }
		slices.SortStableFunc(list, func(a, b candidate) int { return cmp.Compare(cost(a), cost(b)) })
	}
}

// drawByWeight draws one candidate after another, each as likely as its weight among those that are left.
func drawByWeight(list []candidate, random func(int64) int64) {
	for ; len(list) > 1; list = list[1:] {
		var sum int64
		for _, c := range list {
			sum += c.weight
		}
		at := random(sum)
		for i, c := range list {
			if at -= c.weight; at < 0 {
				copy(list[1:i+1], list[:i])
				list[0] = c
				break
			}
		}
	}
}

// latency is how long an upstream took lately until its answer began: a moving average.
type latency struct {
	average atomic.Int64 // in nanoseconds; 0 before the first
	at      atomic.Int64 // when it was measured, or is being measured again, in Unix nanoseconds
}

// latencyAge is after how long an average counts as not known, so that who was slow once is asked again.
const latencyAge = time.Minute

// known returns the average; 0, which is before all others, if it is not known or too old.
func (l *latency) known(now time.Time) time.Duration {
	if l == nil || now.UnixNano()-l.at.Load() > int64(latencyAge) {
		return 0
	}
	return time.Duration(l.average.Load())
}

// look notes that it is about to be measured, so that not everybody does that at once.
func (l *latency) look(now time.Time) {
	if l != nil && l.average.Load() > 0 {
		l.at.Store(now.UnixNano())
	}
}

// note takes in how long it took. Two at once may lose one of them.
func (l *latency) note(took time.Duration) {
	if l == nil {
		return
	}
	if before := l.average.Load(); before > 0 {
		took = (4*time.Duration(before) + took) / 5
	}
	l.average.Store(int64(max(took, 1)))
	l.at.Store(time.Now().UnixNano())
}

func (c *candidate) latency() *latency {
	circuit := c.upstream.circuit(c.as)
	if circuit == nil {
		return nil
	}
	return &circuit.latency
}
