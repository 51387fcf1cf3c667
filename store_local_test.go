package mesh

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// openLocal opens a store that the test closes, or that is closed at its end.
func openLocal(t testing.TB, path string, change ...func(*localStore)) *localStore {
	t.Helper()
	s := newLocalStore(path, defaultMaxEvents)
	s.logger = zap.NewNop()
	for _, f := range change {
		f(s)
	}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-s.done:
		default:
			closeLocal(t, s)
		}
	})
	return s
}

func closeLocal(t testing.TB, s *localStore) {
	t.Helper()
	if err := s.Destruct(); err != nil {
		t.Error(err)
	}
}

func clock(now time.Time) func(*localStore) {
	return func(s *localStore) { s.now = func() time.Time { return now } }
}

func admit(t testing.TB, s *localStore, keyID string, limits Limits) Verdict {
	t.Helper()
	v, err := s.Admit(t.Context(), Admission{KeyID: keyID, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func requestID(i int) string { return fmt.Sprintf("req_%026d", i) }

func settle(s *localStore, keyID string, i int, cost Money) {
	s.Settle(Event{RequestID: requestID(i), KeyID: keyID, Time: s.now(), Cost: cost, Outcome: OutcomeCompleted})
}

// ledger returns the ledger's request ids, newest first, and the sum of the costs.
func ledger(t testing.TB, s *localStore) (ids []string, sum Money) {
	t.Helper()
	err := s.events(func(e Event) bool {
		ids = append(ids, e.RequestID)
		sum += e.Cost
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids, sum
}

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	eventuallyIn(t, 20*time.Second, what, ok)
}

// eventuallyIn polls until ok, for longer than eventually does.
func eventuallyIn(t testing.TB, bound time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

// admitAtOnce sends 500 requests of one key with a limit of 60 a minute to some stores, all at once.
func admitAtOnce(t *testing.T, stores ...Store) {
	t.Helper()
	var admitted, refused atomic.Int64
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			a := Admission{KeyID: "key", RequestID: requestID(i), Limits: Limits{RPM: 60}}
			switch v, err := stores[i%len(stores)].Admit(t.Context(), a); {
			case err != nil:
				t.Error(err)
			case v.Refused == "":
				admitted.Add(1)
			case v.Refused == LimitRPM:
				refused.Add(1)
			}
		})
	}
	wg.Wait()
	if admitted.Load() != 60 || refused.Load() != 440 {
		t.Fatalf("admitted %d and refused %d, want 60 and 440", admitted.Load(), refused.Load())
	}
}

func TestConcurrentAdmitsNeverPassTheLimit(t *testing.T) {
	admitAtOnce(t, openLocal(t, filepath.Join(t.TempDir(), "mesh.db"), clock(at(t, "2026-11-24T10:00:00Z"))))
}

func TestSettlingTwiceChargesOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path)
	var wg sync.WaitGroup
	for i := range 400 {
		wg.Go(func() { settle(s, "key", i%10, 7) })
	}
	wg.Wait()
	check := func(when string) {
		t.Helper()
		if ids, sum := ledger(t, s); len(ids) != 10 || sum != 70 {
			t.Fatalf("%s: %d entries for %d, want 10 for 70", when, len(ids), sum)
		}
		if got := s.spend("key"); got != 70 {
			t.Fatalf("%s: spend is %d, want 70", when, got)
		}
	}
	check("before reopening")
	closeLocal(t, s)

	s = openLocal(t, path)
	settle(s, "key", 3, 7)
	check("settled again after reopening")
	closeLocal(t, s)

	s = openLocal(t, path)
	check("reopened once more")
}

func TestRestartKeepsWindowsAndSpend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	now := at(t, "2026-11-24T10:00:30Z")
	limits := Limits{RPM: 3, RPD: 100, SpendCap: 1000, SpendPeriod: PeriodMonth}
	s := openLocal(t, path, clock(now))
	for i := range 3 {
		admit(t, s, "key", limits)
		settle(s, "key", i, 100)
	}
	want := admit(t, s, "key", limits)
	closeLocal(t, s)

	s = openLocal(t, path, clock(now))
	got := admit(t, s, "key", limits)
	if got != want || got.Refused != LimitRPM || got.Day.Used != 3 || got.Spend != 300 {
		t.Fatalf("got  %+v\nwant %+v", got, want)
	}
}

