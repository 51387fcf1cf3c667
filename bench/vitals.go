//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
)

// vitals is how a Caddy is at one time.
type vitals struct {
	resident   float64 // bytes, without views of files
	live       float64 // bytes of heap and stacks after a garbage collection
	goroutines float64
}

// What counts as flat: at most so many times the median of the first quarter, and so much more, in the last quarter. The
// bounds are generous because the numbers follow the traffic of a moment. A leak of 100 bytes a request passes them in
// half an hour.
const (
	mostLive       = 1.25
	moreLive       = 32e6
	mostResident   = 1.5
	moreResident   = 64e6
	mostGoroutines = 1.25
	moreGoroutines = 100
)

func takeVitals(ctx context.Context, t *target) (v vitals, err error) {
	var errs [3]error
	v.resident, errs[0] = t.memory("RssAnon")
	v.live, errs[1] = t.caddy.live(ctx)
	v.goroutines, errs[2] = t.caddy.goroutines(ctx)
	return v, errors.Join(errs[:]...)
}

// checkVitals compares the last quarter with the first, without the first tenth of all samples: a process that has just
// started is still filling its caches.
func checkVitals(name string, all []vitals) (failures []string) {
	all = all[len(all)/10:]
	quarter := len(all) / 4
	if quarter == 0 {
		return []string{fmt.Sprintf("%s: %d samples are too few", name, len(all))}
	}
	for _, c := range []struct {
		what       string
		of         func(vitals) float64
		most, more float64
		unit       string
		in         float64
	}{
		{"heap and stacks", func(v vitals) float64 { return v.live }, mostLive, moreLive, " MB", 1e6},
		{"resident memory", func(v vitals) float64 { return v.resident }, mostResident, moreResident, " MB", 1e6},
		{"goroutines", func(v vitals) float64 { return v.goroutines }, mostGoroutines, moreGoroutines, "", 1},
	} {
		first, last := medianOf(all[:quarter], c.of), medianOf(all[len(all)-quarter:], c.of)
		told := fmt.Sprintf("%s: %s: %.0f%s in the first quarter, %.0f%s in the last", name, c.what, first/c.in, c.unit, last/c.in, c.unit)
		progress("%s", told)
		if bound := first*c.most + c.more; last > bound {
			failures = append(failures, fmt.Sprintf("%s, more than %.0f%s", told, bound/c.in, c.unit))
		}
	}
	return failures
}

func medianOf(all []vitals, of func(vitals) float64) float64 {
	values := make([]float64, len(all))
	for i, v := range all {
		values[i] = of(v)
	}
	return median(values)
}
