package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"go.etcd.io/bbolt"
)

// Sums of a database. Their keys have the period first, so that old ones are at the front.
var (
	bucketDays     = []byte("usage_days")     // day, key id, model → sums
	bucketHours    = []byte("usage_hours")    // hour, key id, model → sums
	bucketSessions = []byte("usage_sessions") // hour, key id, session, model → sums
	bucketLabels   = []byte("usage_keys")     // key id → KeyLabel
	bucketByKey    = []byte("ledger_by_key")  // key id, request id → nothing

	keyRolled = []byte("rolled") // up to which entry an older ledger has been gone through
)

const sumSeparator = "\x00"

func sumKey(parts ...string) string { return string(appendSumKey(nil, parts)) }

func appendSumKey(b []byte, parts []string) []byte {
	for i, part := range parts {
		if i > 0 {
			b = append(b, sumSeparator...)
		}
		b = append(b, part...)
	}
	return b
}

// rollup gathers what a commit adds to sums.
type rollup struct {
	days, hours, sessions map[string]*usageSums
	labels                map[string]KeyLabel
	entries               []string // of bucketByKey

	began     int64 // the hour that day and hour name
	day, hour string
	key       []byte // the last one, for its memory
}

func newRollup() *rollup {
	return &rollup{
		days: make(map[string]*usageSums), hours: make(map[string]*usageSums), sessions: make(map[string]*usageSums),
		labels: make(map[string]KeyLabel), began: -1,
	}
}

func (r *rollup) add(requestID string, u *eventUsage) {
	if u.hour != r.began {
		began := time.Unix(u.hour, 0).UTC()
		r.began, r.day, r.hour = u.hour, began.Format(time.DateOnly), began.Format(hourForm)
	}
	sums := u.sums()
	r.into(r.days, sums, r.day, u.keyID, u.model)
	r.into(r.hours, sums, r.hour, u.keyID, u.model)
	if u.session != "" {
		r.into(r.sessions, sums, r.hour, u.keyID, u.session, u.model)
	}
	r.labels[u.keyID] = u.label
	r.entries = append(r.entries, sumKey(u.keyID, requestID))
}

// into adds to the sums of a key.
func (r *rollup) into(m map[string]*usageSums, more usageSums, parts ...string) {
	r.key = appendSumKey(r.key[:0], parts)
	sums := m[string(r.key)]
	if sums == nil {
		sums = new(usageSums)
		m[string(r.key)] = sums
	}
	sums.add(more)
}

// write adds to what the database has.
func (r *rollup) write(tx *bbolt.Tx) error {
	for _, b := range []struct {
		name []byte
		sums map[string]*usageSums
	}{{bucketDays, r.days}, {bucketHours, r.hours}, {bucketSessions, r.sessions}} {
		bucket := tx.Bucket(b.name)
		for key, sums := range b.sums {
			if err := addSums(bucket, []byte(key), sums); err != nil {
				return err
			}
		}
	}
	labels := tx.Bucket(bucketLabels)
	for keyID, label := range r.labels {
		encoded, err := json.Marshal(label)
		if err != nil {
			return err
		}
		if bytes.Equal(labels.Get([]byte(keyID)), encoded) {
			continue
		}
		if err := labels.Put([]byte(keyID), encoded); err != nil {
			return err
		}
	}
	byKey := tx.Bucket(bucketByKey)
	for _, entry := range r.entries {
		if err := byKey.Put([]byte(entry), nil); err != nil {
			return err
		}
	}
	return nil
}

func addSums(b *bbolt.Bucket, key []byte, more *usageSums) error {
	sums := *more
	if value := b.Get(key); value != nil {
		var before usageSums
		if err := json.Unmarshal(value, &before); err != nil {
			return fmt.Errorf("sum %q is damaged: %w", key, err)
		}
		sums.add(before)
	}
	encoded, err := json.Marshal(&sums)
	if err != nil {
		return err
	}
	return b.Put(key, encoded)
}

// prepareSums makes the buckets, and goes through the ledger of a database from before there were sums. That is done
// in steps, so that it needs little memory and goes on where it was if it is interrupted.
func (d *database) prepareSums() error {
	const perStep = 10_000
	err := d.bolt.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketDays, bucketHours, bucketSessions, bucketLabels, bucketByKey} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		mesh := tx.Bucket(bucketMesh)
		if last, _ := tx.Bucket(bucketLedger).Cursor().Last(); last == nil && mesh.Get(keyRolled) == nil {
			return mesh.Put(keyRolled, []byte("~")) // is behind every id
		}
		return nil
	})
	for more := err == nil; more; {
		err = d.bolt.Update(func(tx *bbolt.Tx) (err error) {
			more, err = rollUpOld(tx, perStep)
			return err
		})
		more = more && err == nil
	}
	return err
}

