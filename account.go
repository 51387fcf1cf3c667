package mesh

import (
	"crypto/sha256"
	"sync"
	"time"
)

// account is what a store on this machine knows of one key. Its mutex is held for arithmetic only, never during I/O.
type account struct {
	keyID string

	mu       sync.Mutex
	balance  balance
	reserved reservations
	underWay underWay
	alone    map[string]struct{} // requests that were admitted without the shared store, and that it is to count
	faulty   bool                // the log says that Redis has something else in its place
	unsaved  bool                // the writer has been told that there is something new
	settled  []settledEvent      // not yet with the writer; their costs are in balance already
}

// settledEvent is an event on its way to the ledger.
type settledEvent struct {
	requestID string
	encoded   []byte
	charge    charge
	used      eventUsage
}

// balance is where a key stands. Its windows are derived, not reset: one that began earlier than the window a request
// falls in counts as empty.
type balance struct {
	Minute   tally `json:"minute"`    // requests
	Day      tally `json:"day"`       // requests
	Total    Money `json:"total_usd"` // ever spent
	Month    tally `json:"month"`     // spent, in nano-dollars
	SpendDay tally `json:"spend_day"` // spent, in nano-dollars

	// Tokens are those of requests that ended in a minute. They are counted once a request has come under a limit for them.
	Tokens tally `json:"tokens,omitzero"`
}

// tally is a sum over one window.
type tally struct {
	Start int64 `json:"start"` // of the window, in Unix seconds
	Sum   int64 `json:"sum"`
}

// at returns the tally of the window that begins at start. A clock that was set back must not refill a window, so that
// a tally that begins later stays.
func (t tally) at(start int64) tally {
	if start > t.Start {
		return tally{Start: start}
	}
	return t
}

const (
	secondsPerMinute = 60
	secondsPerDay    = 24 * 60 * 60
)

func minuteOf(t time.Time) int64 { return t.Unix() - t.Unix()%secondsPerMinute }

func dayOf(t time.Time) int64 { return t.Unix() - t.Unix()%secondsPerDay }

func monthOf(t time.Time) int64 {
	year, month, _ := t.UTC().Date()
	return time.Date(year, month, 1, 0, 0, 0, 0, time.UTC).Unix()
}

func monthAfter(start int64) int64 { return time.Unix(start, 0).UTC().AddDate(0, 1, 0).Unix() }

// admit counts a request in both windows, unless one of the limits refuses it. A hard cap must have room for what is
// claimed: all that is reserved, and the request's own largest cost.
func (b *balance) admit(now time.Time, limits Limits, claimed Money, underWay int) Verdict {
	minute, day, tokens := b.Minute.at(minuteOf(now)), b.Day.at(dayOf(now)), b.Tokens.at(minuteOf(now))
	spend, spendReset := b.spent(now, limits.SpendPeriod)

	refused := limits.exhausted(use{spend, claimed, day.Sum, minute.Sum, tokens.Sum, int64(underWay)})
	if refused == "" {
		minute.Sum++
		day.Sum++
		b.Minute, b.Day = minute, day
		if limits.TPM > 0 {
			b.Tokens = tokens
		}
	}
	v := Verdict{
		Refused: refused,
		Minute:  Window{Used: minute.Sum, Reset: until(now, minute.Start+secondsPerMinute)},
		Day:     Window{Used: day.Sum, Reset: until(now, day.Start+secondsPerDay)},
		Spend:   spend,
		Reset:   spendReset,
	}
	if limits.TPM > 0 {
		v.Tokens = Window{Used: tokens.Sum, Reset: until(now, tokens.Start+secondsPerMinute)}
	}
	return v
}

// use is what of each limit is used when a request comes.
type use struct {
	spend, claimed      Money
	day, minute, tokens int64
	underWay            int64
}

