package mesh

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestUnwritableJournalKeepsServing(t *testing.T) {
	dir := t.TempDir()
	path, missing := filepath.Join(dir, "mesh.db"), filepath.Join(dir, "missing")
	logs, logged := observer.New(zap.InfoLevel)
	if err := os.Mkdir(missing, 0o700); err != nil {
		t.Fatal(err)
	}
	s := openLocal(t, path, func(s *localStore) {
		s.logger = zap.New(logs)
		s.journals.prefix = filepath.Join(missing, "journal-")
	})
	if err := os.Remove(missing); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		settle(s, "key", i, 1)
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
	}
	if n := logged.FilterMessageSnippet("journal cannot be written").Len(); n != 1 {
		t.Errorf("logged %d times, want once", n)
	}
	if err := os.Mkdir(missing, 0o700); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the journal is written again", func() bool {
		admit(t, s, "key", Limits{})
		return logged.FilterMessage("recovered").Len() == 1
	})
	if ids, sum := ledger(t, s); len(ids) != 3 || sum != 3 {
		t.Errorf("entries %v for %d", ids, sum)
	}
}

func TestJournalThatFailedForAWhileCatchesUp(t *testing.T) {
	dir := t.TempDir()
	prefix := filepath.Join(dir, "missing", "journal-")
	g := newGeneration(1, journalFiles{prefix: prefix})
	s := newLocalStore(filepath.Join(dir, "mesh.db"), 10)
	s.logger = zap.NewNop()
	var err error
	if s.database, err = openDatabase(s.path); err != nil {
		t.Fatal(err)
	}
	defer s.database.bolt.Close()
	settle(s, "key", 1, 1)
	if s.record(g); !g.behind {
		t.Fatal("the journal was written where no directory is")
	}
	if err := os.Mkdir(filepath.Dir(prefix), 0o700); err != nil {
		t.Fatal(err)
	}
	settle(s, "other", 2, 1)
	if s.record(g); g.behind {
		t.Fatal("the journal is still behind")
	}
	replayed := newGeneration(1, journalFiles{prefix: prefix})
	if left, err := replayed.journals[0].replay(replayed); err != nil || left != 0 {
		t.Fatal(left, err)
	}
	if len(replayed.events) != 2 || len(replayed.accounts) != 2 {
		t.Errorf("replayed %d events and %d accounts, want 2 and 2", len(replayed.events), len(replayed.accounts))
	}
}

func TestUnwritableDatabaseKeepsServingWithinBounds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	logs, logged := observer.New(zap.ErrorLevel)
	s := openLocal(t, path, func(s *localStore) {
		s.logger = zap.New(logs)
		s.maxUnsaved = 5
	})
	if err := s.database.bolt.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		settle(s, "key", i, 1)
		settle(s, "key", i, 1)
	}
	if got := s.spend("key"); got != 8 {
		t.Errorf("spend is %d, want 8", got)
	}
	eventually(t, "the failed commit is logged", func() bool {
		return logged.FilterMessageSnippet("database cannot be written").Len() == 1
	})
	if err := s.Destruct(); err == nil {
		t.Error("Destruct says that it committed everything")
	}
	if lost := logged.FilterMessageSnippet("ledger entries lost").All(); len(lost) != 1 || lost[0].ContextMap()["entries"] != int64(3) {
		t.Errorf("lost entries logged: %v", lost)
	}

	s = openLocal(t, path)
	if ids, _ := ledger(t, s); len(ids) != 5 || s.spend("key") != 8 {
		t.Errorf("after reopening: entries %v, spend %d; want 5 entries and 8", ids, s.spend("key"))
	}
}

func TestRoomForUnsavedEventsComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	small := func(s *localStore) { s.maxUnsaved = 5 }
	s := openLocal(t, path, small)
	for i := range 40 {
		if i == 20 { // what was settled before a restart is looked up in the ledger
			closeLocal(t, s)
			s = openLocal(t, path, small)
		}
		settle(s, "key", i%20, 1)
		if i%5 == 4 {
			s.flush()
		}
	}
	for i := range 5 {
		settle(s, "key", 20+i, 1)
	}
	if ids, _ := ledger(t, s); len(ids) != 25 || s.spend("key") != 25 {
		t.Errorf("%d entries, spend %d; want 25 and 25", len(ids), s.spend("key"))
	}
}