// rollUpOld reports whether there may be more to do.
func rollUpOld(tx *bbolt.Tx, limit int) (more bool, err error) {
	mesh, cursor := tx.Bucket(bucketMesh), tx.Bucket(bucketLedger).Cursor()
	done := bytes.Clone(mesh.Get(keyRolled))
	if string(done) == "~" {
		return false, nil
	}
	r := newRollup()
	key, value := cursor.Seek(done)
	if bytes.Equal(key, done) && done != nil {
		key, value = cursor.Next()
	}
	for ; key != nil && limit > 0; key, value = cursor.Next() {
		var e Event
		if err := json.Unmarshal(value, &e); err != nil {
			return false, fmt.Errorf("ledger entry %q is damaged: %w", key, err)
		}
		used := usedBy(&e)
		r.add(string(key), &used)
		done = bytes.Clone(key)
		limit--
	}
	if err := r.write(tx); err != nil {
		return false, err
	}
	if key == nil {
		done = []byte("~")
	}
	return key != nil, mesh.Put(keyRolled, done)
}

// rollUp adds to the sums what is new in the ledger.
func (d *database) rollUp(tx *bbolt.Tx, g *generation, added []string) error {
	r := newRollup()
	for _, id := range added {
		used, ok := g.used[id]
		if !ok { // it comes from a journal
			var e Event
			if err := json.Unmarshal(g.events[id], &e); err != nil {
				return fmt.Errorf("ledger entry %q is damaged: %w", id, err)
			}
			used = usedBy(&e)
		}
		r.add(id, &used)
	}
	if err := r.write(tx); err != nil {
		return err
	}
	return d.pruneSums(tx, time.Now().UTC())
}

// pruneSums deletes sums that are too old, once a day.
func (d *database) pruneSums(tx *bbolt.Tx, now time.Time) error {
	today := now.Format(time.DateOnly)
	if d.pruned == today {
		return nil
	}
	for _, b := range []struct {
		name []byte
		kept time.Duration
	}{{bucketDays, keptDays}, {bucketHours, keptHours}, {bucketSessions, keptSessions}} {
		oldest := []byte(now.Add(-b.kept).Format(time.DateOnly))
		var old [][]byte
		cursor := tx.Bucket(b.name).Cursor()
		for key, _ := cursor.First(); key != nil && bytes.Compare(key, oldest) < 0; key, _ = cursor.Next() {
			old = append(old, bytes.Clone(key))
		}
		for _, key := range old {
			if err := tx.Bucket(b.name).Delete(key); err != nil {
				return err
			}
		}
	}
	d.pruned = today
	return nil
}

