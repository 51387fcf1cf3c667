package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"go.etcd.io/bbolt"
	"go.uber.org/zap"
)

// redisJournal holds, in a file, what is to be entered into one Redis, in order. Each write is synced.
//
// Stores for several Redis servers, and stores for one that differ in their options, as while a configuration is
// reloaded, share the file. What is written stands in a bucket that is named by the addresses in the configuration.
// Beside it stands the id of the Redis that was last found there, so that a store which finds the same Redis elsewhere
// adopts the bucket; nothing is entered where it does not belong. Two stores for one Redis may both enter what is there:
// Redis takes it once.
type redisJournal struct {
	file   *journalFile
	logger *zap.Logger

	mu      sync.Mutex
	buckets []*journalBucket // the first is this store's own; the others it has adopted
}

// journalBucket is what waits in one bucket, as one store sees it.
type journalBucket struct {
	name    string
	waiting *atomic.Int64 // entries; one number for all stores
	read    uint64        // the last entry that was read; is the writer's
}

// journalFile is an open file, shared through journalPool.
type journalFile struct {
	bolt *bbolt.DB
	path string

	mu    sync.Mutex
	count map[string]*atomic.Int64 // entries of each bucket
}

// journalPool has every journal that is open, by its path.
var journalPool = caddy.NewUsagePool()

const (
	redisJournalFormat = 1
	asideSuffix        = "-aside"
)

// bucketRedisJournal is about the file itself, and has the id of the Redis that each bucket was last for.
var bucketRedisJournal = []byte("redis-journal")

// openRedisJournal opens the file, or creates it, for the Redis at the addresses that identity stands for.
func openRedisJournal(path, identity string) (*redisJournal, error) {
	value, _, err := journalPool.LoadOrNew(path, func() (caddy.Destructor, error) { return openJournalFile(path) })
	if err != nil {
		return nil, err
	}
	j := &redisJournal{file: value.(*journalFile), logger: zap.NewNop()}
	if err := j.use(identity); err != nil {
		return nil, errors.Join(err, j.close())
	}
	return j, nil
}

func (j *redisJournal) close() error {
	_, err := journalPool.Delete(j.file.path)
	return err
}

// use has the journal's entries include those of a bucket, which is created where there is none.
func (j *redisJournal) use(name string) error {
	waiting, err := j.file.begin(name)
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if slices.ContainsFunc(j.buckets, func(b *journalBucket) bool { return b.name == name }) {
		return nil
	}
	j.buckets = append(j.buckets, &journalBucket{name: name, waiting: waiting})
	return nil
}

func openJournalFile(path string) (*journalFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	bolt, err := openChecked(path, checkJournalFormat)
	if err != nil {
		return nil, err
	}
	f := &journalFile{bolt: bolt, path: path, count: make(map[string]*atomic.Int64)}
	err = f.update(func(tx *bbolt.Tx) error {
		about, err := tx.CreateBucketIfNotExists(bucketRedisJournal)
		if err != nil {
			return err
		}
		return putNumber(about, keyFormat, redisJournalFormat)
	})
	if err == nil {
		err = syncDirectory(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(err, bolt.Close())
	}
	return f, nil
}

func checkJournalFormat(tx *bbolt.Tx) error {
	about := tx.Bucket(bucketRedisJournal)
	if about == nil {
		if first, _ := tx.Cursor().First(); first != nil {
			return errors.New("it is a database of another kind")
		}
		return nil // created, and no more
	}
	if format := number(about, keyFormat); format != redisJournalFormat {
		return fmt.Errorf("it has format %d, and this version of mesh reads format %d", format, redisJournalFormat)
	}
	return nil
}

// Destruct closes the file.
func (f *journalFile) Destruct() error { return f.bolt.Close() }

func (f *journalFile) view(fn func(*bbolt.Tx) error) error {
	return guard(func() error { return f.bolt.View(fn) })
}

func (f *journalFile) update(fn func(*bbolt.Tx) error) error {
	return guard(func() error { return f.bolt.Update(fn) })
}

// begin makes sure of a bucket and returns the count of its entries.
func (f *journalFile) begin(identity string) (*atomic.Int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if count := f.count[identity]; count != nil {
		return count, nil
	}
	count := new(atomic.Int64)
	err := f.update(func(tx *bbolt.Tx) error {
		if _, err := tx.CreateBucketIfNotExists([]byte(identity + asideSuffix)); err != nil {
			return err
		}
		waiting, err := tx.CreateBucketIfNotExists([]byte(identity))
		if err == nil {
			count.Store(int64(waiting.Stats().KeyN))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	f.count[identity] = count
	return count, nil
}

// belongTo says which Redis there is at this store's addresses. Buckets of other addresses that were for the same one
// are adopted from now on. A bucket of these addresses stays, whatever Redis it was for before: most likely that was this
// one, before it lost its data. It reports how many entries were adopted, and whether the Redis was another before.
func (j *redisJournal) belongTo(redisID string) (adopted int, another bool, err error) {
	var ours, strange []string
	for _, b := range j.all() {
		ours = append(ours, b.name)
	}
	unknown := false
	err = j.file.view(func(tx *bbolt.Tx) error {
		about := tx.Bucket(bucketRedisJournal)
		for i, name := range ours {
			was := string(about.Get(keyRedisID(name)))
			unknown = unknown || was != redisID
			another = another || i == 0 && was != "" && was != redisID
		}
		return eachJournalBucket(tx, func(name string, _ *bbolt.Bucket) {
			if !slices.Contains(ours, name) && string(about.Get(keyRedisID(name))) == redisID {
				strange = append(strange, name)
			}
		})
	})
	if err == nil && unknown {
		err = j.file.update(func(tx *bbolt.Tx) (err error) {
			for _, name := range ours {
				err = errors.Join(err, tx.Bucket(bucketRedisJournal).Put(keyRedisID(name), []byte(redisID)))
			}
			return err
		})
	}
	if err != nil {
		return 0, false, err
	}
	before := j.count()
	for _, name := range strange {
		err = errors.Join(err, j.use(name))
	}
	return j.count() - before, another, err
}

func keyRedisID(bucket string) []byte { return []byte("redis of " + bucket) }

// eachJournalBucket calls fn for each bucket with settlements that wait.
func eachJournalBucket(tx *bbolt.Tx, fn func(name string, b *bbolt.Bucket)) error {
	return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		if !bytes.Equal(name, bucketRedisJournal) && !bytes.HasSuffix(name, []byte(asideSuffix)) {
			fn(string(name), b)
		}
		return nil
	})
}

func (j *redisJournal) all() []*journalBucket {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.buckets)
}

// own returns the name of this store's own bucket.
func (j *redisJournal) own() string { return j.all()[0].name }

// others returns how many entries wait for other Redis servers than this one, as far as is known.
func (j *redisJournal) others() (count int) {
	ours := make(map[string]bool)
	for _, b := range j.all() {
		ours[b.name] = true
	}
	j.file.view(func(tx *bbolt.Tx) error { //nolint:errcheck // for the log
		return eachJournalBucket(tx, func(name string, b *bbolt.Bucket) {
			if !ours[name] {
				count += b.Stats().KeyN
			}
		})
	})
	return count
}

// count returns how many entries there are. Every admission asks.
func (j *redisJournal) count() (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, b := range j.buckets {
		n += int(b.waiting.Load())
	}
	return n
}
