package mesh

import (
	"context"
	"strings"
	"time"
)

// UsageStore is a Store that can say what was used. Sums are kept as requests are settled: for each key, model, UTC day
// and UTC hour, and for each session. A request counts in the hour in which it began.
type UsageStore interface {
	Store

	// Usage calls fn for the sums that the query asks for, in no order. What was settled before the call is in them.
	Usage(ctx context.Context, q UsageQuery, fn func(UsageRow)) error

	// UsageKeys returns the keys that have used anything, with the name and owner they had last.
	UsageKeys(ctx context.Context) (map[string]KeyLabel, error)

	// KeyEvents calls fn for the ledger's entries of a key's requests that began in a time, which does not include its end, the
	// newest first, until it returns false. A bound that is zero is none.
	KeyEvents(ctx context.Context, keyID string, from, to time.Time, fn func(*Event) bool) error

	// KeyEvent returns the ledger's entry of a request, or nil where the key has none of this id.
	KeyEvent(ctx context.Context, keyID, requestID string) (*Event, error)

	// Standing returns where a key stands, without counting anything.
	Standing(ctx context.Context, keyID string, limits Limits) (Standing, error)
}

// KeyLabel is what people know a key by.
type KeyLabel struct {
	Name  string `json:"name,omitempty"`
	Owner string `json:"owner,omitempty"`
}

// UsageQuery asks for sums. From and To are whole hours in UTC; of days that are too long ago for hours, the whole day
// counts.
type UsageQuery struct {
	KeyID     string // empty: all keys
	From, To  time.Time
	Sessions  bool   // by session; then requests without one are left out
	SessionID string // only this one, with Sessions
}

// isWithin reports whether a time is in one that does not include its end, and of which a bound that is zero is none.
func isWithin(t, from, to time.Time) bool {
	return !t.Before(from) && (to.IsZero() || t.Before(to))
}

// UsageRow is a sum.
type UsageRow struct {
	KeyID   string
	Day     string // as in 2026-11-25
	Session string
	Model   string
	usageSums
}

// How long sums are kept. Those of sessions are counted by the hour too.
const (
	keptHours    = 35 * 24 * time.Hour
	keptDays     = 400 * 24 * time.Hour
	keptSessions = 30 * 24 * time.Hour
)

const hourForm = "2006-01-02T15"

// usageSums are sums of requests, and those of them that failed.
type usageSums struct {
	All    usageSum `json:"all"`
	Failed usageSum `json:"failed,omitzero"`
}

type usageSum struct {
	Requests   int64 `json:"n,omitempty"`
	Prompt     int64 `json:"prompt,omitempty"`
	Cached     int64 `json:"cached,omitempty"` // of Prompt
	Completion int64 `json:"completion,omitempty"`
	Cost       Money `json:"usd,omitempty"`
}

func (s *usageSum) add(o usageSum) {
	s.Requests += o.Requests
	s.Prompt += o.Prompt
	s.Cached += o.Cached
	s.Completion += o.Completion
	s.Cost = s.Cost.plus(o.Cost)
}

func (s *usageSums) add(o usageSums) {
	s.All.add(o.All)
	s.Failed.add(o.Failed)
}

// succeeded returns the sums of the requests that did not fail.
func (s usageSums) succeeded() usageSum {
	return usageSum{
		Requests:   s.All.Requests - s.Failed.Requests,
		Prompt:     s.All.Prompt - s.Failed.Prompt,
		Cached:     s.All.Cached - s.Failed.Cached,
		Completion: s.All.Completion - s.Failed.Completion,
		Cost:       s.All.Cost - s.Failed.Cost,
	}
}

// eventUsage is what an event adds to sums.
type eventUsage struct {
	keyID, session, model string
	label                 KeyLabel
	hour                  int64 // its beginning, in Unix seconds
	failed                bool
	usageSum
}

func usedBy(e *Event) eventUsage {
	began, ok := requestBegan(e.RequestID)
	if !ok {
		began = e.Time
	}
	return eventUsage{
		keyID: e.KeyID, session: strings.ReplaceAll(e.SessionID, "\x00", "\uFFFD"), model: e.Model,
		label:    KeyLabel{e.KeyName, e.Owner},
		hour:     began.Unix() - began.Unix()%3600,
		failed:   e.Outcome.failed(),
		usageSum: usageSum{1, e.PromptTokens, e.CachedTokens, e.CompletionTokens, e.Cost},
	}
}

func (u *eventUsage) sums() usageSums {
	s := usageSums{All: u.usageSum}
	if u.failed {
		s.Failed = u.usageSum
	}
	return s
}

// usagePeriod is a day or an hour whose sums a query needs.
type usagePeriod struct {
	name string // as in 2026-11-25, or 2026-11-25T07
	hour bool
}

// periods returns the days that are in a query as a whole, and the hours of the others.
func (q UsageQuery) periods(now time.Time) (periods []usagePeriod) {
	const day = 24 * time.Hour
	for d := q.From.Truncate(day); d.Before(q.To); d = d.Add(day) {
		whole := !d.Before(q.From) && !d.Add(day).After(q.To)
		if !q.Sessions && (whole || now.Sub(d) > keptHours) {
			periods = append(periods, usagePeriod{name: d.Format(time.DateOnly)})
			continue
		}
		for h := d; h.Before(d.Add(day)); h = h.Add(time.Hour) {
			if !h.Before(q.From) && h.Before(q.To) {
				periods = append(periods, usagePeriod{h.Format(hourForm), true})
			}
		}
	}
	return periods
}

// clamped returns the query within what is kept at all. What ends later than now ends with the day: there is nothing
// yet, and a whole day is one sum.
func (q UsageQuery) clamped(now time.Time) UsageQuery {
	kept := keptDays
	if q.Sessions {
		kept = keptSessions
	}
	now = now.UTC()
	if oldest := now.Add(-kept).Truncate(24 * time.Hour); q.From.Before(oldest) {
		q.From = oldest
	}
	if !q.To.Before(now) {
		q.To = now.Truncate(24 * time.Hour).Add(24 * time.Hour)
	}
	return q
}

// Standing is where a key stands with its limits.
type Standing struct {
	Verdict
	UnderWay int64 // requests
}
