//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func TestMedianIsTheMiddle(t *testing.T) {
	for _, tc := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1}, 5},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 100, 1, 2}, 3},
	} {
		if got := median(tc.values); got != tc.want {
			t.Errorf("%v: got %v, want %v", tc.values, got, tc.want)
		}
	}
	values := []float64{3, 1, 2}
	if got := summarize(values); got != (summary{2, 1, 3}) || values[0] != 3 {
		t.Errorf("got %+v, and left %v", got, values)
	}
}

// measured are two targets that the machine slows down in the second of three rounds.
func measured() *results {
	targets := []*target{{name: bare}, {name: meshLocal}}
	r := newResults(targets)
	for i, slow := range []float64{1, 4, 1} {
		r.add(throughput, targets[0], 1000/slow)
		r.add(throughput, targets[1], 920/slow)
		r.add(latency50, targets[0], 100*slow)
		r.add(latency50, targets[1], 100*slow+float64(30+i))
		r.add(liveEach, targets[0], 100)
		r.add(liveEach, targets[1], missing)
	}
	return r
}

func TestTargetsAreComparedRoundByRound(t *testing.T) {
	r := measured()
	if got := r.against(throughput, meshLocal, bare, ratio); got.Lowest < 0.919 || got.Most > 0.921 {
		t.Errorf("a machine that was slow for both in one round has changed the ratio: %+v", got)
	}
	if got := r.against(latency50, meshLocal, bare, difference); got != (summary{31, 30, 32}) {
		t.Errorf("got %+v", got)
	}
}

func TestGoalsAreMarkedAsMetOrMissed(t *testing.T) {
	r := measured()
	for _, g := range goals {
		v, ok := g.judge(r, meshLocal)
		switch g.metric {
		case throughput:
			if !ok || v.Met == nil || !*v.Met {
				t.Errorf("throughput: %+v", v)
			}
		case latency50:
			if !ok || v.Met == nil || *v.Met {
				t.Errorf("latency: %+v", v)
			}
		default:
			if ok {
				t.Errorf("%s was not measured: %+v", g.title, v)
			}
		}
	}
}

func TestDelayWithinTheNoiseOfTheBareProxyIsMet(t *testing.T) {
	for slower, want := range map[float64]bool{19: true, 21: false} {
		targets := []*target{{name: bare}, {name: meshShared}}
		r := newResults(targets)
		for _, delay := range []float64{90, 100, 110} {
			r.add(frameDelay, targets[0], delay)
			r.add(frameDelay, targets[1], delay+slower)
		}
		for _, g := range goals {
			if v, ok := g.judge(r, meshShared); ok && *v.Met != want {
				t.Errorf("%v µs more where the noise is 20 µs: %+v", slower, v)
			}
		}
	}
}

func TestReportShowsWhatWasMeasured(t *testing.T) {
	r := &report{options: &options{rounds: 3, duration: time.Second, connections: 32}, rate: 500, results: measured()}
	var table, encoded bytes.Buffer
	if err := r.writeTables(&table); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1,000 (250–1,000)", "0.92×", "≥ 0.90×: met", "+31 µs (30 to 32)", "≤ 30 µs: missed"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in\n%s", want, &table)
		}
	}
	if err := r.writeJSON(&encoded); err != nil {
		t.Fatal(err)
	}
	var back struct {
		Measured []struct {
			Name, Target string
			Rounds       []float64
			Median       float64
		}
		Verdicts []struct{ Met bool }
	}
	if err := json.Unmarshal(encoded.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Measured) != 5 || len(back.Measured[0].Rounds) != 3 || back.Measured[0].Median != 1000 || len(back.Verdicts) != 2 {
		t.Errorf("got %+v", back)
	}
}

func TestTargetThatCannotKeepUpIsNamed(t *testing.T) {
	for rate, want := range map[float64]bool{919: false, 950: true} {
		r := &report{options: new(options), rate: rate, results: measured()}
		if got := r.overtaxed(); strings.Contains(got, "mesh, store local: ") != want || strings.Contains(got, "bare") {
			t.Errorf("at %v: %q", rate, got)
		}
	}
}

func TestNumbersAreGroupedAndRounded(t *testing.T) {
	for want, f := range map[string]float64{"12,346": 12345.6, "-1,234": -1234.4, "999": 999.4, "0": 0} {
		if got := number(f, 0); got != want {
			t.Errorf("%v: got %s, want %s", f, got, want)
		}
	}
}
