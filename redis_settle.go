package mesh

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// settlement is one thing to enter into Redis about a request that has ended.
type settlement struct {
	Kind  string `json:"kind"`
	Sent  bool   `json:"sent,omitempty"`  // it was sent before, and may have been entered
	Keeps bool   `json:"keeps,omitempty"` // the request goes on taking its place under max_concurrency
	Alone bool   `json:"alone,omitempty"` // the request was admitted without Redis, as far as is known
	Event Event  `json:"event"`

	entry []byte // Event as the ledger has it, where that is at hand
}

// The kinds of settlements there are.
const (
	settleEvent = "settle" // enter the event
	settleLost  = "lost"   // enter the event if the request is still pending: it is an estimate
	settleVoid  = "void"   // undo the admission
	settleDrop  = "drop"   // give up what is pending, which may be a place only
)

const (
	maxSettlements = 100_000         // in memory
	settleBatch    = 256             // in one pipeline
	settleTimeout  = time.Second     // of one pipeline, if timeout is not longer; no request waits for it
	settleRetry    = time.Second     // after one that did not go through
	destructTime   = 5 * time.Second // for what is unsettled when the store is closed
)

// settlements are those on their way to the writer, in order.
type settlements struct {
	wake chan struct{} // there is something to do

	mu      sync.Mutex
	waiting []settlement
	lost    atomic.Int64 // given up, because there were too many
}

func (q *settlements) add(one settlement) {
	q.mu.Lock()
	if len(q.waiting) >= maxSettlements {
		q.lost.Add(1)
	} else {
		q.waiting = append(q.waiting, one)
	}
	q.mu.Unlock()
	q.call()
}

func (q *settlements) any() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting) > 0
}

func (q *settlements) call() {
	select {
	case q.wake <- struct{}{}:
	default: // it has been called already
	}
}

// take returns the first of those waiting.
func (q *settlements) take() []settlement {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.waiting), settleBatch)
	batch := q.waiting[:n:n]
	q.waiting = q.waiting[n:]
	if len(q.waiting) == 0 {
		q.waiting = nil
	}
	return batch
}

// putBack has those that were taken, and could not be dealt with, wait again.
func (q *settlements) putBack(batch []settlement) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = slices.Concat(batch, q.waiting)
}

// Settle leaves the event to the writer. The account of this instance is charged at once, in case it has to decide.
func (s *redisStore) Settle(e Event) {
	entry, err := e.finish(s.now)
	if err != nil {
		s.logger.Error("event that cannot be entered", zap.String("request_id", e.RequestID), zap.Error(err))
		return
	}
	account := s.accounts.of(e.KeyID)
	account.mu.Lock()
	_, keeps := account.settle(&e)
	alone := account.toCount(e.RequestID)
	account.mu.Unlock()
	s.queue.add(settlement{Kind: settleEvent, Keeps: keeps, Alone: alone, Event: e, entry: entry})
}

// Leave leaves it to the writer to have Redis give the place back.
func (s *redisStore) Leave(keyID, requestID string) {
	if s.accounts.of(keyID).leave(requestID) {
		s.queue.add(settlement{Kind: settleDrop, Event: Event{KeyID: keyID, RequestID: requestID}})
	}
}

// fate is what became of a settlement that was sent.
type fate uint8

// The fates there are.
const (
	notEntered  fate = iota // as far as is known
	entered                 // now, or before
	wasSetAside             // Redis will never take it
)

// What the script returns that is not simply done.
const enteredOrNot = int64(3) // it cannot be told any more

// maxSettleRun is how many settlements one run of the script enters. Redis serves nobody else meanwhile.
const maxSettleRun = 32

// settleRun is what one run of the script enters: settlements of one key, whose requests began on one day, by their places
// in a batch.
type settleRun struct {
	keyID, day string
	at         []int
}

