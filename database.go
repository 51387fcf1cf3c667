package mesh

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// database is the file of a local store: the balance of each key, the ledger, and the store's own keys. Balances and ledger
// are changed only by commit, one generation at a time. Each transaction is synced.
type database struct {
	bolt       *bbolt.DB
	id         []byte // made up when the file was created
	generation uint64 // the last one committed before it was opened
	pruned     string // the day on which old sums were deleted
}

const databaseFormat = 1

var (
	bucketMesh     = []byte("mesh") // about the file itself
	bucketAccounts = []byte("accounts")
	bucketLedger   = []byte("ledger")

	keyFormat     = []byte("format")
	keyID         = []byte("id")
	keyGeneration = []byte("generation") // the last one committed
	keyEvents     = []byte("events")     // how many the ledger has
)

const (
	lockTimeout = 2 * time.Second

	// maxPrunedMore is how many entries more than were added a commit may delete, where the ledger is to become
	// shorter than it was.
	maxPrunedMore = 10_000
)

// openDatabase opens the file, or creates one where there is none. It changes no file that is not a whole database of
// this format.
func openDatabase(path string) (*database, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	bolt, err := openChecked(path, checkFormat)
	if err != nil {
		return nil, err
	}
	d := &database{bolt: bolt}
	if err := guard(d.begin); err != nil {
		return nil, errors.Join(err, bolt.Close())
	}
	return d, nil
}

// openChecked opens a file, or creates one where there is none. It changes no file that is not a whole database of the
// format that check is for.
func openChecked(path string, check func(*bbolt.Tx) error) (*bbolt.DB, error) {
	switch file, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case !file.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case file.Size() == 0:
		return nil, errors.New("it is empty; if nothing was lost, remove it")
	default:
		if err := inspect(path, check); err != nil {
			return nil, err
		}
	}
	return openBolt(path, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType})
}

// inspect returns an error where the file is not a whole database of the format that check is for. It reads all of it: 0.8 s for a
// million ledger entries (535 MB) that the kernel has in memory, and as long as the disk takes where it has not.
func inspect(path string, check func(*bbolt.Tx) error) error {
	var file *os.File
	options := &bbolt.Options{Timeout: lockTimeout, ReadOnly: true}
	options.OpenFile = func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
		if file, err = os.OpenFile(name, flag, mode); err == nil {
			err = checkMeta(file)
		}
		return file, err
	}
	bolt, err := openBolt(path, options)
	if err != nil {
		return err
	}
	defer bolt.Close()
	stat, err := file.Stat()
	if err != nil {
		return err
	}
	if err := checkPages(file, stat.Size()); err != nil {
		return err
	}
	return guard(func() error { return bolt.View(check) })
}

// checkMeta keeps bbolt from mapping what is no database: it would fault where the file is shorter than two pages.
func checkMeta(file *os.File) error {
	meta, err := newestMeta(file)
	if err != nil {
		return err
	}
	stat, err := file.Stat()
	if err != nil {
		return err
	}
	if stat.Size() < 2*meta.pageSize {
		return errTruncated
	}
	return nil
}

func openBolt(path string, options *bbolt.Options) (bolt *bbolt.DB, err error) {
	err = guard(func() (err error) {
		bolt, err = bbolt.Open(path, 0o600, options)
		return err
	})
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return nil, errors.New("another process has it open")
	}
	return bolt, err
}

// guard turns the panics and faults that a damaged file can cause inside bbolt into errors.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("it is damaged: %v", cause)
		}
	}()
	return f()
}

var errBucketMissing = errors.New("it is damaged: a bucket is missing")

func checkFormat(tx *bbolt.Tx) error {
	mesh := tx.Bucket(bucketMesh)
	if mesh == nil {
		if first, _ := tx.Cursor().First(); first != nil {
			return errors.New("it is a database of another application")
		}
		return nil // created, and no more
	}
	if format := number(mesh, keyFormat); format != databaseFormat {
		return fmt.Errorf("it has format %d, and this version of mesh reads format %d", format, databaseFormat)
	}
	if tx.Bucket(bucketAccounts) == nil || tx.Bucket(bucketLedger) == nil {
		return errBucketMissing
	}
	if tx.Bucket(bucketJobs) == nil { // it is from before there were jobs
		return nil
	}
	return jobBucketsOf(tx).each(func(_ string, bucket **bbolt.Bucket) error {
		if *bucket == nil {
			return errBucketMissing
		}
		return nil
	})
}

// begin reads what the file says about itself, after writing it where the file is new.
func (d *database) begin() error {
	err := d.bolt.View(checkFormat)
	if err != nil {
		return err
	}
	if err := d.bolt.View(d.readMesh); err != nil {
		return err
	}
	if d.id != nil {
		return errors.Join(d.addKeys(), d.prepareSums())
	}
	if err := d.bolt.Update(create); err != nil {
		return err
	}
	if err := syncDirectory(filepath.Dir(d.bolt.Path())); err != nil {
		return err
	}
	if err := d.prepareSums(); err != nil {
		return err
	}
	return d.bolt.View(d.readMesh)
}

func (d *database) readMesh(tx *bbolt.Tx) error {
	if mesh := tx.Bucket(bucketMesh); mesh != nil {
		d.id, d.generation = bytes.Clone(mesh.Get(keyID)), number(mesh, keyGeneration)
	}
	return nil
}

func create(tx *bbolt.Tx) error {
	for _, name := range [][]byte{bucketMesh, bucketAccounts, bucketLedger, bucketKeys} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	id := make([]byte, 16)
	rand.Read(id)
	mesh := tx.Bucket(bucketMesh)
	return errors.Join(mesh.Put(keyID, id), putNumber(mesh, keyFormat, databaseFormat))
}

