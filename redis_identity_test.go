package mesh

import (
	"encoding/binary"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// stranded settles while Redis is away, closes the store, and leaves what it settled in the journal.
func stranded(t *testing.T, s *redisStore, n int, want map[string]Money) {
	t.Helper()
	settleMany(s, n, "key", want)
	eventually(t, "all is in the journal", func() bool { return s.journal.count() >= n })
	closeRedis(t, s)
}

func TestJournalFollowsItsRedisToAnotherAddress(t *testing.T) {
	server, _, module := startRelayed(t)
	s := openRedis(t, module)
	want := make(map[string]Money)
	settleMany(s, 10, "key", want)
	settledAll(t, s)
	server.kill()
	stranded(t, s, 500, want)

	moved := redisModule(t, server.address)
	moved.Journal = module.Journal
	s = openRedis(t, moved) // which Redis this is cannot be known yet
	if s.journal.count() != 0 || s.journal.others() < 500 {
		t.Fatalf("%d of its own, %d of others", s.journal.count(), s.journal.others())
	}
	settleMany(s, 500, "key", want)
	eventually(t, "these wait as well", func() bool { return s.journal.count() >= 500 })
	server.start()
	eventually(t, "both are entered", func() bool {
		return s.journal.count() == 0 && s.journal.others() == 0 && !s.degraded()
	})
	settledAll(t, s)
	expectBalance(t, s, "key", want)
	closeRedis(t, s)

	server.kill()
	s = openRedis(t, module)
	stranded(t, s, 20, want)
	server.start()
	s = openRedis(t, moved) // and now it is known from the start
	settledAll(t, s)
	expectBalance(t, s, "key", want)
}

func TestTwoRedisServersWithOneJournalDoNotMix(t *testing.T) {
	servers := []*redisServer{startRedis(t), startRedis(t)}
	var modules []*RedisStore
	var stores []*redisStore
	wants := []map[string]Money{make(map[string]Money), make(map[string]Money)}
	journal := filepath.Join(t.TempDir(), "journal.db")
	for i, server := range servers {
		modules = append(modules, redisModule(t, server.address))
		modules[i].Journal = journal
		stores = append(stores, openRedis(t, modules[i]))
		settleMany(stores[i], 10, "key", wants[i])
		settledAll(t, stores[i])
		server.kill()
	}
	for i, s := range stores {
		stranded(t, s, 300, wants[i])
	}
	servers[0].start()
	first := openRedis(t, modules[0])
	settledAll(t, first)
	expectBalance(t, first, "key", wants[0])
	if first.journal.others() < 300 {
		t.Errorf("%d wait for the other Redis", first.journal.others())
	}
	if err := first.identify(t.Context()); err != nil || first.journal.count() != 0 {
		t.Errorf("took what is not its own: %d, %v", first.journal.count(), err)
	}
	servers[1].start()
	second := openRedis(t, modules[1])
	settledAll(t, second)
	expectBalance(t, second, "key", wants[1])
}

func TestRedisThatLostItsDataGetsWhatWaitsForIt(t *testing.T) {
	server := startRedis(t)
	logs, logged := observer.New(zap.WarnLevel)
	module := redisModule(t, server.address)
	s := openRedis(t, module)
	settledAll(t, s)
	before := s.client.HGet(t.Context(), "mesh:id", "id").Val()
	server.kill()
	want := make(map[string]Money)
	stranded(t, s, 100, want)
	server.loseAll()
	s = openRedis(t, module, func(s *redisStore) { s.logger = zap.New(logs) })
	settledAll(t, s)
	expectBalance(t, s, "key", want)
	if after := s.client.HGet(t.Context(), "mesh:id", "id").Val(); before == "" || after == "" || after == before {
		t.Errorf("its id was %q and is %q", before, after)
	}
	if logged.FilterMessageSnippet("has lost its data").Len() != 1 {
		t.Errorf("nobody is told: %v", logged.All())
	}
	// its new id is the one by which it is found elsewhere
	server.kill()
	stranded(t, s, 100, want)
	server.start()
	moved := redisModule(t, server.socket())
	moved.Journal = module.Journal
	s = openRedis(t, moved)
	settledAll(t, s)
	expectBalance(t, s, "key", want)
}

func TestStoresWithOneJournalAtTwoAddressesOfOneRedisEnterAllOnce(t *testing.T) {
	server := startRedis(t)
	journal := filepath.Join(t.TempDir(), "journal.db")
	want := make(map[string]Money)
	var stores []*redisStore
	for _, address := range []string{server.address, server.socket()} {
		module := redisModule(t, address)
		module.Journal = journal
		stores = append(stores, openRedis(t, module))
	}
	server.kill()
	for _, s := range stores {
		settleMany(s, 1500, "key", want)
		eventually(t, "these wait", func() bool { return s.journal.count() >= 1500 })
	}
	server.start()
	for _, s := range stores {
		eventually(t, "Redis is back", func() bool { return !s.degraded() })
		if err := s.identify(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for _, s := range stores {
		settledAll(t, s)
		if s.journal.others() != 0 || len(s.journal.all()) != 2 {
			t.Errorf("%d wait for another Redis, of %d buckets", s.journal.others(), len(s.journal.all()))
		}
	}
	expectBalance(t, stores[0], "key", want)
}

func TestDamagedEntryOfTheJournalDoesNotStopTheOthers(t *testing.T) {
	server := startRedis(t)
	logs, logged := observer.New(zap.ErrorLevel)
	module := redisModule(t, server.address)
	s := openRedis(t, module)
	server.kill()
	want := make(map[string]Money)
	stranded(t, s, 100, want)
	spoil(t, module.config, 50, `{"kind":"settle","event":{"request`)
	server.start()
	s = openRedis(t, module, func(s *redisStore) { s.logger = zap.New(logs) })
	settledAll(t, s)
	if b := readRedis(t, s, "key"); b.entries != 99 {
		t.Errorf("%d of the 99 others were entered", b.entries)
	}
	if lines := logged.FilterMessageSnippet("damaged entry").All(); len(lines) != 1 || s.journal.countAside() != 1 {
		t.Errorf("%d are set aside, and logged: %v", s.journal.countAside(), lines)
	}
}

// spoil overwrites an entry of a journal that is not open.
func spoil(t *testing.T, config redisConfig, entry uint64, with string) {
	t.Helper()
	j, err := openRedisJournal(config.journal, config.identity)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close() //nolint:errcheck // for reading only
	err = j.file.update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(config.identity)).Put(binary.BigEndian.AppendUint64(nil, entry), []byte(with))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEntryThatWasReadIsMarkedAsSentForGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	all := func(*settlement) bool { return false }
	for _, sent := range []bool{false, true} {
		j, err := openRedisJournal(path, "a")
		if err != nil {
			t.Fatal(err)
		}
		if !sent {
			if err := j.append([]settlement{{Kind: settleEvent, Event: Event{RequestID: newRequestID(), KeyID: "key"}}}); err != nil {
				t.Fatal(err)
			}
		}
		entries, end, err := j.next(10, all)
		if err != nil || len(entries) != 1 || !end || entries[0].settlement.Sent != sent {
			t.Errorf("%+v, %t, %v; want it sent before: %t", entries, end, err, sent)
		}
		if err := j.close(); err != nil {
			t.Error(err)
		}
	}
}