// exhausted returns the limit that refuses a request, or nothing.
func (l *Limits) exhausted(u use) Limit {
	switch {
	case l.SpendCap > 0 && u.spend >= l.SpendCap:
		return LimitSpend
	case l.SpendCap > 0 && l.Hard && u.spend.plus(u.claimed) > l.SpendCap:
		return LimitSpend
	case l.RPD > 0 && u.day >= l.RPD:
		return LimitRPD
	case l.RPM > 0 && u.minute >= l.RPM:
		return LimitRPM
	case l.TPM > 0 && u.tokens >= l.TPM:
		return LimitTPM
	case l.MaxConcurrency > 0 && u.underWay >= l.MaxConcurrency:
		return LimitConcurrency
	}
	return ""
}

// spent returns the spend of the period that now falls in, and the time until that period ends.
func (b *balance) spent(now time.Time, period Period) (Money, time.Duration) {
	switch period {
	case PeriodMonth:
		month := b.Month.at(monthOf(now))
		return Money(month.Sum), until(now, monthAfter(month.Start))
	case PeriodDay:
		day := b.SpendDay.at(dayOf(now))
		return Money(day.Sum), until(now, day.Start+secondsPerDay)
	}
	return b.Total, 0
}

func until(now time.Time, end int64) time.Duration { return time.Unix(end, 0).Sub(now) }

// charge is what one event added to a balance, and to which windows.
type charge struct {
	total      Money
	month, day tally
	tokens     tally
}

// charge adds a cost to the spend of the day and month that t falls in, or to later ones already begun.
func (b *balance) charge(cost Money, t time.Time) charge {
	var c charge
	b.Total, c.total = addCost(b.Total, cost)
	b.Month, c.month = b.Month.at(monthOf(t)).add(cost)
	b.SpendDay, c.day = b.SpendDay.at(dayOf(t)).add(cost)
	return c
}

// countTokens adds tokens to those of the minute that t falls in, or of a later one already begun, and to the charge.
func (b *balance) countTokens(tokens int64, t time.Time, c *charge) {
	if b.Tokens.Start == 0 {
		return
	}
	b.Tokens, c.tokens = b.Tokens.at(minuteOf(t)).add(Money(tokens))
}

func (t tally) add(cost Money) (sum, added tally) {
	total, difference := addCost(Money(t.Sum), cost)
	return tally{t.Start, int64(total)}, tally{t.Start, int64(difference)}
}

// addCost adds up to the largest amount there is, and says how much it added.
func addCost(m, cost Money) (sum, added Money) {
	sum = m.plus(cost)
	return sum, sum - m
}

// keepSpend has the spend of each period, and the minute's tokens, be no less than other says.
func (b *balance) keepSpend(other *balance) {
	b.Total = max(b.Total, other.Total)
	b.Month = b.Month.atLeast(other.Month)
	b.SpendDay = b.SpendDay.atLeast(other.SpendDay)
	b.Tokens = b.Tokens.atLeast(other.Tokens)
}

func (t tally) atLeast(other tally) tally {
	if other.Start == t.Start {
		t.Sum = max(t.Sum, other.Sum)
	}
	return t
}

// refund takes a charge back. What was charged to a window that has ended since is gone with it.
func (b *balance) refund(c charge) {
	b.Total -= c.total
	b.Month = b.Month.take(c.month)
	b.SpendDay = b.SpendDay.take(c.day)
	b.Tokens = b.Tokens.take(c.tokens)
}

func (t tally) take(added tally) tally {
	if t.Start == added.Start {
		t.Sum -= added.Sum
	}
	return t
}

// reservations are what the requests under way under a hard cap may yet cost. They are in memory only: after a restart
// no request is under way.
type reservations struct {
	sum       Money
	byRequest map[string]Money
}

func (r *reservations) hold(requestID string, amount Money) {
	if amount == 0 {
		return
	}
	if r.byRequest == nil {
		r.byRequest = make(map[string]Money)
	}
	r.release(requestID)
	r.byRequest[requestID] = amount
	r.sum += amount
}

