//go:build linux

package main

import (
	"math"
	"slices"
)

// metric is something that is measured, of each target and in each round.
type metric struct {
	Name  string `json:"name"`
	Unit  string `json:"unit"`
	scale int    // decimals in the table
}

var (
	throughput    = metric{"requests/s at saturation", "1/s", 0}
	saturatedCPU  = metric{"CPU of 1,000 requests, at saturation", "s", 4}
	latency50     = metric{"latency at the fixed rate, p50", "µs", 0}
	latency99     = metric{"p99", "µs", 0}
	latency999    = metric{"p99.9", "µs", 0}
	pacedCPU      = metric{"CPU of 1,000 requests, at the fixed rate", "s", 4}
	firstFrame    = metric{"first frame of a stream, p50", "µs", 0}
	firstFrame99  = metric{"first frame, p99", "µs", 0}
	frameDelay    = metric{"a frame's way, p50", "µs", 0}
	frameDelay99  = metric{"a frame's way, p99", "µs", 0}
	residentEach  = metric{"memory of an open stream: resident", "kB", 1}
	liveEach      = metric{"heap and stacks", "kB", 1}
	clientCPU     = metric{"the client's CPU of 1,000 requests", "s", 4}
	upstreamCPU   = metric{"the upstream's CPU of 1,000 requests", "s", 4}
	clientLate    = metric{"requests sent late by the client, p99", "µs", 0}
	residentTotal = "resident with %s streams"
	liveTotal     = "heap and stacks with %s streams"
)

// missing is the value of what a target does not say.
var missing = math.NaN()

// results are the values of each metric for each target, in the order of rounds.
type results struct {
	targets []*target
	metrics []metric // in the order in which they were first added
	values  map[metric]map[string][]float64
}

func newResults(targets []*target) *results {
	return &results{targets: targets, values: make(map[metric]map[string][]float64)}
}

func (r *results) add(m metric, t *target, value float64) {
	if r.values[m] == nil {
		r.values[m] = make(map[string][]float64)
		r.metrics = append(r.metrics, m)
	}
	r.values[m][t.name] = append(r.values[m][t.name], value)
}

// summary is the median of some rounds, and their extremes.
type summary struct {
	Median float64 `json:"median"`
	Lowest float64 `json:"lowest"`
	Most   float64 `json:"highest"`
}

// summarize returns missing values where there are none.
func summarize(values []float64) summary {
	values = slices.DeleteFunc(slices.Clone(values), math.IsNaN)
	if len(values) == 0 {
		return summary{missing, missing, missing}
	}
	return summary{median(values), slices.Min(values), slices.Max(values)}
}

// median is the mean of the two in the middle where their number is even.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

func (r *results) summary(m metric, target string) summary { return summarize(r.values[m][target]) }

// against compares two targets round by round: in each, one had its turn shortly after the other, so that both had the
// same from a machine that is at times busy with something else.
func (r *results) against(m metric, target, base string, compare func(a, b float64) float64) summary {
	a, b := r.values[m][target], r.values[m][base]
	compared := make([]float64, min(len(a), len(b)))
	for i := range compared {
		compared[i] = compare(a[i], b[i])
	}
	return summarize(compared)
}

func ratio(a, b float64) float64      { return a / b }
func difference(a, b float64) float64 { return a - b }
