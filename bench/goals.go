//go:build linux

package main

import "math"

// goal is what the gateway is to keep, in comparison with a bare reverse_proxy.
type goal struct {
	metric  metric
	title   string
	compare func(a, b float64) float64
	atLeast bool // the limit is the least, not the most
	limits  map[string]float64
	noise   bool // within the spread of the bare reverse_proxy's rounds is good too
	unit    string
	scale   int
}

var goals = []goal{
	{metric: throughput, title: "throughput", compare: ratio, atLeast: true, limits: both(0.90, 0.75), unit: "×", scale: 2},
	{metric: saturatedCPU, title: "CPU of a request, at saturation", compare: ratio, limits: both(1.12, 1.35), unit: "×", scale: 2},
	{metric: pacedCPU, title: "CPU of a request, at the fixed rate", compare: ratio, limits: both(1.12, 1.35), unit: "×", scale: 2},
	{metric: latency50, title: "added latency, p50", compare: difference, limits: both(30, 120), unit: " µs"},
	{metric: latency99, title: "added latency, p99", compare: difference, unit: " µs"},
	{metric: firstFrame, title: "added to the first frame, p50", compare: difference, limits: both(100, 100), unit: " µs"},
	{metric: frameDelay, title: "added to each frame, p50", compare: difference, limits: both(0, 0), noise: true, unit: " µs"},
	{metric: residentEach, title: "memory of an open stream, resident", compare: ratio, limits: both(1.15, 1.15), unit: "×", scale: 2},
	{metric: liveEach, title: "memory of an open stream, heap and stacks", compare: ratio, limits: both(1.15, 1.15), unit: "×", scale: 2},
}

func both(local, shared float64) map[string]float64 {
	return map[string]float64{meshLocal: local, meshShared: shared}
}

// verdict is how a target stands to a goal.
type verdict struct {
	Goal   string   `json:"goal"`
	Target string   `json:"target"`
	Got    summary  `json:"got"`
	Limit  *float64 `json:"limit,omitempty"`
	Met    *bool    `json:"met,omitempty"` // not there where there is no limit
}

// judge returns false where there is nothing to compare.
func (g *goal) judge(r *results, target string) (verdict, bool) {
	v := verdict{Goal: g.title, Target: target, Got: r.against(g.metric, target, bare, g.compare)}
	if math.IsNaN(v.Got.Median) {
		return v, false
	}
	limit, ok := g.limits[target]
	if !ok {
		return v, true
	}
	if base := r.summary(g.metric, bare); g.noise {
		limit = max(limit, base.Most-base.Lowest)
	}
	met := v.Got.Median <= limit
	if g.atLeast {
		met = v.Got.Median >= limit
	}
	v.Limit, v.Met = &limit, &met
	return v, true
}