// divide divides a batch into runs, and keeps the order of each key.
func divide(batch []settlement) (runs []*settleRun) {
	newest := make(map[string]*settleRun) // of each key
	for i := range batch {
		e := &batch[i].Event
		day := dayOfRequest(e.RequestID)
		run := newest[e.KeyID]
		if run == nil || run.day != day || len(run.at) == maxSettleRun {
			run = &settleRun{keyID: e.KeyID, day: day}
			newest[e.KeyID] = run
			runs = append(runs, run)
		}
		run.at = append(run.at, i)
	}
	return runs
}

// enter enters a batch with one pipeline, and returns the fate of each. What Redis can never take is set aside.
func (s *redisStore) enter(batch []settlement) []fate {
	ctx, cancel := context.WithTimeout(context.Background(), max(settleTimeout, s.timeout))
	defer cancel()
	runs := divide(batch)
	commands := s.pipeline(ctx, batch, runs, s.settles.queue)
	s.enterWhole(ctx, batch, runs, commands)
	fates := make([]fate, len(batch))
	var failed bool // a pipeline that comes to nothing is one failure, however much is in it
	s.tellLabels(ctx, batch)
	for i, run := range runs {
		s.reportSums(run, commands[i])
		for j, at := range run.at {
			var err error
			if fates[at], err = s.fate(batch[at], commands[i], j); fates[at] == notEntered && !failed {
				failed = true
				s.breaker.note(run.keyID, err)
			}
		}
	}
	return fates
}

// reportSums logs that a run of the script has entered all there was, but could not add to a sum.
func (s *redisStore) reportSums(run *settleRun, command *redis.Cmd) {
	if results, ok := command.Val().([]any); ok && len(results) > len(run.at) {
		s.logger.Error("a sum in Redis cannot be added to: something else is in its place; spend or reports lack what the ledger has",
			zap.String("key_id", run.keyID), zap.Any("cause", results[len(run.at)]))
	}
}

// enterWhole is for a Redis that did not know the script: it replaces the commands that failed for that.
func (s *redisStore) enterWhole(ctx context.Context, batch []settlement, runs []*settleRun, commands []*redis.Cmd) {
	if s.settles.noDigest.Load() {
		return
	}
	var places []int // in runs
	var unknown []*settleRun
	for i, command := range commands {
		if mayBeDigest(command.Err()) {
			places, unknown = append(places, i), append(unknown, runs[i])
		}
	}
	if len(places) == 0 {
		return
	}
	whole := s.pipeline(ctx, batch, unknown, func(ctx context.Context, pipe redis.Pipeliner, keys []string, args ...any) *redis.Cmd {
		return s.settles.script.Eval(ctx, pipe, keys, args...)
	})
	s.settles.learn(s, commands[places[0]].Err(), whole[0].Err())
	for i, command := range whole {
		commands[places[i]] = command
	}
}

type queueScript func(ctx context.Context, pipe redis.Pipeliner, keys []string, args ...any) *redis.Cmd

func (s *redisStore) pipeline(ctx context.Context, batch []settlement, runs []*settleRun, queue queueScript) []*redis.Cmd {
	pipe := s.client.Pipeline()
	commands := make([]*redis.Cmd, len(runs))
	for i, run := range runs {
		keys, args := s.settleArgs(batch, run)
		commands[i] = queue(ctx, pipe, keys, args...)
	}
	pipe.Exec(ctx) //nolint:errcheck // each command has its own
	return commands
}

// enterOne enters one settlement, and returns what the script says of it.
func (s *redisStore) enterOne(ctx context.Context, one settlement) (int64, error) {
	batch := []settlement{one}
	keys, args := s.settleArgs(batch, divide(batch)[0])
	reply, err := s.settles.run(ctx, s, keys, args...)
	if err != nil {
		return 0, err
	}
	return settleResult(reply, 0)
}