func TestGenerationAbsorbsTheOneAfterIt(t *testing.T) {
	files := journalFiles{prefix: filepath.Join(t.TempDir(), "journal-")}
	g, next := newGeneration(1, files), newGeneration(2, files)
	g.accounts["a"], g.accounts["b"], g.events["1"] = []byte("old"), []byte("old"), []byte("1")
	next.accounts["b"], next.events["2"] = []byte("new"), []byte("2")
	next.waiting = []chan error{nil}
	g.absorb(next)
	if g.number != 2 || len(g.events) != 2 || len(g.journals) != 2 || len(g.waiting) != 1 {
		t.Errorf("got %+v", g)
	}
	if string(g.accounts["a"]) != "old" || string(g.accounts["b"]) != "new" {
		t.Errorf("balances %q and %q", g.accounts["a"], g.accounts["b"])
	}
}

func TestGenerationsThatCouldNotBeCommittedAreReplayedInOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	logs, logged := observer.New(zap.ErrorLevel)
	s := openLocal(t, path, func(s *localStore) { s.logger = zap.New(logs) })
	if err := s.database.bolt.Close(); err != nil {
		t.Fatal(err)
	}
	settle(s, "key", 1, 1)
	eventually(t, "the first commit fails", func() bool {
		return logged.FilterMessageSnippet("database cannot be written").Len() > 0
	})
	settle(s, "key", 2, 10)
	settle(s, "other", 3, 100)
	eventually(t, "there are two journals", func() bool { return len(journals(t, s)) == 2 })
	if err := s.Destruct(); err == nil {
		t.Error("Destruct says that it committed everything")
	}
	if n := logged.FilterMessageSnippet("database cannot be written").Len(); n != 1 {
		t.Errorf("the failing commits were logged %d times, want once", n)
	}

	s = openLocal(t, path)
	if ids, sum := ledger(t, s); len(ids) != 3 || sum != 111 || s.spend("key") != 11 || s.spend("other") != 100 {
		t.Errorf("entries %v for %d, spend %d and %d", ids, sum, s.spend("key"), s.spend("other"))
	}
	if left := journals(t, s); len(left) != 0 {
		t.Errorf("%d journals are left", len(left))
	}
}

func TestCrashBetweenCommitAndRemovalOfTheJournalChargesNothingTwice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path)
	admit(t, s, "key", Limits{})
	settle(s, "key", 1, 7)
	awaitJournal(t, s)
	before := copyStore(t, path)
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	settle(s, "key", 2, 5)
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	after := copyStore(t, path)
	for _, stale := range (journalFiles{prefix: before + ".journal-"}).mustFind(t) {
		content, err := os.ReadFile(stale.path)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(filepath.Dir(after), filepath.Base(stale.path))
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{before, after, after} { // the first replays it, the others have it already
		crashed := openLocal(t, path)
		if left := journals(t, crashed); len(left) != 0 {
			t.Errorf("%d journals are left", len(left))
		}
		settle(crashed, "key", 1, 7)
		settle(crashed, "key", 2, 5)
		if ids, sum := ledger(t, crashed); len(ids) != 2 || sum != 12 || crashed.spend("key") != 12 {
			t.Errorf("entries %v for %d, spend %d", ids, sum, crashed.spend("key"))
		}
		if used := admit(t, crashed, "key", Limits{}).Day.Used; used < 2 {
			t.Errorf("day has %d requests", used)
		}
		closeLocal(t, crashed)
	}
}

func TestCostOfARepeatedEventIsNeverSaved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path)
	settle(s, "key", 1, 7)
	closeLocal(t, s)

	s = openLocal(t, path)
	settle(s, "key", 1, 7)
	settle(s, "key", 2, 5)
	awaitJournal(t, s)

	crashed := openLocal(t, copyStore(t, path))
	if ids, sum := ledger(t, crashed); crashed.spend("key") != sum {
		t.Fatalf("spend is %d, and the entries %v sum up to %d", crashed.spend("key"), ids, sum)
	}
}

func (f journalFiles) mustFind(t testing.TB) []*journal {
	t.Helper()
	found, err := f.find()
	if err != nil || len(found) == 0 {
		t.Fatal("no journals", err)
	}
	return found
}

// awaitJournal returns when there is a journal with something in it.
func awaitJournal(t testing.TB, s *localStore) {
	t.Helper()
	eventually(t, "the journal is written", func() bool {
		for _, j := range journals(t, s) {
			if stat, err := os.Stat(j.path); err == nil && stat.Size() > 0 {
				return true
			}
		}
		return false
	})
}

func journals(t testing.TB, s *localStore) []*journal {
	t.Helper()
	found, err := s.journals.find()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// copyStore copies a database and its journals as they are now, as a crash would leave them.
func copyStore(t testing.TB, from string) (to string) {
	t.Helper()
	dir := t.TempDir()
	// A commit between two copies would leave neither the state before it nor the one after it, so that the journals
	// are copied first: the database then has at least what they lack.
	files, err := filepath.Glob(from + ".journal-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, from) {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(file)), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, filepath.Base(from))
}
