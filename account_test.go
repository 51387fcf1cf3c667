package mesh

import (
	"math"
	"strconv"
	"testing"
	"time"
)

func at(t *testing.T, s string) time.Time {
	t.Helper()
	parsed, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func TestWindowsAreAlignedToUTCAndNeverGoBack(t *testing.T) {
	type step struct {
		now                string
		refused            Limit
		minute, day        int64
		minuteEnd, dayEnds time.Duration
	}
	limits := Limits{RPM: 2, RPD: 4}
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"a minute ends on the full minute", []step{
			{"2026-11-24T10:00:59.5Z", "", 1, 1, 500 * time.Millisecond, 13*time.Hour + 59*time.Minute + 500*time.Millisecond},
			{"2026-11-24T10:00:59.999999999Z", "", 2, 2, 1, 13*time.Hour + 59*time.Minute + 1},
			{"2026-11-24T10:00:59.999999999Z", LimitRPM, 2, 2, 1, 13*time.Hour + 59*time.Minute + 1},
			{"2026-11-24T10:01:00Z", "", 1, 3, time.Minute, 13*time.Hour + 59*time.Minute},
		}},
		{"a day ends at midnight UTC, whatever the zone", []step{
			{"2026-11-25T00:59:59+01:00", "", 1, 1, time.Second, time.Second},
			{"2026-11-25T01:00:00+01:00", "", 1, 1, time.Minute, 24 * time.Hour},
		}},
		{"the day is looked at before the minute", []step{
			{"2026-11-24T10:00:00Z", "", 1, 1, time.Minute, 14 * time.Hour},
			{"2026-11-24T10:00:00Z", "", 2, 2, time.Minute, 14 * time.Hour},
			{"2026-11-24T10:01:00Z", "", 1, 3, time.Minute, 14*time.Hour - time.Minute},
			{"2026-11-24T10:01:00Z", "", 2, 4, time.Minute, 14*time.Hour - time.Minute},
			{"2026-11-24T10:01:00Z", LimitRPD, 2, 4, time.Minute, 14*time.Hour - time.Minute},
			{"2026-11-24T10:02:00Z", LimitRPD, 0, 4, time.Minute, 14*time.Hour - 2*time.Minute},
		}},
		{"a clock that steps back refills nothing", []step{
			{"2026-11-24T00:00:00Z", "", 1, 1, time.Minute, 24 * time.Hour},
			{"2026-11-23T23:59:58Z", "", 2, 2, time.Minute + 2*time.Second, 24*time.Hour + 2*time.Second},
			{"2026-11-23T23:59:58Z", LimitRPM, 2, 2, time.Minute + 2*time.Second, 24*time.Hour + 2*time.Second},
			{"2026-11-24T00:00:01Z", LimitRPM, 2, 2, 59 * time.Second, 24*time.Hour - time.Second},
			{"2026-11-24T00:01:00Z", "", 1, 3, time.Minute, 24*time.Hour - time.Minute},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var b balance
			for i, step := range tc.steps {
				got := b.admit(at(t, step.now), limits)
				want := Verdict{
					Refused: step.refused,
					Minute:  Window{step.minute, step.minuteEnd},
					Day:     Window{step.day, step.dayEnds},
				}
				if got != want {
					t.Fatalf("step %d at %s:\n got %+v\nwant %+v", i, step.now, got, want)
				}
			}
		})
	}
}