func TestLedgerKeepsTheNewestEvents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	s := openLocal(t, path, func(s *localStore) { s.maxEvents = 10 })
	for i := range 25 {
		settle(s, "key", i, 1)
		if i%4 == 0 {
			s.flush()
		}
	}
	ids, _ := ledger(t, s)
	var want []string
	for i := 24; i > 14; i-- {
		want = append(want, requestID(i))
	}
	if !slices.Equal(ids, want) {
		t.Fatalf("got %v, want %v", ids, want)
	}
	if s.spend("key") != 25 {
		t.Errorf("spend is %d, want 25", s.spend("key"))
	}
	closeLocal(t, s)

	s = openLocal(t, path, func(s *localStore) { s.maxEvents = 3 })
	settle(s, "key", 25, 1)
	if ids, _ := ledger(t, s); len(ids) != 3 || ids[0] != requestID(25) {
		t.Errorf("after lowering the limit to 3: %v", ids)
	}
}

func TestLedgerIsReadInPagesNewestFirst(t *testing.T) {
	s := openLocal(t, filepath.Join(t.TempDir(), "mesh.db"))
	for i := range 1234 {
		settle(s, "key", i, 1)
	}
	ids, sum := ledger(t, s)
	if len(ids) != 1234 || sum != 1234 || ids[0] != requestID(1233) || ids[1233] != requestID(0) {
		t.Fatalf("%d entries for %d, from %s to %s", len(ids), sum, ids[0], ids[len(ids)-1])
	}
	read := 0
	err := s.events(func(Event) bool { read++; return read < 3 })
	if err != nil || read != 3 {
		t.Errorf("read %d entries, want 3 (%v)", read, err)
	}
}

