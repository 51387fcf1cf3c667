package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// filledDatabase returns the content of a database with enough in it for branch pages and for free pages.
func filledDatabase(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path)
	for i := range 400 {
		settle(s, fmt.Sprintf("key-%d", i%100), i, 1)
		if i%200 == 0 {
			s.flush()
		}
	}
	closeLocal(t, s)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestWhatIsNoWholeDatabaseIsRefusedAndLeftAlone(t *testing.T) {
	whole := filledDatabase(t)
	pageSize := os.Getpagesize()
	foreign := func(options *bbolt.Options) []byte {
		path := filepath.Join(t.TempDir(), "other.db")
		db, err := bbolt.Open(path, 0o600, options)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("other"))
			return err
		})
		if err != nil || db.Close() != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	newer := func() []byte {
		path := filepath.Join(t.TempDir(), "mesh.db")
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error {
			return putNumber(tx.Bucket(bucketMesh), keyFormat, databaseFormat+1)
		})
		if err != nil || db.Close() != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	bothMetas := bytes.Clone(whole)
	bothMetas[40] ^= 1
	bothMetas[pageSize+40] ^= 1

	for _, tc := range []struct {
		name    string
		content []byte
		want    string
	}{
		{"empty", nil, "empty"},
		{"a byte", []byte("x"), "not a mesh database"},
		{"text", bytes.Repeat([]byte("a text file\n"), 1000), "not a mesh database"},
		{"SQLite", append([]byte("SQLite format 3\x00"), make([]byte, 8176)...), "not a mesh database"},
		{"zeros", make([]byte, 1<<16), "not a mesh database"},
		{"another application", foreign(nil), "another application"},
		{"another application without a free list", foreign(&bbolt.Options{NoFreelistSync: true}), "another application"},
		{"newer format", newer(), "format 2"},
		{"both first pages damaged", bothMetas, "not a mesh database"},
		{"one page", whole[:pageSize], "truncated"},
		{"two pages", whole[:2*pageSize], "truncated"},
		{"half", whole[:len(whole)/2], "truncated"},
	} {
		t.Run(tc.name, func(t *testing.T) { wantRefused(t, tc.content, tc.want) })
	}
}

func wantRefused(t *testing.T, content []byte, want string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := (&LocalStore{path: path, maxEvents: 10}).OpenStore()
	if err == nil {
		s.Destruct()
		t.Fatal("was opened")
	}
	if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
		t.Errorf("error %q does not say %q and the path", err, want)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, content) {
		t.Errorf("the file was changed (%v)", err)
	}
}

func TestCommittingTwiceCountsOnce(t *testing.T) {
	d, err := openDatabase(filepath.Join(t.TempDir(), "mesh.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.bolt.Close()
	g := newGeneration(1, journalFiles{})
	for i := range 4 {
		g.events[requestID(i)] = []byte(`{"key_id":"key"}`)
	}
	for range 3 {
		if err := d.commit(g, 5); err != nil {
			t.Fatal(err)
		}
	}
	if events, err := d.before("", 10); err != nil || len(events) != 4 {
		t.Errorf("%d entries, want 4 (%v)", len(events), err)
	}
}

func TestDamageToOneOfTheTwoFirstPagesIsSurvived(t *testing.T) {
	for _, page := range []int{0, 1} {
		content := filledDatabase(t)
		content[page*os.Getpagesize()+40] ^= 1
		path := filepath.Join(t.TempDir(), "mesh.db")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openLocal(t, path)
		settle(s, "key", 5000, 1)
		if ids, _ := ledger(t, s); len(ids) == 0 || ids[0] != requestID(5000) {
			t.Errorf("page %d: %d entries", page, len(ids))
		}
	}
}

func TestPathsWhereNoFileCanBe(t *testing.T) {
	dir := t.TempDir()
	file, closed := filepath.Join(dir, "file"), filepath.Join(dir, "closed")
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(closed, 0o500); err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{
		filepath.Join(file, "mesh.db"): "not a directory",
		dir:                            "not a regular file",
	}
	if os.Geteuid() != 0 { // root may do everything
		paths[filepath.Join(closed, "mesh.db")] = "permission denied"
		paths[filepath.Join(closed, "deeper", "mesh.db")] = "permission denied"
	}
	for path, want := range paths {
		_, err := (&LocalStore{path: path, maxEvents: 10}).OpenStore()
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func TestDatabaseThatWasCreatedAndNoMoreIsTaken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil || db.Close() != nil {
		t.Fatal(err)
	}
	s := openLocal(t, path)
	settle(s, "key", 1, 1)
	if ids, _ := ledger(t, s); len(ids) != 1 {
		t.Errorf("ledger has %v", ids)
	}
}

func TestLockedDatabaseIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path)
	settle(s, "key", 1, 1)
	_, err := (&LocalStore{path: path, maxEvents: 10}).OpenStore()
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "another process has it open") {
		t.Errorf("opening an open database: %v", err)
	}
	if ids, _ := ledger(t, s); len(ids) != 1 {
		t.Errorf("afterwards the ledger has %v", ids)
	}
}

// MESH_EVENTS=1000000 go test -run '^$' -bench OpenDatabase measures what is said at inspect.
func BenchmarkOpenDatabase(b *testing.B) {
	count := 10_000
	fmt.Sscan(os.Getenv("MESH_EVENTS"), &count)
	path := filepath.Join(b.TempDir(), "mesh.db")
	d, err := openDatabase(path)
	if err != nil {
		b.Fatal(err)
	}
	e := Event{
		KeyID: "0123456789abcdef0123456789abcdef", KeyName: "team-a", Owner: "acme", Time: time.Now().UTC(),
		Duration: time.Second, TTFT: time.Millisecond, Model: "openai/gpt-4o", Upstream: "openai", Stream: true,
		Attempts: 1, Status: 200, Outcome: OutcomeCompleted, PromptTokens: 1000, CompletionTokens: 500, Cost: 7_500_000,
	}
	g := newGeneration(0, journalFiles{})
	for i := range count {
		e.RequestID = requestID(i)
		g.events[e.RequestID], _ = json.Marshal(e)
		if len(g.events) == 10_000 || i == count-1 {
			g.number++
			if err := d.commit(g, count); err != nil {
				b.Fatal(err)
			}
			clear(g.events)
		}
	}
	if err := d.bolt.Close(); err != nil {
		b.Fatal(err)
	}
	stat, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		d, err := openDatabase(path)
		if err != nil {
			b.Fatal(err)
		}
		d.bolt.Close()
	}
	b.ReportMetric(float64(stat.Size())/float64(count), "file-B/event")
}
