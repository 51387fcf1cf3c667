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

// windowStep is one request, and where the windows stand after it.
type windowStep struct {
	now                string
	refused            Limit
	minute, day        int64
	minuteEnd, dayEnds time.Duration
}

// windowLimits are those of windowCases.
var windowLimits = Limits{RPM: 2, RPD: 4}

// windowCases hold for every store.
var windowCases = []struct {
	name  string
	steps []windowStep
}{
	{"a minute ends on the full minute", []windowStep{
		{"2026-11-24T10:00:59.5Z", "", 1, 1, 500 * time.Millisecond, 13*time.Hour + 59*time.Minute + 500*time.Millisecond},
		{"2026-11-24T10:00:59.999999Z", "", 2, 2, time.Microsecond, 13*time.Hour + 59*time.Minute + time.Microsecond},
		{"2026-11-24T10:00:59.999999Z", LimitRPM, 2, 2, time.Microsecond, 13*time.Hour + 59*time.Minute + time.Microsecond},
		{"2026-11-24T10:01:00Z", "", 1, 3, time.Minute, 13*time.Hour + 59*time.Minute},
	}},
	{"a day ends at midnight UTC, whatever the zone", []windowStep{
		{"2026-11-25T00:59:59+01:00", "", 1, 1, time.Second, time.Second},
		{"2026-11-25T01:00:00+01:00", "", 1, 1, time.Minute, 24 * time.Hour},
	}},
	{"the day is looked at before the minute", []windowStep{
		{"2026-11-24T10:00:00Z", "", 1, 1, time.Minute, 14 * time.Hour},
		{"2026-11-24T10:00:00Z", "", 2, 2, time.Minute, 14 * time.Hour},
		{"2026-11-24T10:01:00Z", "", 1, 3, time.Minute, 14*time.Hour - time.Minute},
		{"2026-11-24T10:01:00Z", "", 2, 4, time.Minute, 14*time.Hour - time.Minute},
		{"2026-11-24T10:01:00Z", LimitRPD, 2, 4, time.Minute, 14*time.Hour - time.Minute},
		{"2026-11-24T10:02:00Z", LimitRPD, 0, 4, time.Minute, 14*time.Hour - 2*time.Minute},
	}},
	{"a clock that steps back refills nothing", []windowStep{
		{"2026-11-24T00:00:00Z", "", 1, 1, time.Minute, 24 * time.Hour},
		{"2026-11-23T23:59:58Z", "", 2, 2, time.Minute + 2*time.Second, 24*time.Hour + 2*time.Second},
		{"2026-11-23T23:59:58Z", LimitRPM, 2, 2, time.Minute + 2*time.Second, 24*time.Hour + 2*time.Second},
		{"2026-11-24T00:00:01Z", LimitRPM, 2, 2, 59 * time.Second, 24*time.Hour - time.Second},
		{"2026-11-24T00:01:00Z", "", 1, 3, time.Minute, 24*time.Hour - time.Minute},
	}},
}

func (s windowStep) check(t *testing.T, got Verdict) {
	t.Helper()
	want := Verdict{Refused: s.refused, Minute: Window{s.minute, s.minuteEnd}, Day: Window{s.day, s.dayEnds}}
	if got != want {
		t.Fatalf("at %s:\n got %+v\nwant %+v", s.now, got, want)
	}
}

func TestWindowsAreAlignedToUTCAndNeverGoBack(t *testing.T) {
	for _, tc := range windowCases {
		t.Run(tc.name, func(t *testing.T) {
			var b balance
			for _, step := range tc.steps {
				step.check(t, b.admit(at(t, step.now), windowLimits, 0, 0))
			}
		})
	}
}

// spent are costs and when they are charged; spendCases is what they amount to, for every store.
var spent = []struct {
	at   string
	cost Money
}{
	{"2026-10-31T23:59:59Z", 1},
	{"2026-11-01T00:00:00Z", 10},
	{"2026-11-24T23:59:59.9Z", 100},
	{"2026-11-25T00:00:00Z", 1000},
	{"2026-11-24T12:00:00Z", 10000}, // late: the day it belongs to has ended
	{"2026-10-24T12:00:00Z", 100000},
}

const spendCap = 111000 // of spendCases

var spendCases = []spendCase{
	{"2026-11-25T06:00:00Z", "", 111111, 0},
	{"2026-11-25T06:00:00Z", PeriodTotal, 111111, 0},
	{"2026-11-25T06:00:00Z", PeriodMonth, 111110, 5*24*time.Hour + 18*time.Hour},
	{"2026-11-25T06:00:00Z", PeriodDay, 111000, 18 * time.Hour},
	{"2026-11-24T06:00:00Z", PeriodDay, 111000, 42 * time.Hour}, // the clock stepped back
	{"2026-11-26T00:00:00Z", PeriodDay, 0, 24 * time.Hour},
	{"2026-12-01T00:00:00Z", PeriodMonth, 0, 31 * 24 * time.Hour},
	{"2026-12-01T00:00:00Z", PeriodTotal, 111111, 0},
}

type spendCase struct {
	now    string
	period Period
	spend  Money
	reset  time.Duration
}

func (c spendCase) limits() Limits { return Limits{SpendCap: spendCap, SpendPeriod: c.period} }

