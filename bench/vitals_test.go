//go:build linux

package main

import (
	"strings"
	"testing"
)

// over is a hundred samples of a process whose values all grow to a multiple of what they were.
func over(times float64) (all []vitals) {
	for i := range 100 {
		by := 1 + (times-1)*float64(i)/99
		all = append(all, vitals{200e6 * by, 200e6 * by, 1000 * by})
	}
	return all
}

func TestProcessThatGrowsFails(t *testing.T) {
	got := strings.Join(checkVitals("it", over(3)), "\n")
	for _, what := range []string{"heap and stacks", "resident memory", "goroutines"} {
		if !strings.Contains(got, what) {
			t.Errorf("nothing about %s in %q", what, got)
		}
	}
}

func TestProcessThatStaysPasses(t *testing.T) {
	all := over(1.1)
	for i := range 9 {
		all[i] = vitals{} // it has just started
	}
	all[50] = vitals{9e9, 9e9, 1e6} // a peak
	if got := checkVitals("it", all); got != nil {
		t.Error(got)
	}
}

func TestTooFewSamplesFail(t *testing.T) {
	if got := checkVitals("it", over(1)[:3]); got == nil {
		t.Error("passed")
	}
}