// settleResult reads what the script says of the i-th settlement of its run.
func settleResult(reply any, i int) (int64, error) {
	results, ok := reply.([]any)
	if !ok || i >= len(results) {
		return 0, answerError("settle", reply)
	}
	switch result := results[i].(type) {
	case int64:
		return result, nil
	case string:
		return 0, scriptError(result)
	}
	return 0, answerError("settle", results[i])
}

// scriptError is an error of Redis that came up, and was caught, within a script.
type scriptError string

// Error returns what Redis said.
func (e scriptError) Error() string { return string(e) }

// RedisError marks it as an answer.
func (scriptError) RedisError() {}

// fate works out what became of the i-th settlement that was sent with a command, and why it was not entered.
func (s *redisStore) fate(one settlement, command *redis.Cmd, i int) (fate, error) {
	var result int64
	err := command.Err()
	if command.Val() != nil {
		// A Cluster's client, when it runs out of time for some commands, says of all that they failed.
		result, err = settleResult(command.Val(), i)
	}
	switch {
	case isScriptFault(err):
		s.setAside(one, "event that cannot be entered: Redis has something else in its place; it is set aside in the journal", err)
		return wasSetAside, nil
	case err == nil && result == enteredOrNot:
		s.setAside(one, "event that may have been entered days ago, which Redis does not know any more; it is set aside in the journal", nil)
		return wasSetAside, nil
	case err == nil:
		return entered, nil
	}
	return notEntered, err
}

func (s *redisStore) setAside(one settlement, why string, cause error) {
	s.logger.Error(why, zap.String("request_id", one.Event.RequestID), zap.String("key_id", one.Event.KeyID),
		zap.String("cost_usd", one.Event.Cost.String()), zap.Error(cause))
	if err := s.journal.setAside(one); err != nil {
		s.logger.Error("event lost", zap.Any("event", one.Event), zap.Error(err))
	}
}

// settleArgs are the keys and arguments of the script, for one run. What is kept for a day goes by the day on
// which the request began, so that an estimate and what replaces it go to the same place.
func (s *redisStore) settleArgs(batch []settlement, run *settleRun) (keys []string, args []any) {
	for _, name := range []string{
		"account", "pending", "done:" + run.day, "lost:" + run.day, "ledger",
		"usage:" + run.day, "hours:" + run.day, "parts", "sessions:" + run.day,
	} {
		keys = append(keys, s.key(run.keyID, name))
	}
	args = append(make([]any, 0, 1+len(run.at)*17), s.maxEvents)
	sessions := make(map[string]int) // place among the keys, from 1
	for _, i := range run.at {
		one := &batch[i]
		e := &one.Event
		if e.SessionID != "" && sessions[e.SessionID] == 0 {
			keys = append(keys, s.key(run.keyID, "session:"+e.SessionID))
			sessions[e.SessionID] = len(keys)
		}
		entry := one.entry
		if entry == nil {
			entry, _ = encodeEvent(e) // it has been encoded before
		}
		args = append(args,
			e.RequestID, one.Kind, entry, int64(e.Cost), e.Model,
			e.PromptTokens, e.CachedTokens, e.CompletionTokens, e.Outcome.failed(),
			unixOfRequest(e.RequestID), one.Sent, s.now().Sub(e.Time) < time.Minute,
			hourOfRequest(e.RequestID), e.SessionID, sessions[e.SessionID], one.Keeps, one.Alone)
	}
	return keys, args
}

// hourOfRequest returns the UTC hour in which a request began, or nothing where its id does not say.
func hourOfRequest(requestID string) string {
	began, ok := requestBegan(requestID)
	if !ok {
		return ""
	}
	return began.Format(hourForm)
}

// unixOfRequest returns when a request began, in Unix seconds, or nothing where its id does not say.
func unixOfRequest(requestID string) string {
	began, ok := requestBegan(requestID)
	if !ok {
		return ""
	}
	return strconv.FormatInt(began.Unix(), 10)
}

// failed reports whether the request failed through no wish of its client.
func (o Outcome) failed() bool { return o != OutcomeCompleted && o != OutcomeClientGone }
