package mesh

import (
	"slices"
	"time"

	"go.uber.org/zap"
)

// redisWriter is what the writer knows of those settlements that did not go through. They are in the journal. Where only a
// part of Redis cannot be reached, as one of a Cluster's nodes, they are those of some keys, which are held: of each key
// the order is kept, and no key waits for another.
type redisWriter struct {
	held   map[string]journalPlace // keys, and the first entry of each that did not go through
	behind bool                    // the journal may have entries of keys that are not held
	paused time.Time               // until then nothing is sent, because nothing went through
	failed bool                    // something did not go through in this turn

	nextProbe  time.Time // when the held keys are tried again
	probePause time.Duration
}

const lastProbePause = 8 * time.Second

func (w *redisWriter) holds(one *settlement) bool {
	_, held := w.held[one.Event.KeyID]
	return held
}

func (w *redisWriter) hold(e journalEntry) {
	if w.held == nil {
		w.held = make(map[string]journalPlace)
	}
	if !w.holds(&e.settlement) {
		w.held[e.settlement.Event.KeyID] = e.place
	}
}

// write is the writer: it enters settlements into Redis, and into the journal where Redis does not take them.
func (s *redisStore) write() {
	defer close(s.written)
	s.writer.behind = s.journal.count() > 0
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
	s.keepUnsafe()
	for batch := s.queue.take(); len(batch) > 0; batch = s.queue.take() {
		if err := s.journal.append(batch); err != nil {
			s.logger.Error("settlements lost: the journal cannot be written", zap.Int("settlements", len(batch)), zap.Error(err))
		}
	}
}

// writeSome deals with one batch, and reports whether it is worth going on. It waits in vain for Redis once at most, and
// writes what has come by then to the journal.
func (s *redisStore) writeSome() (more bool) {
	s.reportLost()
	s.writer.failed = false
	if s.sends() {
		s.resend()
	}
	batch := s.queue.take()
	if left := s.sendInTurn(batch); len(left) > 0 && !s.keep(left) {
		return false
	}
	if s.sends() && s.replay() {
		return true
	}
	return len(batch) > 0
}

func (s *redisStore) reportLost() {
	if n := s.queue.lost.Swap(0); n > 0 {
		s.logger.Error("settlements lost, and not charged: neither Redis nor the journal takes them", zap.Int64("settlements", n))
	}
}

// sends reports whether it makes sense to send anything. Of a Cluster, what the breaker takes for all of it may be a
// part.
func (s *redisStore) sends() bool {
	return !s.writer.failed && !time.Now().Before(s.writer.paused) && (!s.degraded() || s.mode == modeCluster)
}

// sendInTurn sends those before which nothing waits in the journal, and returns what is to wait there.
func (s *redisStore) sendInTurn(batch []settlement) (left []settlement) {
	if s.writer.behind || !s.sends() {
		return batch
	}
	var free []settlement
	for i := range batch {
		if s.writer.holds(&batch[i]) {
			left = append(left, batch[i])
		} else {
			free = append(free, batch[i])
		}
	}
	return append(left, leftOf(free, s.send(free))...)
}

// send sends settlements, and returns the fate of each. It stops where some do not go through. Where none do, nothing is
// sent again for a while.
func (s *redisStore) send(all []settlement) (fates []fate) {
	for batch := range slices.Chunk(all, settleBatch) {
		if !s.sends() {
			fates = append(fates, make([]fate, len(batch))...)
			continue
		}
		these := s.sendBatch(batch)
		if !slices.ContainsFunc(these, func(f fate) bool { return f != notEntered }) {
			s.writer.paused = time.Now().Add(settleRetry)
		}
		fates = append(fates, these...)
	}
	return fates
}

// sendBatch sends a batch, remembers what went through, and marks the rest as sent.
func (s *redisStore) sendBatch(batch []settlement) []fate {
	fates := s.enter(batch)
	var taken []settlement
	for i, f := range fates {
		if f != notEntered && !batch[i].Keeps {
			s.accounts.settled(&batch[i].Event)
		}
		switch f {
		case entered:
			taken = append(taken, batch[i])
		case notEntered:
			batch[i].Sent, s.writer.failed = true, true
		}
	}
	if len(taken) > 0 {
		s.settled.add(taken, s.now())
	}
	return fates
}

// leftOf returns those settlements that did not go through.
func leftOf(all []settlement, fates []fate) (left []settlement) {
	for i, f := range fates {
		if f == notEntered {
			left = append(left, all[i])
		}
	}
	return left
}

// keep writes settlements to the journal. Where it cannot be written, they are sent, though it may not be their turn, and
// else wait in memory.
func (s *redisStore) keep(batch []settlement) bool {
	err := s.journal.append(batch)
	s.journalTrouble.note(s.logger, err)
	if err != nil {
		s.queue.putBack(leftOf(batch, s.send(batch)))
		return false
	}
	s.writer.behind = s.writer.behind || slices.ContainsFunc(batch, func(one settlement) bool { return !s.writer.holds(&one) })
	return true
}

// replay enters some of what is in the journal, the oldest of each key first, and reports whether it is worth going on
// at once.
func (s *redisStore) replay() (more bool) {
	w := &s.writer
	if s.journal.count() == 0 {
		w.held, w.behind = nil, false
		return false
	}
	if s.probe() || w.failed {
		return true
	}
	entries, end, err := s.journal.next(settleBatch, w.holds)
	if err != nil {
		s.journalTrouble.note(s.logger, err)
		return false
	}
	if len(entries) == 0 && end {
		w.behind = false
		if len(w.held) == 0 {
			s.journal.rewind() // what there is, another store has put there, or could not be removed
		}
		return false
	}
	s.enterEntries(entries, s.send)
	return !time.Now().Before(w.paused)
}

// probe tries one entry of each of some held keys. Where it goes through, the key is held no more.
func (s *redisStore) probe() (freed bool) {
	w := &s.writer
	if len(w.held) == 0 || time.Now().Before(w.nextProbe) {
		return false
	}
	tried := make(map[string]journalPlace)
	for keyID, place := range w.held {
		if tried[keyID] = place; len(tried) == settleBatch {
			break
		}
	}
	entries, err := s.journal.at(tried)
	if err != nil {
		s.journalTrouble.note(s.logger, err)
		return false
	}
	for keyID := range tried {
		delete(w.held, keyID)
	}
	if went := s.enterEntries(entries, s.sendBatch); went > 0 || len(entries) < len(tried) {
		w.probePause, w.behind = 0, true
		s.journal.rewind()
		return true
	}
	w.probePause = min(max(settleRetry, 2*w.probePause), lastProbePause)
	w.nextProbe = time.Now().Add(w.probePause)
	return false
}

// enterEntries enters entries of the journal, removes those that went through, which it counts, and holds the keys of the
// others.
func (s *redisStore) enterEntries(entries []journalEntry, send func([]settlement) []fate) (went int) {
	batch := make([]settlement, len(entries))
	for i, e := range entries {
		batch[i] = e.settlement
	}
	var gone []journalEntry
	for i, f := range send(batch) {
		if f == notEntered {
			s.writer.hold(entries[i])
		} else {
			gone = append(gone, entries[i])
		}
	}
	err := s.journal.remove(gone)
	s.journalTrouble.note(s.logger, err)
	return len(gone)
}