func TestSpendIsSummedOverItsPeriod(t *testing.T) {
	var b balance
	for _, spent := range []struct {
		at   string
		cost Money
	}{
		{"2026-10-31T23:59:59Z", 1},
		{"2026-11-01T00:00:00Z", 10},
		{"2026-11-24T23:59:59.9Z", 100},
		{"2026-11-25T00:00:00Z", 1000},
		{"2026-11-24T12:00:00Z", 10000}, // late: the day it belongs to has ended
		{"2026-10-24T12:00:00Z", 100000},
	} {
		b.charge(spent.cost, at(t, spent.at))
	}
	for _, tc := range []struct {
		now    string
		period Period
		spend  Money
		reset  time.Duration
	}{
		{"2026-11-25T06:00:00Z", "", 111111, 0},
		{"2026-11-25T06:00:00Z", PeriodTotal, 111111, 0},
		{"2026-11-25T06:00:00Z", PeriodMonth, 111110, 5*24*time.Hour + 18*time.Hour},
		{"2026-11-25T06:00:00Z", PeriodDay, 111000, 18 * time.Hour},
		{"2026-11-24T06:00:00Z", PeriodDay, 111000, 42 * time.Hour}, // the clock stepped back
		{"2026-11-26T00:00:00Z", PeriodDay, 0, 24 * time.Hour},
		{"2026-12-01T00:00:00Z", PeriodMonth, 0, 31 * 24 * time.Hour},
		{"2026-12-01T00:00:00Z", PeriodTotal, 111111, 0},
	} {
		limits := Limits{SpendCap: 111000, SpendPeriod: tc.period}
		clone := b
		got := clone.admit(at(t, tc.now), limits)
		if got.Spend != tc.spend || got.Reset != tc.reset {
			t.Errorf("%s at %s: got %d and %s, want %d and %s", tc.period, tc.now, got.Spend, got.Reset, tc.spend, tc.reset)
		}
		if refused := got.Refused == LimitSpend; refused != (tc.spend >= 111000) {
			t.Errorf("%s at %s: refused by %q with spend %d of 111000", tc.period, tc.now, got.Refused, tc.spend)
		}
	}
}

func TestRefusedRequestCountsNowhere(t *testing.T) {
	now := at(t, "2026-11-24T10:00:00Z")
	for _, tc := range []struct {
		limits Limits
		want   Limit
	}{
		{Limits{RPM: 1, RPD: 1, SpendCap: 1}, LimitSpend},
		{Limits{RPM: 1, RPD: 1, SpendCap: 2}, LimitRPD},
		{Limits{RPM: 1, RPD: 2, SpendCap: 2}, LimitRPM},
		{Limits{RPM: 1}, LimitRPM},
		{Limits{}, ""},
	} {
		var b balance
		b.charge(1, now)
		b.admit(now, Limits{})
		before := b
		if got := b.admit(now, tc.limits).Refused; got != tc.want {
			t.Errorf("%+v: refused by %q, want %q", tc.limits, got, tc.want)
		}
		if tc.want != "" && b != before {
			t.Errorf("%+v: a refused request changed %+v to %+v", tc.limits, before, b)
		}
	}
}

func TestSpendSaturatesAndRefundsExactly(t *testing.T) {
	now := at(t, "2026-11-24T10:00:00Z")
	var b balance
	b.charge(math.MaxInt64-5, now)
	before := b
	c := b.charge(100, now)
	if b.Total != math.MaxInt64 || b.Month.Sum != math.MaxInt64 || b.SpendDay.Sum != math.MaxInt64 {
		t.Fatalf("did not saturate: %+v", b)
	}
	if b.refund(c); b != before {
		t.Fatalf("after the refund: %+v, want %+v", b, before)
	}
}

func TestRefundLeavesLaterWindowsAlone(t *testing.T) {
	var b balance
	c := b.charge(7, at(t, "2026-10-31T10:00:00Z"))
	b.charge(5, at(t, "2026-11-01T10:00:00Z"))
	b.refund(c)
	if b.Total != 5 || b.Month.Sum != 5 || b.SpendDay.Sum != 5 {
		t.Fatalf("got %+v", b)
	}
}

func TestRecentIDsKeepsWhatIsNotReleasedAndTheLatestReleased(t *testing.T) {
	var r recentIDs
	r.add("unreleased")
	for i := range 2*maxReleased + 1 {
		id := strconv.Itoa(i)
		if !r.add(id) {
			t.Fatalf("%s was known", id)
		}
		r.release(id)
	}
	if r.add("unreleased") {
		t.Error("forgot an id that was not released")
	}
	if r.add(strconv.Itoa(maxReleased + 1)) {
		t.Error("forgot one of the latest released ids")
	}
	if !r.add(strconv.Itoa(maxReleased)) {
		t.Error("remembers more than it should")
	}
	if len(r.known) > maxReleased+2 || len(r.released) > maxReleased {
		t.Errorf("remembers %d ids, %d of them released", len(r.known), len(r.released))
	}
}
