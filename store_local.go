package mesh

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.etcd.io/bbolt"
	"go.uber.org/zap"
)

func init() { caddy.RegisterModule(LocalStore{}) }

// LocalStore keeps counters, spend and the ledger in a database file on this machine, for a gateway that runs as one
// instance. A process that is killed loses at most the last 50 ms of them, a machine that loses power at most the last
// second, and neither damages the file. While the gateway runs, files named like the database with `.journal-` and a
// number behind it stand beside it; they belong to it.
type LocalStore struct {
	// The database file. It is created if there is none, and so are the directories above it. It must be on a local
	// disk, and no other process may have it open. Placeholders are replaced when the configuration is loaded.
	// Default: `mesh/mesh.db` in Caddy's data directory.
	Path string `json:"path,omitempty"`

	// How many entries the ledger keeps. The oldest are deleted first; spend is not affected by that. An entry takes
	// about half a kilobyte on disk. Of several stores with one file, and on a reload, that of the first to open it
	// holds. Default: 1000000.
	MaxEvents int64 `json:"max_events,omitempty"`

	path      string
	maxEvents int
}

const defaultMaxEvents = 1_000_000

// CaddyModule returns the Caddy module information.
func (LocalStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "mesh.stores.local",
		New: func() caddy.Module { return new(LocalStore) },
	}
}

// Provision works out where the database is. It leaves it closed.
func (l *LocalStore) Provision(caddy.Context) error {
	if l.MaxEvents < 0 {
		return fmt.Errorf("max_events is %d, but cannot be negative", l.MaxEvents)
	}
	l.maxEvents = int(l.MaxEvents)
	if l.maxEvents == 0 {
		l.maxEvents = defaultMaxEvents
	}
	path := l.Path
	if path == "" {
		path = filepath.Join(caddy.AppDataDir(), "mesh", "mesh.db")
	}
	path, err := caddy.NewReplacer().ReplaceOrErr(path, true, true)
	if err != nil {
		return fmt.Errorf("path of the local store: %w", err)
	}
	if l.path, err = filepath.Abs(path); err != nil {
		return fmt.Errorf("path of the local store: %w", err)
	}
	return nil
}

// StoreKey identifies the database file.
func (l *LocalStore) StoreKey() string { return "local:" + l.path }

// OpenStore opens the database file, or creates it. Its errors name the file; a file that is damaged, of a newer
// format, or of another application is left as it is.
func (l *LocalStore) OpenStore() (Store, error) {
	s := newLocalStore(l.path, l.maxEvents)
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("opening local store %s: %w", l.path, err)
	}
	return s, nil
}

// localStore has the truth in memory. A request changes an account and goes on. Behind it a writer appends what is new
// to a journal, every few milliseconds, and a committer enters it into the database, about twice a second; they are
// two goroutines because a commit waits for the disk.
type localStore struct {
	path       string
	journals   journalFiles
	maxEvents  int
	maxUnsaved int64
	now        func() time.Time
	logger     *zap.Logger
	database   *database

	keys      localKeys
	accounts  sync.Map // key id → *account
	recent    recentIDs
	templates localTemplates
	jobs      localJobs
	unsaved   atomic.Int64 // events that are in memory and not in the database
	lost      atomic.Int64 // events that were charged but not entered, because there were too many unsaved

	dirtyMu sync.Mutex
	dirty   []*account // accounts with something new, for the writer

	wake     chan struct{}    // there are dirty accounts
	flushes  chan chan error  // ask for a commit
	commits  chan *generation // from the writer to the committer
	stop     chan struct{}
	done     chan struct{} // the committer has ended, and the writer before it
	closeErr error         // of the last commit; for after done

	journalTrouble, lookupTrouble, commitTrouble trouble

	lostReported time.Time
}

const (
	journalDelay = 10 * time.Millisecond  // from the first change to the journal that has it
	commitDelay  = 500 * time.Millisecond // from the first change to the commit that has it
	commitRetry  = time.Second
	flushTimeout = 5 * time.Second
	maxUnsaved   = 100_000 // events
)

func newLocalStore(path string, maxEvents int) *localStore {
	return &localStore{
		path:       path,
		journals:   journalFiles{prefix: path + ".journal-"},
		maxEvents:  maxEvents,
		maxUnsaved: maxUnsaved,
		now:        time.Now,
		logger:     caddy.Log().Named("mesh.store.local"),

		journalTrouble: trouble{message: "the journal cannot be written; a crash now loses up to a second"},
		lookupTrouble:  trouble{message: "the ledger cannot be read; an event settled twice may be charged twice"},
		commitTrouble:  trouble{message: "the database cannot be written; serving from memory"},

		wake:    make(chan struct{}, 1),
		flushes: make(chan chan error),
		commits: make(chan *generation),
		stop:    make(chan struct{}),
		done:    make(chan struct{}),
	}
}

