package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// toldLabel is what Redis was told on a day. It forgets what nobody has told it for long.
type toldLabel struct {
	KeyLabel
	day int64
}

// tellLabels enters what people know the keys of a batch by. That is for reports of all keys; what does not go through
// comes with the key's next settlement. The writer alone calls it.
func (s *redisStore) tellLabels(ctx context.Context, batch []settlement) {
	var news map[string]KeyLabel
	today := dayOf(s.now())
	for _, one := range batch {
		e := &one.Event
		label := KeyLabel{e.KeyName, e.Owner}
		if one.Kind != settleEvent || s.labels[e.KeyID] == (toldLabel{label, today}) {
			continue
		}
		if news == nil {
			news = make(map[string]KeyLabel)
		}
		news[e.KeyID] = label
	}
	if news == nil {
		return
	}
	fields := make([]any, 0, 2*len(news))
	for keyID, label := range news {
		encoded, _ := json.Marshal(label) // strings: cannot fail
		fields = append(fields, keyID, encoded)
	}
	pipe := s.client.Pipeline()
	pipe.HSet(ctx, s.shared("usagekeys"), fields...)
	pipe.Expire(ctx, s.shared("usagekeys"), keptDays)
	if _, err := pipe.Exec(ctx); err != nil {
		return
	}
	if s.labels == nil || len(s.labels) > maxKnown {
		s.labels = make(map[string]toldLabel)
	}
	for keyID, label := range news {
		s.labels[keyID] = toldLabel{label, today}
	}
}

// reportTimeout is of one command of a report.
const reportTimeout = 5 * time.Second

