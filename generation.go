package mesh

import (
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"
)

// generation is what one commit of the database brings. Until it is committed, a journal of the same number has it.
type generation struct {
	number   uint64
	accounts records               // by key id; the latest balance of each
	events   records               // by request id
	used     map[string]eventUsage // by request id; of those that do not come from a journal

	journals []*journal // its own, and those of earlier generations that it has absorbed
	behind   bool       // the journal lacks something, because it could not be written
	due      <-chan time.Time
	ready    bool         // to be committed, since due or because someone waits
	waiting  []chan error // told how the commit went
}

func newGeneration(number uint64, files journalFiles) *generation {
	return &generation{
		number:   number,
		accounts: make(records),
		events:   make(records),
		used:     make(map[string]eventUsage),
		journals: []*journal{files.journal(number)},
	}
}

func (g *generation) empty() bool { return len(g.accounts) == 0 && len(g.events) == 0 }

// absorb makes g the union of itself and the one after it.
func (g *generation) absorb(next *generation) {
	g.number = next.number
	maps.Copy(g.accounts, next.accounts)
	maps.Copy(g.events, next.events)
	maps.Copy(g.used, next.used)
	g.journals = append(g.journals, next.journals...)
	g.waiting = append(g.waiting, next.waiting...)
}

// replayJournals commits what the journals have and the database has not, removes them, and returns the number of the
// last generation. A journal that the database has wholly is one that a crash left between commit and removal.
func (s *localStore) replayJournals() (last uint64, err error) {
	journals, err := s.journals.find()
	if err != nil {
		return 0, err
	}
	g := &generation{
		number:   s.database.generation,
		accounts: make(records),
		events:   make(records),
		journals: journals,
	}
	for _, j := range journals {
		if j.number <= s.database.generation {
			continue
		}
		left, err := j.replay(g)
		if err != nil {
			return 0, fmt.Errorf("replaying a journal: %w", err)
		}
		s.logger.Info("replayed the journal of a process that did not end by itself",
			zap.String("journal", j.path), zap.Int("torn_bytes", left))
		g.number = j.number
	}
	if g.number > s.database.generation {
		if err := s.database.commit(g, s.maxEvents); err != nil {
			return 0, fmt.Errorf("replaying a journal: %w", err)
		}
	}
	s.removeJournals(g)
	return g.number, nil
}

// keepJournal is the writer: it gathers what is new into a generation, and hands that to the committer when it is due
// and the committer has time. It ends, and with it the committer, when the store stops.
func (s *localStore) keepJournal(number uint64) {
	defer close(s.commits)
	g := newGeneration(number, s.journals)
	for {
		var commits chan<- *generation
		if g.ready {
			commits = s.commits
		}
		select {
		case <-s.wake:
			time.Sleep(journalDelay)
			s.record(g)
		case committed := <-s.flushes:
			s.record(g)
			g.waiting = append(g.waiting, committed)
			g.ready = true
		case <-g.due:
			g.ready = true
		case commits <- g:
			number++
			g = newGeneration(number, s.journals)
		case <-s.stop:
			s.lostReported = time.Time{}
			s.record(g)
			s.commits <- g
			return
		}
	}
}

// record moves what is new from the accounts into g and its journal.
func (s *localStore) record(g *generation) {
	accounts, events := make(records), make(records)
	for _, a := range s.takeDirty() {
		balance, settled := a.take()
		for _, e := range s.firstTime(settled, a, &balance) {
			events[e.requestID] = e.encoded
			g.used[e.requestID] = e.used
		}
		accounts[a.keyID], _ = json.Marshal(balance) // it has nothing that JSON cannot say
	}
	s.reportLost()
	if len(accounts) == 0 && !g.behind {
		return
	}
	if g.empty() {
		g.due = time.After(commitDelay)
	}
	maps.Copy(g.accounts, accounts)
	maps.Copy(g.events, events)
	if g.behind {
		accounts, events = g.accounts, g.events
	}
	err := g.journals[0].append(accounts, events)
	g.behind = err != nil
	s.journalTrouble.note(s.logger, err)
}

func (s *localStore) takeDirty() []*account {
	s.dirtyMu.Lock()
	defer s.dirtyMu.Unlock()
	dirty := s.dirty
	s.dirty = nil
	return dirty
}

// firstTime returns the events that the ledger does not have yet. The others were charged before, so that this charge
// is taken back: from the account, and from the copy of its balance that is about to be saved.
func (s *localStore) firstTime(settled []settledEvent, a *account, saved *balance) []settledEvent {
	if len(settled) == 0 {
		return nil
	}
	entered, err := s.database.has(settled)
	s.lookupTrouble.note(s.logger, err)
	first := settled[:0]
	for i, e := range settled {
		if !entered[i] {
			first = append(first, e)
			continue
		}
		a.refund(e.charge)
		saved.refund(e.charge)
		s.unsaved.Add(-1)
		s.recent.release(e.requestID)
	}
	return first
}

// reportLost logs at most once a second.
func (s *localStore) reportLost() {
	if s.lost.Load() == 0 || time.Since(s.lostReported) < time.Second {
		return
	}
	s.lostReported = time.Now()
	s.logger.Error("ledger entries lost; their costs have been charged", zap.Int64("entries", s.lost.Swap(0)))
}

// keepDatabase is the committer. It stays with one generation until that is committed; the writer gathers on
// meanwhile. When the store stops, each is tried once more.
func (s *localStore) keepDatabase() {
	defer close(s.done)
	for g := range s.commits {
		err := s.commit(g)
		for err != nil && s.pause(commitRetry) {
			err = s.commit(g)
		}
		if err == nil {
			continue
		}
		for last := range s.commits {
			g.absorb(last)
			err = s.commit(g)
		}
		s.closeErr = err
	}
}

// pause reports whether the store still runs after d.
func (s *localStore) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-s.stop:
		return false
	}
}

func (s *localStore) commit(g *generation) (err error) {
	defer func() { g.tell(err) }()
	if g.empty() {
		return nil
	}
	err = s.database.commit(g, s.maxEvents)
	s.commitTrouble.note(s.logger, err)
	if err != nil {
		return fmt.Errorf("committing %d ledger entries: %w", len(g.events), err)
	}
	for id := range g.events {
		s.recent.release(id)
	}
	s.unsaved.Add(-int64(len(g.events)))
	s.removeJournals(g)
	return nil
}

// tell ends the wait of those who wait for the commit.
func (g *generation) tell(err error) {
	for _, committed := range g.waiting {
		committed <- err
	}
	g.waiting = nil
}

// removeJournals is for when everything in them is committed. One that stays is removed by the next start.
func (s *localStore) removeJournals(g *generation) {
	for _, j := range g.journals {
		if err := j.remove(); err != nil {
			s.logger.Warn("a journal that is no longer needed cannot be removed", zap.Error(err))
		}
	}
}

// trouble is something that can fail for a while. It is logged when it begins and when it ends.
type trouble struct {
	message string
	begun   bool
	since   time.Time
}

func (t *trouble) note(logger *zap.Logger, err error) {
	if err != nil && !t.begun {
		t.since = time.Now()
		logger.Error(t.message, zap.Error(err))
	}
	if err == nil && t.begun {
		logger.Info("recovered", zap.String("from", t.message), zap.Duration("after", time.Since(t.since)))
	}
	t.begun = err != nil
}