// open reads the database and what journals a crash has left beside it into memory.
func (s *localStore) open() (err error) {
	if s.database, err = openDatabase(s.path); err != nil {
		return err
	}
	s.journals.database = s.database.id
	last, err := s.replayJournals()
	if err == nil {
		err = s.database.balances(func(keyID string, b balance) {
			s.accounts.Store(keyID, &account{keyID: keyID, balance: b})
		})
	}
	if err == nil {
		err = errors.Join(s.keys.load(s.database), s.loadTemplates(), s.loadJobs())
	}
	if err != nil {
		return errors.Join(err, s.database.bolt.Close())
	}
	s.logger.Info("store opened", zap.String("path", s.path))
	go s.keepJournal(last + 1)
	go s.keepDatabase()
	return nil
}

// Admit decides in memory.
func (s *localStore) Admit(_ context.Context, a Admission) (Verdict, error) {
	if !storable(a.KeyID) {
		return Verdict{}, errUnusableID
	}
	account, now := s.account(a.KeyID), s.now()
	account.mu.Lock()
	verdict := account.admit(now, a)
	news := verdict.Refused == "" && account.change()
	account.mu.Unlock()
	if news {
		s.tellWriter(account)
	}
	return verdict, nil
}

// Settle charges at once, so that the next Admit sees it, and leaves the entry to the writer. It encodes the entry
// itself, so that the one writer keeps up with any number of callers.
//
// An event that was settled before is recognized at two places. Here, if its id is in memory, as those of all unsaved
// and of the last 65,536 saved events are. If it is older, or from before a restart, it is charged a second time for
// some milliseconds, until the writer looks it up in the ledger and takes that back, before it reaches the disk.
func (s *localStore) Settle(e Event) {
	encoded, err := e.finish(s.now)
	if err != nil {
		s.logger.Error("event that cannot be entered", zap.String("request_id", e.RequestID), zap.Error(err))
		return
	}
	if !s.recent.add(e.RequestID) {
		return
	}
	used := usedBy(&e)
	hasRoom := s.unsaved.Add(1) <= s.maxUnsaved
	account := s.account(e.KeyID)
	account.mu.Lock()
	charged, _ := account.settle(&e)
	if hasRoom {
		account.settled = append(account.settled, settledEvent{e.RequestID, encoded, charged, used})
	}
	news := account.change()
	account.mu.Unlock()

	if !hasRoom {
		s.lose(e.RequestID)
	}
	if news {
		s.tellWriter(account)
	}
}

// Leave gives back a place that was kept.
func (s *localStore) Leave(keyID, requestID string) { s.account(keyID).leave(requestID) }

// lose gives up an event's entry in the ledger. Its cost has been charged.
func (s *localStore) lose(requestID string) {
	s.unsaved.Add(-1)
	s.lost.Add(1)
	s.recent.release(requestID)
}

var errUnusableID = errors.New("an id is empty or too long")

// storable reports whether the database can have id as a key.
func storable(id string) bool { return id != "" && len(id) <= bbolt.MaxKeySize }

func (s *localStore) account(keyID string) *account {
	if found, ok := s.accounts.Load(keyID); ok {
		return found.(*account)
	}
	found, _ := s.accounts.LoadOrStore(keyID, &account{keyID: keyID})
	return found.(*account)
}

func (s *localStore) tellWriter(a *account) {
	s.dirtyMu.Lock()
	s.dirty = append(s.dirty, a)
	s.dirtyMu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default: // it has been woken already
	}
}

func (s *localStore) status() storeStatus { return storeStatus{Store: "local " + s.path} }

// spend returns what a key has ever spent.
func (s *localStore) spend(keyID string) Money {
	account := s.account(keyID)
	account.mu.Lock()
	defer account.mu.Unlock()
	return account.balance.Total
}

// events calls fn for the ledger's entries, the newest first, until it returns false. Everything that was settled
// before the call is among them.
func (s *localStore) events(fn func(Event) bool) error {
	const limit = 500
	if err := s.flush(); err != nil {
		return err
	}
	for before := ""; ; {
		page, err := s.database.before(before, limit)
		if err != nil {
			return err
		}
		for _, e := range page {
			if !fn(e) {
				return nil
			}
			before = e.RequestID
		}
		if len(page) < limit {
			return nil
		}
	}
}

// flush waits until everything there is now has been committed.
func (s *localStore) flush() error {
	committed := make(chan error, 1)
	select {
	case s.flushes <- committed:
	case <-s.done:
		return errors.New("the store is closed")
	}
	select {
	case err := <-committed:
		return err
	case <-time.After(flushTimeout):
		return errors.New("the database cannot be written at the moment")
	}
}

// Destruct commits everything and closes the database. No journal is left, unless the commit fails.
func (s *localStore) Destruct() error {
	close(s.stop)
	<-s.done
	return errors.Join(s.closeErr, s.database.bolt.Close())
}

// Interface guards
var (
	_ caddy.Module      = (*LocalStore)(nil)
	_ caddy.Provisioner = (*LocalStore)(nil)
	_ StoreModule       = (*LocalStore)(nil)
	_ Store             = (*localStore)(nil)
)
