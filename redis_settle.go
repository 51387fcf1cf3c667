package mesh

import (
	"context"
	"encoding/json"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// settlement is one thing to enter into Redis about a request that has ended.
type settlement struct {
	Kind  string `json:"kind"`
	Event Event  `json:"event"`
}

// The kinds of settlements there are.
const (
	settleEvent = "settle" // enter the event
	settleLost  = "lost"   // enter the event if the request is still pending: it is an estimate
	settleVoid  = "void"   // undo the admission
)

const (
	maxSettlements = 100_000         // in memory
	settleBatch    = 256             // in one pipeline
	settleTimeout  = time.Second     // of one pipeline; nobody waits for it
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

// recentlySettled are those that Redis has taken within the last seconds, for the writer. A Redis that fails may lose
// what it has confirmed: appendfsync everysec loses a second, and the replica that takes over lacks what had not reached
// it. They are sent once more after a connection has ended, which charges nothing twice. No command need fail for that: an
// idle connection that the server has closed is replaced in silence.
type recentlySettled struct {
	ended   uint32 // connections, when they were last sent
	batches []settledBatch
	count   int
}

type settledBatch struct {
	at    time.Time
	batch []settlement
}

const (
	resendWindow = 10 * time.Second
	maxResent    = 20_000
	resendAge    = time.Hour // less than Redis remembers what it has settled, even through a long outage
)

func (r *recentlySettled) add(batch []settlement, now time.Time) {
	r.batches = append(r.batches, settledBatch{now, batch})
	r.count += len(batch)
	for r.count > maxResent || now.Sub(r.batches[0].at) > resendWindow {
		r.count -= len(r.batches[0].batch)
		r.batches = r.batches[1:]
	}
}

// Settle leaves the event to the writer. The account of this instance is charged at once, in case it has to decide.
func (s *redisStore) Settle(e Event) {
	if e.Time.IsZero() {
		e.Time = s.now()
	}
	e.Time, e.Cost = e.Time.UTC(), max(e.Cost, 0)
	if _, err := encodeEvent(&e); err != nil {
		s.logger.Error("event that cannot be entered", zap.String("request_id", e.RequestID), zap.Error(err))
		return
	}
	account := s.accounts.of(e.KeyID)
	account.mu.Lock()
	account.reserved.release(e.RequestID)
	account.balance.charge(e.Cost, e.Time)
	account.mu.Unlock()
	s.queue.add(settlement{Kind: settleEvent, Event: e})
}

// write is the writer: it enters settlements into Redis, and into the journal where Redis does not take them.
func (s *redisStore) write() {
	defer close(s.written)
	retry := time.NewTimer(0) // what the journal has from before
	defer retry.Stop()
	for {
		select {
		case <-s.queue.wake:
		case <-retry.C:
		case <-s.stop:
			s.writeLast()
			return
		}
		s.writing.Store(true)
		for s.writeSome() && !s.stopped() {
		}
		s.writing.Store(false)
		retry.Reset(settleRetry)
	}
}

func (s *redisStore) stopped() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// writeLast settles what it can within a bound, and leaves the rest to the journal and the next start.
func (s *redisStore) writeLast() {
	for end := time.Now().Add(destructTime); s.writeSome() && time.Now().Before(end); {
	}
	for batch := s.queue.take(); len(batch) > 0; batch = s.queue.take() {
		if err := s.journal.append(batch); err != nil {
			s.logger.Error("settlements lost: the journal cannot be written", zap.Int("settlements", len(batch)), zap.Error(err))
		}
	}
}

// writeSome deals with one batch, and reports whether it is worth going on. What is in the journal goes first.
func (s *redisStore) writeSome() (more bool) {
	s.reportLost()
	if !s.degraded() && !s.resend() {
		return false
	}
	batch := s.queue.take()
	if len(batch) > 0 && !s.degraded() && s.journal.count() == 0 {
		batch = s.send(batch)
		if len(batch) == 0 {
			return true
		}
	}
	if len(batch) > 0 && !s.keepInJournal(batch) {
		return false
	}
	if s.degraded() {
		return len(batch) > 0
	}
	return s.replay() || len(batch) > 0
}

func (s *redisStore) reportLost() {
	if n := s.queue.lost.Swap(0); n > 0 {
		s.logger.Error("settlements lost, and not charged: neither Redis nor the journal takes them", zap.Int64("settlements", n))
	}
}

// resend sends once more what a Redis that may have failed since may have lost. It reports whether that went through.
func (s *redisStore) resend() bool {
	ended := s.endedConnections()
	if ended == s.settled.ended {
		return true
	}
	for _, recent := range s.settled.batches {
		if time.Since(recent.at) > resendAge {
			continue // it is safe by now, and Redis may soon forget that it has it
		}
		for batch := range slices.Chunk(recent.batch, settleBatch) {
			if left := s.enter(batch); len(left) > 0 {
				return false
			}
		}
	}
	s.settled.ended = ended
	return true
}

// endedConnections counts those that have ended, for whatever reason.
func (s *redisStore) endedConnections() uint32 {
	stats := s.client.PoolStats()
	ended := stats.StaleConns
	if pipelines := stats.PipelineStats; pipelines != nil {
		ended += pipelines.StaleConns
	}
	return ended
}

// keepInJournal writes a batch to the journal, or has it wait in memory.
func (s *redisStore) keepInJournal(batch []settlement) bool {
	err := s.journal.append(batch)
	s.journalTrouble.note(s.logger, err)
	if err != nil {
		s.queue.putBack(batch)
	}
	return err == nil
}

// replay enters the journal's oldest batch, and reports whether all of it went through.
func (s *redisStore) replay() bool {
	entries, err := s.journal.oldest(settleBatch)
	if err != nil {
		s.journalTrouble.note(s.logger, err)
		return false
	}
	if len(entries) == 0 {
		return false
	}
	batch := make([]settlement, len(entries))
	for i, e := range entries {
		batch[i] = e.settlement
	}
	left := s.send(batch)
	if len(left) > 0 {
		return false // all of it once more: what was entered is not entered twice
	}
	err = s.journal.remove(entries)
	s.journalTrouble.note(s.logger, err)
	return err == nil
}

// send enters a batch, remembers what went through, and returns the rest.
func (s *redisStore) send(batch []settlement) (left []settlement) {
	left = s.enter(batch)
	if len(left) == 0 {
		s.settled.add(batch, time.Now())
		return nil
	}
	entered := slices.DeleteFunc(slices.Clone(batch), func(one settlement) bool {
		return slices.ContainsFunc(left, func(other settlement) bool { return other.Event.RequestID == one.Event.RequestID })
	})
	if len(entered) > 0 {
		s.settled.add(entered, time.Now())
	}
	return left
}

// enter enters a batch with one pipeline, and returns what did not go through. What Redis can never take is set aside.
func (s *redisStore) enter(batch []settlement) (left []settlement) {
	ctx, cancel := context.WithTimeout(context.Background(), max(settleTimeout, s.timeout))
	defer cancel()
	commands := s.pipeline(ctx, batch, s.settles.queue)
	var unknown []settlement
	for i, command := range commands {
		err := command.Err()
		switch {
		case mayBeDigest(err) && !s.settles.noDigest.Load():
			unknown = append(unknown, batch[i])
		case !s.entered(batch[i], err):
			left = append(left, batch[i])
		}
	}
	if len(unknown) > 0 {
		left = append(left, s.enterWhole(ctx, unknown, commands)...)
	}
	return left
}

// enterWhole is for a Redis that did not know the script.
func (s *redisStore) enterWhole(ctx context.Context, batch []settlement, before []*redis.Cmd) (left []settlement) {
	commands := s.pipeline(ctx, batch, func(ctx context.Context, pipe redis.Pipeliner, keys []string, args ...any) *redis.Cmd {
		return s.settles.script.Eval(ctx, pipe, keys, args...)
	})
	s.settles.learn(s, before[0].Err(), commands[0].Err())
	for i, command := range commands {
		if !s.entered(batch[i], command.Err()) {
			left = append(left, batch[i])
		}
	}
	return left
}

type queueScript func(ctx context.Context, pipe redis.Pipeliner, keys []string, args ...any) *redis.Cmd

func (s *redisStore) pipeline(ctx context.Context, batch []settlement, queue queueScript) []*redis.Cmd {
	pipe := s.client.Pipeline()
	commands := make([]*redis.Cmd, len(batch))
	for i := range batch {
		commands[i] = queue(ctx, pipe, s.settleKeys(&batch[i].Event), s.settleArgs(&batch[i])...)
	}
	pipe.Exec(ctx) //nolint:errcheck // each command has its own
	return commands
}

// entered reports whether there is nothing more to do about a settlement that was sent.
func (s *redisStore) entered(one settlement, err error) bool {
	s.breaker.note(one.Event.KeyID, err)
	if err == nil || !isScriptFault(err) {
		return err == nil
	}
	s.logger.Error("event that cannot be entered: Redis has something else in its place; it is kept in the journal",
		zap.String("request_id", one.Event.RequestID), zap.String("key_id", one.Event.KeyID), zap.Error(err))
	if err := s.journal.setAside(one); err != nil {
		s.logger.Error("event lost", zap.String("request_id", one.Event.RequestID), zap.Error(err))
	}
	return true
}

// settleKeys names what the script changes. What is kept for a day goes by the day on which the request began, so that
// an estimate and what replaces it go to the same place.
func (s *redisStore) settleKeys(e *Event) []string {
	day := dayOfRequest(e.RequestID)
	keys := []string{
		s.key(e.KeyID, "account"),
		s.key(e.KeyID, "pending"),
		s.key(e.KeyID, "done:"+day),
		s.key(e.KeyID, "lost"),
		s.key(e.KeyID, "ledger"),
		s.key(e.KeyID, "usage:"+day),
	}
	if e.SessionID != "" {
		keys = append(keys, s.key(e.KeyID, "session:"+e.SessionID))
	}
	return keys
}

func (s *redisStore) settleArgs(one *settlement) []any {
	e := &one.Event
	entry, _ := json.Marshal(e) // it has been encoded before
	return []any{
		e.RequestID, one.Kind, entry, s.maxEvents, int64(e.Cost), e.Model,
		e.PromptTokens, e.CachedTokens, e.CompletionTokens, e.Outcome.failed(),
	}
}

// failed reports whether the request failed through no wish of its client.
func (o Outcome) failed() bool { return o != OutcomeCompleted && o != OutcomeClientGone }