func (c spendCase) check(t *testing.T, got Verdict) {
	t.Helper()
	if got.Spend != c.spend || got.Reset != c.reset {
		t.Errorf("%s at %s: got %d and %s, want %d and %s", c.period, c.now, got.Spend, got.Reset, c.spend, c.reset)
	}
	if refused := got.Refused == LimitSpend; refused != (c.spend >= spendCap) {
		t.Errorf("%s at %s: refused by %q with spend %d of %d", c.period, c.now, got.Refused, c.spend, Money(spendCap))
	}
}

func TestSpendIsSummedOverItsPeriod(t *testing.T) {
	var b balance
	for _, s := range spent {
		b.charge(s.cost, at(t, s.at))
	}
	for _, tc := range spendCases {
		clone := b
		tc.check(t, clone.admit(at(t, tc.now), tc.limits(), 0, 0))
	}
}

// refusalCases hold for every store, where a nano-dollar is spent, two requests were counted, of which one ended with five
// tokens and the other is under way.
var refusalCases = []struct {
	limits Limits
	want   Limit
}{
	{Limits{RPM: 2, RPD: 2, TPM: 5, MaxConcurrency: 1, SpendCap: 1}, LimitSpend},
	{Limits{RPM: 2, RPD: 2, TPM: 5, MaxConcurrency: 1, SpendCap: 2}, LimitRPD},
	{Limits{RPM: 2, RPD: 3, TPM: 5, MaxConcurrency: 1, SpendCap: 2}, LimitRPM},
	{Limits{RPM: 3, RPD: 3, TPM: 5, MaxConcurrency: 1, SpendCap: 2}, LimitTPM},
	{Limits{RPM: 3, RPD: 3, TPM: 6, MaxConcurrency: 1, SpendCap: 2}, LimitConcurrency},
	{Limits{RPM: 3, RPD: 3, TPM: 6, MaxConcurrency: 2, SpendCap: 2}, ""},
	{Limits{RPM: 2}, LimitRPM},
	{Limits{TPM: 4}, LimitTPM},
	{Limits{}, ""},
}

// refusalBegin are the limits of the requests before those of refusalCases.
var refusalBegin = Limits{TPM: 100, MaxConcurrency: 100}

func TestRefusedRequestCountsNowhere(t *testing.T) {
	now := at(t, "2026-11-24T10:00:00Z")
	for _, tc := range refusalCases {
		var a account
		for i := range 2 {
			a.admit(now, Admission{RequestID: requestID(i), Limits: refusalBegin})
		}
		a.settle(&Event{RequestID: requestID(0), Cost: 1, PromptTokens: 2, CompletionTokens: 3, Time: now})
		before := a.balance
		if got := a.admit(now, Admission{RequestID: "next", Limits: tc.limits}).Refused; got != tc.want {
			t.Errorf("%+v: refused by %q, want %q", tc.limits, got, tc.want)
		}
		if tc.want != "" && (a.balance != before || len(a.underWay.requests) != 1) {
			t.Errorf("%+v: a refused request changed %+v to %+v", tc.limits, before, a.balance)
		}
	}
}

func TestTokensBelongToTheMinuteInWhichARequestEnds(t *testing.T) {
	var a account
	limits := Limits{TPM: 10}
	used := func(now string) int64 { return a.admit(at(t, now), Admission{Limits: limits}).Tokens.Used }
	end := func(now string, tokens int64) { a.settle(&Event{PromptTokens: tokens, Time: at(t, now)}) }
	end("2026-11-24T10:00:00Z", 7) // before there was a limit
	for _, step := range []struct {
		now  string
		ends int64
		want int64
	}{
		{"2026-11-24T10:00:01Z", 0, 0},
		{"2026-11-24T10:00:02Z", 4, 4},
		{"2026-11-24T10:00:59.9Z", 5, 9},
		{"2026-11-24T10:01:00Z", 0, 0},
		{"2026-11-24T10:01:30Z", 25, 25},
		{"2026-11-24T10:00:59Z", 0, 25}, // a clock that steps back refills nothing
		{"2026-11-24T10:02:00Z", 0, 0},
	} {
		end(step.now, step.ends)
		if got := used(step.now); got != step.want {
			t.Errorf("%s: %d tokens, want %d", step.now, got, step.want)
		}
	}
}

func TestRefundedTokensAreFreeAgain(t *testing.T) {
	now := at(t, "2026-11-24T10:00:00Z")
	var a account
	a.admit(now, Admission{Limits: Limits{TPM: 10}})
	a.settle(&Event{Time: now})
	before := a.balance
	c, _ := a.settle(&Event{Cost: 3, PromptTokens: 8, Time: now})
	if a.balance.Tokens.Sum != 8 {
		t.Fatalf("%+v", a.balance)
	}
	if a.balance.refund(c); a.balance != before {
		t.Errorf("%+v, want %+v", a.balance, before)
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

// BenchmarkMemoryAdmit is the arithmetic alone, without a store around it.
func BenchmarkMemoryAdmit(b *testing.B) {
	a := &account{}
	asked := Admission{KeyID: "key", Limits: Limits{RPM: 1 << 40, RPD: 1 << 40, SpendCap: usd, SpendPeriod: PeriodMonth}}
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		a.mu.Lock()
		a.admit(now, asked)
		a.mu.Unlock()
	}
}