// addKeys gives a database of before there were keys in it the bucket for them.
func (d *database) addKeys() error {
	var there bool
	err := d.bolt.View(func(tx *bbolt.Tx) error {
		there = tx.Bucket(bucketKeys) != nil
		return nil
	})
	if err != nil || there {
		return err
	}
	return d.bolt.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket(bucketKeys)
		return err
	})
}

// syncDirectory makes a new file's name survive a power cut. Windows has no such thing, and needs none.
func syncDirectory(path string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	directory, err := os.Open(path)
	if err != nil {
		return err
	}
	defer directory.Close()
	return directory.Sync()
}

func number(b *bbolt.Bucket, key []byte) uint64 {
	value := b.Get(key)
	if len(value) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(value)
}

func putNumber(b *bbolt.Bucket, key []byte, n uint64) error {
	return b.Put(key, binary.BigEndian.AppendUint64(nil, n))
}

// commit writes a generation, and deletes the ledger's oldest entries where there are more than maxEvents.
func (d *database) commit(g *generation, maxEvents int) error {
	return guard(func() error {
		return d.bolt.Update(func(tx *bbolt.Tx) error {
			if _, err := put(tx.Bucket(bucketAccounts), g.accounts); err != nil {
				return err
			}
			mesh, ledger := tx.Bucket(bucketMesh), tx.Bucket(bucketLedger)
			ledger.FillPercent = 0.9 // keys come almost in order
			added, err := put(ledger, g.events)
			if err != nil {
				return err
			}
			if err := d.rollUp(tx, g, added); err != nil {
				return err
			}
			count := int(number(mesh, keyEvents)) + len(added)
			pruned, err := prune(tx, min(count-maxEvents, len(added)+maxPrunedMore))
			if err != nil {
				return err
			}
			return errors.Join(
				putNumber(mesh, keyEvents, uint64(count-pruned)),
				putNumber(mesh, keyGeneration, g.number),
			)
		})
	})
}

// put returns the records' keys that are new.
func put(b *bbolt.Bucket, r records) (added []string, err error) {
	last, _ := b.Cursor().Last()
	last = bytes.Clone(last)
	for _, key := range slices.Sorted(maps.Keys(r)) {
		if isNew(b, last, []byte(key)) {
			added = append(added, key)
		}
		if err := b.Put([]byte(key), r[key]); err != nil {
			return nil, err
		}
	}
	return added, nil
}

// isNew reports whether a bucket whose last key is last lacks key. It need not look for what would come behind that, as
// nearly all request ids do.
func isNew(b *bbolt.Bucket, last, key []byte) bool {
	return bytes.Compare(key, last) > 0 || b.Get(key) == nil
}

// prune deletes the ledger's first entries, which are the oldest because request ids begin with the time.
func prune(tx *bbolt.Tx, count int) (pruned int, err error) {
	ledger, byKey := tx.Bucket(bucketLedger), tx.Bucket(bucketByKey)
	var oldest, entries [][]byte
	cursor := ledger.Cursor()
	for key, value := cursor.First(); key != nil && len(oldest) < count; key, value = cursor.Next() {
		var e struct {
			KeyID string `json:"key_id"`
		}
		if err := json.Unmarshal(value, &e); err != nil {
			return 0, fmt.Errorf("ledger entry %q is damaged: %w", key, err)
		}
		oldest, entries = append(oldest, bytes.Clone(key)), append(entries, []byte(sumKey(e.KeyID, string(key))))
	}
	for i, key := range oldest {
		if err := errors.Join(ledger.Delete(key), byKey.Delete(entries[i])); err != nil {
			return 0, err
		}
	}
	return len(oldest), nil
}

// balances calls fn for each account.
func (d *database) balances(fn func(keyID string, b balance)) error {
	return guard(func() error {
		return d.bolt.View(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketAccounts).ForEach(func(key, value []byte) error {
				var b balance
				if err := json.Unmarshal(value, &b); err != nil {
					return fmt.Errorf("the account of key %q is damaged: %w", key, err)
				}
				fn(string(key), b)
				return nil
			})
		})
	})
}

// has returns for each of the events whether the ledger has one of its id.
func (d *database) has(events []settledEvent) ([]bool, error) {
	found := make([]bool, len(events))
	err := guard(func() error {
		return d.bolt.View(func(tx *bbolt.Tx) error {
			ledger := tx.Bucket(bucketLedger)
			last, _ := ledger.Cursor().Last()
			for i := range events {
				found[i] = !isNew(ledger, last, []byte(events[i].requestID))
			}
			return nil
		})
	})
	return found, err
}

// before returns the ledger's last events whose id is less than id, newest first; of all where id is empty. It returns
// no more than limit, because a commit can wait for a transaction that reads.
func (d *database) before(id string, limit int) (events []Event, err error) {
	err = guard(func() error {
		return d.bolt.View(func(tx *bbolt.Tx) error {
			cursor := tx.Bucket(bucketLedger).Cursor()
			key, value := seekBefore(cursor, id)
			for ; key != nil && len(events) < limit; key, value = cursor.Prev() {
				var e Event
				if err := json.Unmarshal(value, &e); err != nil {
					return fmt.Errorf("ledger entry %q is damaged: %w", key, err)
				}
				events = append(events, e)
			}
			return nil
		})
	})
	return events, err
}

func seekBefore(cursor *bbolt.Cursor, id string) (key, value []byte) {
	if id == "" {
		return cursor.Last()
	}
	if key, _ = cursor.Seek([]byte(id)); key == nil {
		return cursor.Last()
	}
	return cursor.Prev()
}