func (r *reservations) release(requestID string) {
	r.sum -= r.byRequest[requestID]
	delete(r.byRequest, requestID)
}

// admit lets the request through or not, and reserves its largest cost where the cap is hard. The caller holds a.mu.
func (a *account) admit(now time.Time, asked Admission) Verdict {
	before := a.balance
	verdict := a.balance.admit(now, asked.Limits, a.reserved.sum.plus(asked.MaxCost), len(a.underWay.requests))
	if asked.Uncounted {
		a.balance.Minute, a.balance.Day = before.Minute, before.Day
	}
	if verdict.Refused == "" {
		a.begin(asked, false)
	}
	return verdict
}

// begin notes what an admitted request may need until it is settled. shared is for one that the shared store counts too.
func (a *account) begin(asked Admission, shared bool) {
	if asked.Limits.Hard {
		a.reserved.hold(asked.RequestID, asked.MaxCost)
	}
	if asked.Limits.MaxConcurrency > 0 {
		a.underWay.begin(asked.RequestID, place{shared: shared, keeps: asked.Keeps})
	}
}

// settle charges for a request, and lets go of what begin noted; keeps says that its place is kept. The caller holds a.mu.
func (a *account) settle(e *Event) (c charge, keeps bool) {
	a.reserved.release(e.RequestID)
	keeps = a.underWay.end(e.RequestID)
	charged := a.balance.charge(e.Cost, e.Time)
	a.balance.countTokens(e.PromptTokens+e.CompletionTokens, e.Time, &charged)
	return charged, keeps
}

// countLater notes a request that was admitted without the shared store. The caller holds a.mu.
func (a *account) countLater(requestID string) {
	if a.alone == nil {
		a.alone = make(map[string]struct{})
	}
	a.alone[requestID] = struct{}{}
}

// toCount reports whether the shared store is to count a request that has ended. The caller holds a.mu.
func (a *account) toCount(requestID string) bool {
	_, alone := a.alone[requestID]
	delete(a.alone, requestID)
	return alone
}

// leave gives back a place that was kept, and reports whether the shared store has yet to hear of it.
func (a *account) leave(requestID string) (shared bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.underWay.leave(requestID)
}

// change notes that the account has something to save, and reports whether the writer does not know that yet.
func (a *account) change() bool {
	news := !a.unsaved
	a.unsaved = true
	return news
}

// take returns what there is to save.
func (a *account) take() (balance, []settledEvent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	settled := a.settled
	a.settled, a.unsaved = nil, false
	return a.balance, settled
}

// refund takes back what an event was charged that had been charged before.
func (a *account) refund(c charge) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.balance.refund(c)
}

// recentIDs remembers request ids: those that have not been released, and a number of those that have. It keeps their
// digests, because the garbage collector has to look through a map of strings, again and again.
type recentIDs struct {
	mu       sync.Mutex
	known    map[idDigest]struct{}
	released []idDigest // a ring
	oldest   int        // of released, once it is full
}

// idDigest is the first half of an id's SHA-256.
type idDigest [sha256.Size / 2]byte

func digestOfID(id string) idDigest {
	whole := sha256.Sum256([]byte(id))
	return idDigest(whole[:])
}

const maxReleased = 65_536

// add reports whether the id was unknown.
func (r *recentIDs) add(id string) bool {
	d := digestOfID(id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.known[d]; ok {
		return false
	}
	if r.known == nil {
		r.known = make(map[idDigest]struct{})
	}
	r.known[d] = struct{}{}
	return true
}

// release lets an id be forgotten, once enough others have been released after it.
func (r *recentIDs) release(id string) {
	d := digestOfID(id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.released) < maxReleased {
		r.released = append(r.released, d)
		return
	}
	delete(r.known, r.released[r.oldest])
	r.released[r.oldest] = d
	r.oldest = (r.oldest + 1) % maxReleased
}
