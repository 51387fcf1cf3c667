package mesh

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"go.etcd.io/bbolt"
)

// redisJournal holds, in a file, what is to be entered into one Redis, in order. Each write is synced.
//
// Stores for several Redis servers, and stores for one that differ in their options, as while a configuration is
// reloaded, share the file. Each Redis has a bucket of its own, so that nothing is entered where it does not belong.
// Two stores for one Redis may both enter what is there: Redis takes it once.
type redisJournal struct {
	file    *journalFile
	bucket  []byte
	aside   []byte
	waiting *atomic.Int64 // entries in bucket
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

var bucketRedisJournal = []byte("redis-journal") // about the file itself

// openRedisJournal opens the file, or creates it, for the Redis that identity names.
func openRedisJournal(path, identity string) (*redisJournal, error) {
	value, _, err := journalPool.LoadOrNew(path, func() (caddy.Destructor, error) { return openJournalFile(path) })
	if err != nil {
		return nil, err
	}
	file := value.(*journalFile)
	j := &redisJournal{file: file, bucket: []byte(identity), aside: []byte(identity + asideSuffix)}
	if j.waiting, err = file.begin(identity); err != nil {
		return nil, errors.Join(err, j.close())
	}
	return j, nil
}

func (j *redisJournal) close() error {
	_, err := journalPool.Delete(j.file.path)
	return err
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
	err = guard(func() error {
		return bolt.Update(func(tx *bbolt.Tx) error {
			about, err := tx.CreateBucketIfNotExists(bucketRedisJournal)
			if err != nil {
				return err
			}
			return putNumber(about, keyFormat, redisJournalFormat)
		})
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

// begin makes sure of a bucket and returns the count of its entries.
func (f *journalFile) begin(identity string) (*atomic.Int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if count := f.count[identity]; count != nil {
		return count, nil
	}
	count := new(atomic.Int64)
	err := guard(func() error {
		return f.bolt.Update(func(tx *bbolt.Tx) error {
			if _, err := tx.CreateBucketIfNotExists([]byte(identity + asideSuffix)); err != nil {
				return err
			}
			waiting, err := tx.CreateBucketIfNotExists([]byte(identity))
			if err == nil {
				count.Store(int64(waiting.Stats().KeyN))
			}
			return err
		})
	})
	f.count[identity] = count
	return count, err
}

// others returns how many entries wait for other Redis servers than this one.
func (j *redisJournal) others() (count int) {
	j.file.bolt.View(func(tx *bbolt.Tx) error { //nolint:errcheck // for the log
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			if !bytes.Equal(name, j.bucket) && !bytes.Equal(name, bucketRedisJournal) && !bytes.HasSuffix(name, []byte(asideSuffix)) {
				count += b.Stats().KeyN
			}
			return nil
		})
	})
	return count
}

// count returns how many entries there are.
func (j *redisJournal) count() int { return int(j.waiting.Load()) }

func (j *redisJournal) append(batch []settlement) error {
	err := j.put(j.bucket, batch)
	if err == nil {
		j.waiting.Add(int64(len(batch)))
	}
	return err
}

// setAside keeps what Redis can never take, for whoever finds out why.
func (j *redisJournal) setAside(one settlement) error { return j.put(j.aside, []settlement{one}) }

// countAside returns how many entries were set aside.
func (j *redisJournal) countAside() (count int) {
	j.file.bolt.View(func(tx *bbolt.Tx) error { //nolint:errcheck // for the log
		count = tx.Bucket(j.aside).Stats().KeyN
		return nil
	})
	return count
}

func (j *redisJournal) put(bucket []byte, batch []settlement) error {
	return guard(func() error {
		return j.file.bolt.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket(bucket)
			b.FillPercent = 0.9 // keys come in order
			for i := range batch {
				encoded, err := json.Marshal(&batch[i])
				if err != nil {
					return err
				}
				next, err := b.NextSequence()
				if err != nil {
					return err
				}
				if err := b.Put(binary.BigEndian.AppendUint64(nil, next), encoded); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// journalEntry is a settlement with its place in the journal.
type journalEntry struct {
	place      []byte
	settlement settlement
}

// oldest returns the first entries, up to a number of them.
func (j *redisJournal) oldest(limit int) (entries []journalEntry, err error) {
	if j.count() == 0 {
		return nil, nil
	}
	err = guard(func() error {
		return j.file.bolt.View(func(tx *bbolt.Tx) error {
			cursor := tx.Bucket(j.bucket).Cursor()
			for key, value := cursor.First(); key != nil && len(entries) < limit; key, value = cursor.Next() {
				e := journalEntry{place: bytes.Clone(key)}
				if err := json.Unmarshal(value, &e.settlement); err != nil {
					return fmt.Errorf("journal entry %x is damaged: %w", key, err)
				}
				entries = append(entries, e)
			}
			return nil
		})
	})
	return entries, err
}

// remove forgets entries that are in Redis. Those that another store has removed meanwhile are gone already.
func (j *redisJournal) remove(entries []journalEntry) error {
	removed := int64(0)
	err := guard(func() error {
		return j.file.bolt.Update(func(tx *bbolt.Tx) error {
			removed = 0
			b := tx.Bucket(j.bucket)
			for _, e := range entries {
				if b.Get(e.place) == nil {
					continue
				}
				removed++
				if err := b.Delete(e.place); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err == nil {
		j.waiting.Add(-removed)
	}
	return err
}