// settledAll waits until what was settled is in the database.
func (s *localStore) settledAll() error {
	if s.unsaved.Load() == 0 {
		return nil
	}
	if err := s.flush(); err != nil {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return nil
}

// Usage reads the database.
func (s *localStore) Usage(_ context.Context, q UsageQuery, fn func(UsageRow)) error {
	if err := s.settledAll(); err != nil {
		return err
	}
	now := s.now()
	q = q.clamped(now)
	return s.database.view(func(tx *bbolt.Tx) error {
		for _, p := range q.periods(now) {
			name := bucketDays
			switch {
			case q.Sessions:
				name = bucketSessions
			case p.hour:
				name = bucketHours
			}
			if err := eachSum(tx.Bucket(name), q, p.name, fn); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachSum calls fn for the sums of one period.
func eachSum(b *bbolt.Bucket, q UsageQuery, period string, fn func(UsageRow)) error {
	prefix := period + sumSeparator
	if q.KeyID != "" {
		prefix += q.KeyID + sumSeparator
		if q.SessionID != "" {
			prefix += strings.ReplaceAll(q.SessionID, "\x00", "\uFFFD") + sumSeparator
		}
	}
	cursor := b.Cursor()
	for key, value := cursor.Seek([]byte(prefix)); bytes.HasPrefix(key, []byte(prefix)); key, value = cursor.Next() {
		parts := strings.Split(string(key), sumSeparator)
		row := UsageRow{KeyID: parts[1], Day: period[:len(time.DateOnly)], Model: parts[len(parts)-1]}
		if q.Sessions {
			row.Session = parts[2]
		}
		if q.SessionID != "" && row.Session != q.SessionID && q.KeyID == "" {
			continue
		}
		if err := json.Unmarshal(value, &row.usageSums); err != nil {
			return fmt.Errorf("sum %q is damaged: %w", key, err)
		}
		fn(row)
	}
	return nil
}

func (d *database) view(fn func(*bbolt.Tx) error) error {
	return guard(func() error { return d.bolt.View(fn) })
}

// UsageKeys reads the database.
func (s *localStore) UsageKeys(context.Context) (map[string]KeyLabel, error) {
	if err := s.settledAll(); err != nil {
		return nil, err
	}
	labels := make(map[string]KeyLabel)
	err := s.database.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketLabels).ForEach(func(keyID, value []byte) error {
			var l KeyLabel
			if err := json.Unmarshal(value, &l); err != nil {
				return fmt.Errorf("label of key %q is damaged: %w", keyID, err)
			}
			labels[string(keyID)] = l
			return nil
		})
	})
	return labels, err
}

// firstRequestID returns the least id of a request that began at t or later. Ids say it in milliseconds.
func firstRequestID(t time.Time) string {
	var id ulid.ULID
	id.SetTime(uint64(max(0, t.Add(time.Millisecond-1).UnixMilli()))) //nolint:errcheck // it has room for the year 9999
	return "req_" + id.String()
}

// KeyEvents reads the database, some entries at a time, because a commit can wait for a transaction that reads.
func (s *localStore) KeyEvents(_ context.Context, keyID string, from, to time.Time, fn func(*Event) bool) error {
	if err := s.settledAll(); err != nil {
		return err
	}
	const perView = 500
	prefix := []byte(keyID + sumSeparator)
	before, first := append(bytes.Clone(prefix), 0xff), prefix
	if !from.IsZero() {
		first = []byte(sumKey(keyID, firstRequestID(from)))
	}
	if !to.IsZero() {
		before = []byte(sumKey(keyID, firstRequestID(to)))
	}
	for more := true; more; {
		n := 0
		err := s.database.view(func(tx *bbolt.Tx) error {
			cursor, ledger := tx.Bucket(bucketByKey).Cursor(), tx.Bucket(bucketLedger)
			key, _ := seekBefore(cursor, string(before))
			for ; more && n < perView && bytes.HasPrefix(key, prefix) && bytes.Compare(key, first) >= 0; key, _ = cursor.Prev() {
				before = bytes.Clone(key)
				n++
				value := ledger.Get(key[len(prefix):])
				if value == nil {
					continue // pruned
				}
				var e Event
				if err := json.Unmarshal(value, &e); err != nil {
					return fmt.Errorf("ledger entry %q is damaged: %w", key[len(prefix):], err)
				}
				more = fn(&e)
			}
			return nil
		})
		if err != nil {
			return err
		}
		more = more && n == perView
	}
	return nil
}

// KeyEvent reads the database.
func (s *localStore) KeyEvent(_ context.Context, keyID, requestID string) (found *Event, err error) {
	if err := s.settledAll(); err != nil {
		return nil, err
	}
	err = s.database.view(func(tx *bbolt.Tx) error {
		value := tx.Bucket(bucketLedger).Get([]byte(requestID))
		if value == nil {
			return nil
		}
		e := new(Event)
		if err := json.Unmarshal(value, e); err != nil {
			return fmt.Errorf("ledger entry %q is damaged: %w", requestID, err)
		}
		if e.KeyID == keyID {
			found = e
		}
		return nil
	})
	return found, err
}

// Standing looks into memory.
func (s *localStore) Standing(_ context.Context, keyID string, limits Limits) (Standing, error) {
	return s.account(keyID).standing(s.now(), limits), nil
}

func (a *account) standing(now time.Time, limits Limits) Standing {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Standing{a.balance.standing(now, limits), int64(len(a.underWay.requests))}
}

// standing is what admit would say, of a balance that stays as it is.
func (b balance) standing(now time.Time, limits Limits) Verdict {
	v := b.admit(now, Limits{SpendPeriod: limits.SpendPeriod, TPM: limits.TPM}, 0, 0)
	if v.Refused == "" {
		v.Minute.Used, v.Day.Used = v.Minute.Used-1, v.Day.Used-1
	}
	v.Refused = ""
	return v
}

var _ UsageStore = (*localStore)(nil)
