package mesh

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"go.uber.org/zap"
)

// Admit asks Redis, whose clock decides. With what the request has waited before, it takes no longer than the timeout,
// whether the client stays or leaves.
func (s *redisStore) Admit(ctx context.Context, a Admission) (Verdict, error) {
	if !storable(a.KeyID) || strings.ContainsAny(a.KeyID, "{}") {
		return Verdict{}, errUnusableID
	}
	if s.degraded() {
		return s.admitWithout(a, errRedisDown)
	}
	timeout := s.timeout - a.Waited
	if timeout <= 0 {
		return s.admitWithout(a, errNoTimeLeft)
	}
	pending, err := s.pendingEntry(a)
	if err != nil {
		return Verdict{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	began := time.Now()
	reply, err := s.admits.run(ctx, s, s.admitKeys(a), s.admitArgs(a, pending)...)
	if err == nil && time.Since(began) > timeout {
		err = context.DeadlineExceeded
	}
	s.breaker.noteTimed(a.KeyID, err)
	if isScriptFault(err) {
		s.reportFault(a.KeyID, err)
	}
	if err != nil {
		return s.admitUnanswered(a, unanswered(err))
	}
	verdict, err := s.readVerdict(reply, a)
	if err != nil {
		return Verdict{}, err
	}
	return verdict, nil
}

// reportFault logs, once for each key, that its data in Redis is not what a script expects.
func (s *redisStore) reportFault(keyID string, cause error) {
	account := s.accounts.of(keyID)
	account.mu.Lock()
	reported := account.faulty
	account.faulty = true
	account.mu.Unlock()
	if !reported {
		s.logger.Error("Redis has something else in place of a key's account; on_failure decides on its requests",
			zap.String("key_id", keyID), zap.Error(cause))
	}
}

// These are returned without asking.
var (
	errRedisDown  = fmt.Errorf("%w: redis cannot be reached", errUnavailable)
	errNoTimeLeft = fmt.Errorf("%w: looking up the key took all of the time", errUnavailable)
)

// admitWithout decides without Redis.
func (s *redisStore) admitWithout(a Admission, cause error) (Verdict, error) {
	if s.refuse || a.Job != nil {
		return Verdict{}, cause
	}
	account := s.accounts.of(a.KeyID)
	account.mu.Lock()
	defer account.mu.Unlock()
	verdict := account.admit(s.now(), a)
	if verdict.Refused == "" && !a.Uncounted {
		account.countLater(a.RequestID)
	}
	return verdict, nil
}

// admitUnanswered decides where Redis was asked and may yet have counted the request. If it does not run, that is
// undone.
func (s *redisStore) admitUnanswered(a Admission, cause error) (Verdict, error) {
	verdict, err := s.admitWithout(a, cause)
	if err != nil || verdict.Refused != "" {
		s.void(a)
		verdict.void = err == nil
		return verdict, err
	}
	if a.Limits.MaxConcurrency > 0 {
		account := s.accounts.of(a.KeyID)
		account.mu.Lock()
		account.underWay.begin(a.RequestID, place{shared: true, keeps: a.Keeps})
		account.mu.Unlock()
	}
	return verdict, nil
}

func (s *redisStore) admitKeys(a Admission) []string {
	return []string{
		s.key(a.KeyID, "account"), s.key(a.KeyID, "pending"), s.key(a.KeyID, "done:"+dayOfRequest(a.RequestID)), s.key(a.KeyID, "parts"),
	}
}

func (s *redisStore) admitArgs(a Admission, pending string) []any {
	l := a.Limits
	args := []any{a.RequestID, l.RPM, l.RPD, int64(l.SpendCap), string(l.SpendPeriod), l.Hard, int64(a.MaxCost), pending, a.Uncounted}
	if l.TPM == 0 && l.MaxConcurrency == 0 {
		return args
	}
	args = append(args, l.TPM, l.MaxConcurrency)
	if l.MaxConcurrency == 0 {
		return args
	}
	account := s.accounts.of(a.KeyID)
	account.mu.Lock()
	defer account.mu.Unlock()
	args = append(args, account.underWay.unshared())
	for id := range account.underWay.ended {
		args = append(args, id)
	}
	return args
}

// requestBegan returns when a request began, as its id says.
func requestBegan(requestID string) (began time.Time, ok bool) {
	_, encoded, _ := strings.Cut(requestID, "_")
	id, err := ulid.Parse(encoded)
	if err != nil {
		return time.Time{}, false
	}
	return ulid.Time(id.Time()).UTC(), true
}

// dayOfRequest returns the UTC day on which a request began. What is kept for a day is found by it, whenever a request
// is settled.
func dayOfRequest(requestID string) string {
	began, ok := requestBegan(requestID)
	if !ok {
		return "other"
	}
	return began.Format(time.DateOnly)
}

// pendingEntry is what Redis keeps of a request until it is settled: who serves it, and what to charge if that one
// dies. The script puts more before it.
func (s *redisStore) pendingEntry(a Admission) (string, error) {
	if a.RequestID == "" {
		return "", nil
	}
	e := a.Pending
	e.KeyID, e.RequestID, e.Cost = a.KeyID, a.RequestID, max(e.Cost, 0)
	encoded, err := encodeEvent(&e)
	if err != nil {
		return "", fmt.Errorf("encoding pending entry: %w", err)
	}
	holder := s.instance
	if a.Job != nil {
		holder = a.Job.holder()
	}
	return holder + " " + string(encoded), nil
}

// readVerdict reads what the script returned, and has this instance's own account go on from there should Redis fail.
func (s *redisStore) readVerdict(reply any, a Admission) (Verdict, error) {
	fields, ok := reply.([]any)
	var n [11]int64
	if !ok || len(fields) != 9 && len(fields) != len(n) {
		return Verdict{}, answerError("admit", reply)
	}
	for i, field := range fields {
		text, ok := field.(string)
		if !ok {
			return Verdict{}, answerError("admit", field)
		}
		if i == 0 {
			continue
		}
		var err error
		if n[i], err = strconv.ParseInt(text, 10, 64); err != nil {
			return Verdict{}, fmt.Errorf("script admit: %w", err)
		}
	}
	now := time.Unix(n[1], n[2]*1000)
	b := balance{Minute: tally{n[3], n[4]}, Day: tally{n[5], n[6]}}
	period := tally{n[7], n[8]}
	v := Verdict{
		Refused: Limit(fields[0].(string)),
		Minute:  Window{Used: b.Minute.Sum, Reset: until(now, b.Minute.Start+secondsPerMinute)},
		Day:     Window{Used: b.Day.Sum, Reset: until(now, b.Day.Start+secondsPerDay)},
		Spend:   Money(period.Sum),
	}
	if a.Limits.TPM > 0 {
		b.Tokens = tally{n[9], n[10]}
		v.Tokens = Window{Used: b.Tokens.Sum, Reset: until(now, b.Tokens.Start+secondsPerMinute)}
	}
	switch a.Limits.SpendPeriod {
	case PeriodMonth:
		b.Month, v.Reset = period, until(now, monthAfter(period.Start))
	case PeriodDay:
		b.SpendDay, v.Reset = period, until(now, period.Start+secondsPerDay)
	default:
		b.Total = v.Spend
	}
	var fits bool
	v.Spend, fits = s.remember(a, v.Refused == "", b, now)
	if v.Refused == "" && !fits {
		s.void(a)
		v.Refused = LimitSpend
		v.Minute.Used, v.Day.Used = v.Minute.Used-1, v.Day.Used-1
	}
	return v, nil
}

// remember has the account of this instance say what Redis said last. Answers may overtake one another; then it is
// behind by as much. What this instance has admitted without Redis, and Redis does not know yet, it goes on counting:
// fits reports whether the cap has room for the request beside that too.
func (s *redisStore) remember(a Admission, admitted bool, b balance, now time.Time) (spend Money, fits bool) {
	account := s.accounts.of(a.KeyID)
	account.mu.Lock()
	defer account.mu.Unlock()
	if s.unsettled() {
		b.keepSpend(&account.balance)
	}
	if a.Limits.TPM == 0 { // Redis was not asked for them
		b.Tokens = account.balance.Tokens
	}
	account.balance = b
	account.reserved.release(a.RequestID)
	spend, _ = b.spent(now, a.Limits.SpendPeriod)
	fits = a.Limits.exhausted(use{spend: spend, claimed: account.reserved.sum.plus(a.MaxCost)}) == ""
	if admitted && fits && a.Job == nil {
		account.begin(a, true)
	}
	return spend, fits
}

// unsettled reports whether something that this instance has charged is not yet in Redis.
func (s *redisStore) unsettled() bool {
	return s.writing.Load() || s.queue.any() || s.journal.count() > 0
}

// void undoes an admission.
func (s *redisStore) void(a Admission) {
	if a.RequestID == "" {
		return
	}
	if a.Limits.MaxConcurrency > 0 {
		account := s.accounts.of(a.KeyID)
		account.mu.Lock()
		account.underWay.begin(a.RequestID, place{shared: true}) // as far as Redis knows
		account.underWay.leave(a.RequestID)
		account.mu.Unlock()
	}
	s.queue.add(settlement{Kind: settleVoid, Event: Event{KeyID: a.KeyID, RequestID: a.RequestID}})
}