func TestEventComesBackWhole(t *testing.T) {
	s := openLocal(t, filepath.Join(t.TempDir(), "mesh.db"))
	want := Event{
		RequestID: requestID(1), KeyID: "key", KeyName: "team-a", Owner: "acme", SessionID: "s",
		Time: at(t, "2026-11-24T10:00:00.123456789Z"), Duration: 5, TTFT: 3,
		Model: "openai/gpt-4o", Upstream: "openai", Stream: true, Attempts: 2, Status: 200, Outcome: OutcomeCut,
		PromptTokens: 9, CachedTokens: 4, CompletionTokens: 2, Estimated: true, Cost: 123_000_000_001,
		PromptAudioTokens: 3, CompletionAudioTokens: 1, Images: 2,
	}
	s.Settle(want)
	err := s.events(func(got Event) bool {
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEventsThatCannotBeKeptDoNotStopTheOthers(t *testing.T) {
	logs, logged := observer.New(zap.ErrorLevel)
	s := openLocal(t, filepath.Join(t.TempDir(), "mesh.db"), func(s *localStore) { s.logger = zap.New(logs) })
	s.Settle(Event{KeyID: "key", Cost: 1})
	s.Settle(Event{RequestID: "req_1", Cost: 1})
	s.Settle(Event{RequestID: strings.Repeat("x", 40_000), KeyID: "key", Cost: 1})
	s.Settle(Event{RequestID: "req_far", KeyID: "key", Time: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), Cost: 1})
	s.Settle(Event{RequestID: "req_negative", KeyID: "key", Cost: -1})
	s.Settle(Event{RequestID: "req_fine", KeyID: "key", Cost: 1})
	if _, err := s.Admit(t.Context(), Admission{}); err == nil {
		t.Error("admitted a request without a key")
	}
	if ids, _ := ledger(t, s); !slices.Equal(ids, []string{"req_negative", "req_fine"}) {
		t.Errorf("ledger: %v", ids)
	}
	if n := logged.FilterMessage("event that cannot be entered").Len(); n != 4 {
		t.Errorf("%d of 4 logged", n)
	}
	if got := s.spend("key"); got != 1 {
		t.Errorf("spend is %d, want 1", got)
	}
}

func TestDestructEndsAllGoroutinesAndLeavesOnlyTheDatabase(t *testing.T) {
	running := goleak.IgnoreCurrent()
	dir := t.TempDir()
	path := filepath.Join(dir, "deep", "er", "mesh.db")
	for i := range 3 {
		s := newLocalStore(path, 10)
		if err := s.open(); err != nil {
			t.Fatal(err)
		}
		admit(t, s, "key", Limits{})
		settle(s, "key", i, 1)
		closeLocal(t, s)
		if s.flush() == nil {
			t.Error("a closed store can be flushed")
		}
		files, err := os.ReadDir(filepath.Dir(path))
		if err != nil || len(files) != 1 {
			t.Fatalf("left behind: %v (%v)", files, err)
		}
	}
	goleak.VerifyNone(t, running)

	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700 | os.ModeDir} {
		if stat, err := os.Stat(name); err != nil || stat.Mode() != want {
			t.Errorf("%s: %v, want %v (%v)", name, stat.Mode(), want, err)
		}
	}
}

func TestProvisionOpensNothing(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("MESH_TEST_DIRECTORY", dir)
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()

	l := &LocalStore{Path: "{env.MESH_TEST_DIRECTORY}/a/../b/mesh.db"}
	if err := l.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if got, want := l.StoreKey(), "local:"+filepath.Join(dir, "b", "mesh.db"); got != want {
		t.Errorf("key %q, want %q", got, want)
	}
	if l.Path != "{env.MESH_TEST_DIRECTORY}/a/../b/mesh.db" {
		t.Errorf("the exported field became %q", l.Path)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("provisioning created %v", left)
	}
	s, err := l.OpenStore()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Provision(ctx); err != nil {
		t.Errorf("provisioning while the file is open: %v", err)
	}
	if err := s.Destruct(); err != nil {
		t.Error(err)
	}

	var standard LocalStore
	if err := standard.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	if want := "local:" + filepath.Join(caddy.AppDataDir(), "mesh", "mesh.db"); standard.StoreKey() != want {
		t.Errorf("default key %q, want %q", standard.StoreKey(), want)
	}
	for _, wrong := range []*LocalStore{{MaxEvents: -1}, {Path: "{env.MESH_TEST_NOT_THERE}"}, {Path: "{no.such}"}} {
		if err := wrong.Provision(ctx); err == nil {
			t.Errorf("%+v was accepted", wrong)
		}
	}
}

func BenchmarkLocalAdmit(b *testing.B) {
	s := openLocal(b, filepath.Join(b.TempDir(), "mesh.db"))
	a := Admission{KeyID: "key", Limits: Limits{RPM: 1 << 40, RPD: 1 << 40, SpendCap: usd, SpendPeriod: PeriodMonth}}
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.Admit(b.Context(), a)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				s.Admit(b.Context(), a)
			}
		})
	})
}

func BenchmarkLocalSettle(b *testing.B) {
	e := Event{KeyID: "key", Time: time.Now(), Model: "openai/gpt-4o", Outcome: OutcomeCompleted, Cost: 123}
	var next atomic.Int64
	run := func(name string, body func(b *testing.B, s *localStore)) {
		b.Run(name, func(b *testing.B) {
			s := openLocal(b, filepath.Join(b.TempDir(), "mesh.db"))
			b.ReportAllocs()
			body(b, s)
			b.ReportMetric(float64(s.lost.Load())/float64(b.N), "lost/op")
		})
	}
	run("one", func(b *testing.B, s *localStore) {
		for b.Loop() {
			e := e
			e.RequestID = requestID(int(next.Add(1)))
			s.Settle(e)
		}
	})
	run("parallel", func(b *testing.B, s *localStore) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				e := e
				e.RequestID = requestID(int(next.Add(1)))
				s.Settle(e)
			}
		})
	})
}