// report runs what reads for a report, once this instance's own settlements are in, which takes a moment.
func (s *redisStore) report(ctx context.Context, read func(ctx context.Context) error) error {
	if s.degraded() {
		return errRedisDown
	}
	const patience = 300 * time.Millisecond
	for end := time.Now().Add(patience); s.unsettled() && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(2 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	if err := read(ctx); err != nil {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return nil
}

// Usage reads the hashes of the periods and keys that it needs.
func (s *redisStore) Usage(ctx context.Context, q UsageQuery, fn func(UsageRow)) error {
	return s.report(ctx, func(ctx context.Context) error {
		keys := []string{q.KeyID}
		if q.KeyID == "" {
			labels, err := s.client.HKeys(ctx, s.shared("usagekeys")).Result()
			if err != nil {
				return err
			}
			keys = labels
		}
		now := s.now()
		q = q.clamped(now)
		periods := q.periods(now)
		for _, keyID := range keys {
			if err := s.usageOf(ctx, keyID, q, periods, fn); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *redisStore) usageOf(ctx context.Context, keyID string, q UsageQuery, periods []usagePeriod, fn func(UsageRow)) error {
	if q.Sessions {
		return s.sessionsOf(ctx, keyID, q, periods, fn)
	}
	var names []string
	wanted := make(map[string]bool) // hours
	for _, p := range periods {
		if !p.hour {
			names = append(names, "usage:"+p.name)
			continue
		}
		if wanted[p.name] = true; len(names) == 0 || names[len(names)-1] != "hours:"+p.name[:len(time.DateOnly)] {
			names = append(names, "hours:"+p.name[:len(time.DateOnly)])
		}
	}
	return s.eachHash(ctx, keyID, names, func(name string, fields map[string]string) error {
		kind, day, _ := strings.Cut(name, ":")
		return readSums(fields, kind == "hours", func(hour, model string, sums *usageSums) {
			if kind == "usage" || wanted[hour] {
				fn(UsageRow{KeyID: keyID, Day: day, Model: model, usageSums: *sums})
			}
		})
	})
}

// sessionsOf reads the hashes of a key's sessions.
func (s *redisStore) sessionsOf(ctx context.Context, keyID string, q UsageQuery, periods []usagePeriod, fn func(UsageRow)) error {
	wanted := make(map[string]bool, len(periods))
	sessions := make(map[string]bool)
	if q.SessionID != "" {
		sessions[q.SessionID] = true
	}
	last := ""
	for _, p := range periods {
		wanted[p.name] = true
		day := p.name[:len(time.DateOnly)]
		if q.SessionID != "" || day == last {
			continue
		}
		last = day
		listed, err := s.client.SMembers(ctx, s.key(keyID, "sessions:"+day)).Result()
		if err != nil {
			return err
		}
		for _, id := range listed {
			sessions[id] = true
		}
	}
	var names []string
	for id := range sessions {
		names = append(names, "session:"+id)
	}
	return s.eachHash(ctx, keyID, names, func(name string, fields map[string]string) error {
		return readSums(fields, true, func(hour, model string, sums *usageSums) {
			if wanted[hour] {
				fn(UsageRow{KeyID: keyID, Day: hour[:len(time.DateOnly)], Session: strings.TrimPrefix(name, "session:"), Model: model, usageSums: *sums})
			}
		})
	})
}

// eachHash reads hashes of a key, some at a time.
func (s *redisStore) eachHash(ctx context.Context, keyID string, names []string, fn func(name string, fields map[string]string) error) error {
	const atOnce = 100
	for len(names) > 0 {
		some := names[:min(atOnce, len(names))]
		names = names[len(some):]
		pipe := s.client.Pipeline()
		replies := make([]*redis.MapStringStringCmd, len(some))
		for i, name := range some {
			replies[i] = pipe.HGetAll(ctx, s.key(keyID, name))
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return err
		}
		for i, name := range some {
			if err := fn(name, replies[i].Val()); err != nil {
				return err
			}
		}
	}
	return nil
}

// readSums reads fields as the script names them: the sum, the hour where they have one, the model.
func readSums(fields map[string]string, hours bool, fn func(hour, model string, sums *usageSums)) error {
	type place struct{ hour, model string }
	all := make(map[place]*usageSums)
	for field, value := range fields {
		name, rest, ok := strings.Cut(field, " ")
		if !ok {
			continue // how many models there are
		}
		var at place
		at.model = rest
		if hours {
			at.hour, at.model, _ = strings.Cut(rest, " ")
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return fmt.Errorf("field %q: %w", field, err)
		}
		if all[at] == nil {
			all[at] = new(usageSums)
		}
		if to := all[at].field(name); to != nil {
			*to += n
		}
	}
	for at, sums := range all {
		if sums.All.Requests != 0 {
			fn(at.hour, at.model, sums)
		}
	}
	return nil
}

// field returns the sum that the script calls by a name, or nil.
func (s *usageSums) field(name string) *int64 {
	switch name {
	case "requests":
		return &s.All.Requests
	case "prompt_tokens":
		return &s.All.Prompt
	case "cached_tokens":
		return &s.All.Cached
	case "completion_tokens":
		return &s.All.Completion
	case "cost":
		return (*int64)(&s.All.Cost)
	case "errors":
		return &s.Failed.Requests
	case "error_prompt_tokens":
		return &s.Failed.Prompt
	case "error_cached_tokens":
		return &s.Failed.Cached
	case "error_completion_tokens":
		return &s.Failed.Completion
	case "error_cost":
		return (*int64)(&s.Failed.Cost)
	}
	return nil
}

// UsageKeys reads the labels.
func (s *redisStore) UsageKeys(ctx context.Context) (labels map[string]KeyLabel, err error) {
	err = s.report(ctx, func(ctx context.Context) error {
		fields, err := s.client.HGetAll(ctx, s.shared("usagekeys")).Result()
		labels = make(map[string]KeyLabel, len(fields))
		for keyID, value := range fields {
			var l KeyLabel
			if json.Unmarshal([]byte(value), &l) == nil {
				labels[keyID] = l
			}
		}
		return err
	})
	return labels, err
}

// Entries of the ledger are in the order in which they were settled, by Redis's clock.
const (
	// settledWithin is how long after its beginning a request is settled: a job may wait for a day, and run for another. What
	// a journal has had for longer is not looked for.
	settledWithin = 24*time.Hour + maxPending

	ledgerClocks = time.Minute // by how much the clock of a gateway may be ahead of Redis's
)

// ledgerFrom returns where in a ledger the first request may be that began at t or later.
func ledgerFrom(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return strconv.FormatInt(max(0, t.Add(-ledgerClocks).UnixMilli()), 10)
}

// ledgerTo returns where in a ledger the last request may be that began before t.
func ledgerTo(t time.Time) string {
	if t.IsZero() {
		return "+"
	}
	return strconv.FormatInt(max(0, t.Add(settledWithin).UnixMilli()), 10)
}

// KeyEvents reads the stream, some entries at a time.
func (s *redisStore) KeyEvents(ctx context.Context, keyID string, from, to time.Time, fn func(*Event) bool) error {
	return s.report(ctx, func(ctx context.Context) error {
		const perPage = 500
		for start, end := ledgerFrom(from), ledgerTo(to); ; {
			page, err := s.client.XRevRangeN(ctx, s.key(keyID, "ledger"), end, start, perPage).Result()
			if err != nil {
				return err
			}
			for _, entry := range page {
				if entry.ID == end {
					continue // the last of the page before: Redis 5 knows no open ends
				}
				if outside(entry, from, to) {
					continue
				}
				e, err := readEntry(entry)
				if err != nil {
					return err
				}
				if isWithin(e.began(), from, to) && !fn(e) {
					return nil
				}
			}
			if len(page) < perPage {
				return nil
			}
			end = page[len(page)-1].ID
		}
	})
}

// outside reports whether an entry, by its first member, began at another time. Most of those that are read are not
// wanted, where the time is short.
func outside(entry redis.XMessage, from, to time.Time) bool {
	text, _ := entry.Values["event"].(string)
	id, _, _ := strings.Cut(strings.TrimPrefix(text, `{"request_id":"`), `"`)
	began, ok := requestBegan(id)
	return ok && !isWithin(began, from, to)
}

func readEntry(entry redis.XMessage) (*Event, error) {
	text, _ := entry.Values["event"].(string)
	e := new(Event)
	if err := json.Unmarshal([]byte(text), e); err != nil {
		return nil, fmt.Errorf("ledger entry %s: %w", entry.ID, err)
	}
	return e, nil
}

// KeyEvent goes through the stream from when the request began. Most are entered soon after; a journal may have had some
// for days.
func (s *redisStore) KeyEvent(ctx context.Context, keyID, requestID string) (found *Event, err error) {
	began, ok := requestBegan(requestID)
	if !ok {
		return nil, nil
	}
	err = s.report(ctx, func(ctx context.Context) error {
		const perPage = 1000
		for start := ledgerFrom(began); ; {
			page, err := s.client.XRangeN(ctx, s.key(keyID, "ledger"), start, "+", perPage).Result()
			if err != nil {
				return err
			}
			for _, entry := range page {
				if text, _ := entry.Values["event"].(string); strings.Contains(text, `"`+requestID+`"`) {
					found, err = readEntry(entry)
					return err
				}
			}
			if len(page) < perPage {
				return nil
			}
			start = page[len(page)-1].ID
		}
	})
	return found, err
}

// Standing reads the account. This instance's own knows what is under way here.
func (s *redisStore) Standing(ctx context.Context, keyID string, limits Limits) (Standing, error) {
	if s.degraded() && s.refuse {
		return Standing{}, errRedisDown
	}
	own := s.accounts.of(keyID)
	if s.degraded() {
		return own.standing(s.now(), limits), nil
	}
	var b balance
	var pending, parts int64
	err := s.report(ctx, func(ctx context.Context) error {
		values, err := s.client.HMGet(ctx, s.key(keyID, "account"), "minute", "minute_used", "day", "day_used", "total", "month", "month_spent",
			"spend_day", "spend_day_spent", "tokens_minute", "tokens_minute_used").Result()
		if err != nil {
			return err
		}
		var n [11]int64
		for i, value := range values {
			text, _ := value.(string)
			n[i], err = strconv.ParseInt(cmp.Or(text, "0"), 10, 64)
			if err != nil {
				return err
			}
		}
		b = balance{
			Minute: tally{n[0], n[1]}, Day: tally{n[2], n[3]}, Total: Money(n[4]), Month: tally{n[5], n[6]},
			SpendDay: tally{n[7], n[8]}, Tokens: tally{n[9], n[10]},
		}
		if pending, err = s.client.HLen(ctx, s.key(keyID, "pending")).Result(); err != nil {
			return err
		}
		parts, err = s.client.HLen(ctx, s.key(keyID, "parts")).Result()
		return err
	})
	if err != nil && !s.refuse && errors.Is(err, errUnavailable) {
		return own.standing(s.now(), limits), nil
	}
	return Standing{b.standing(s.now(), limits), pending - parts}, err
}

var _ UsageStore = (*redisStore)(nil)
