package mesh

import (
	"bytes"
	"encoding/binary"
	"encoding/json"

	"go.etcd.io/bbolt"
	"go.uber.org/zap"
)

// journalPlace is where in the journal an entry stands.
type journalPlace struct {
	bucket *journalBucket
	number uint64
}

func (p journalPlace) key() []byte { return binary.BigEndian.AppendUint64(nil, p.number) }

// journalEntry is a settlement with its place in the journal.
type journalEntry struct {
	place      journalPlace
	settlement settlement
	damaged    []byte // what stands there, where that is no settlement
}

// maxRead is how many entries are read at once to find some that are wanted.
const maxRead = 10_000

func (j *redisJournal) append(batch []settlement) error {
	own := j.all()[0]
	err := j.put(own.name, batch)
	if err == nil {
		own.waiting.Add(int64(len(batch)))
	}
	return err
}

// setAside keeps what Redis can never take, for whoever finds out why.
func (j *redisJournal) setAside(one settlement) error {
	return j.put(j.own()+asideSuffix, []settlement{one})
}

// countAside returns how many entries were set aside.
func (j *redisJournal) countAside() (count int) {
	j.file.view(func(tx *bbolt.Tx) error { //nolint:errcheck // for the log
		count = tx.Bucket([]byte(j.own() + asideSuffix)).Stats().KeyN
		return nil
	})
	return count
}

func (j *redisJournal) put(bucket string, batch []settlement) error {
	return j.file.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(bucket))
		b.FillPercent = 0.9 // keys come in order
		for i := range batch {
			encoded, err := json.Marshal(&batch[i])
			if err == nil {
				err = putNext(b, encoded)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func putNext(b *bbolt.Bucket, value []byte) error {
	next, err := b.NextSequence()
	if err != nil {
		return err
	}
	return b.Put(binary.BigEndian.AppendUint64(nil, next), value)
}

// rewind has next begin with the oldest entries again.
func (j *redisJournal) rewind() {
	for _, b := range j.all() {
		b.read = 0
	}
}

// next reads on: it returns up to a number of entries, in order, passing over those of which skip says so, and whether
// these were the last. They are to be sent, and are marked in the file as sent before they are returned; in what is
// returned the mark shows whether they were sent before. What is damaged is set aside.
func (j *redisJournal) next(limit int, skip func(*settlement) bool) (entries []journalEntry, end bool, err error) {
	end = true
	err = j.file.view(func(tx *bbolt.Tx) error {
		read := 0
		for _, b := range j.all() {
			cursor := tx.Bucket([]byte(b.name)).Cursor()
			for key, value := cursor.Seek(journalPlace{number: b.read + 1}.key()); key != nil; key, value = cursor.Next() {
				if len(entries) == limit || read == maxRead {
					end = false
					return nil
				}
				read++
				e := journalPlace{b, binary.BigEndian.Uint64(key)}.entry(value)
				b.read = e.place.number
				if e.damaged != nil || !skip(&e.settlement) {
					entries = append(entries, e)
				}
			}
		}
		return nil
	})
	if err == nil {
		entries, err = j.markSent(entries)
	}
	if err != nil {
		j.rewind()
	}
	return entries, end, err
}

func (p journalPlace) entry(value []byte) journalEntry {
	e := journalEntry{place: p}
	if err := json.Unmarshal(value, &e.settlement); err != nil {
		return journalEntry{place: p, damaged: bytes.Clone(value)}
	}
	return e
}

// at returns the entries at some places, of those that are there still, as next does.
func (j *redisJournal) at(places map[string]journalPlace) (entries []journalEntry, err error) {
	err = j.file.view(func(tx *bbolt.Tx) error {
		for _, place := range places {
			if value := tx.Bucket([]byte(place.bucket.name)).Get(place.key()); value != nil {
				entries = append(entries, place.entry(value))
			}
		}
		return nil
	})
	if err == nil {
		entries, err = j.markSent(entries)
	}
	return entries, err
}

// markSent marks entries in the file, and returns them without those that are damaged, which it sets aside.
func (j *redisJournal) markSent(entries []journalEntry) (intact []journalEntry, err error) {
	unmarked := false
	for _, e := range entries {
		unmarked = unmarked || !e.settlement.Sent
		if e.damaged == nil {
			intact = append(intact, e)
		}
	}
	if !unmarked {
		return intact, nil
	}
	err = j.file.update(func(tx *bbolt.Tx) error {
		for _, e := range entries {
			if err := e.mark(tx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.damaged != nil {
			e.place.bucket.waiting.Add(-1)
			j.logger.Error("damaged entry of the journal, set aside there", zap.ByteString("entry", e.damaged))
		}
	}
	return intact, nil
}

func (e journalEntry) mark(tx *bbolt.Tx) error {
	b := tx.Bucket([]byte(e.place.bucket.name))
	switch {
	case b.Get(e.place.key()) == nil: // another store has dealt with it meanwhile
		return nil
	case e.damaged != nil:
		aside := tx.Bucket([]byte(e.place.bucket.name + asideSuffix))
		if err := putNext(aside, e.damaged); err != nil {
			return err
		}
		return b.Delete(e.place.key())
	}
	e.settlement.Sent = true
	encoded, err := json.Marshal(&e.settlement)
	if err != nil {
		return err
	}
	return b.Put(e.place.key(), encoded)
}

// remove forgets entries that are in Redis. Those that another store has removed meanwhile are gone already.
func (j *redisJournal) remove(entries []journalEntry) error {
	if len(entries) == 0 {
		return nil
	}
	removed := make(map[*journalBucket]int64)
	err := j.file.update(func(tx *bbolt.Tx) error {
		clear(removed)
		for _, e := range entries {
			b := tx.Bucket([]byte(e.place.bucket.name))
			if b.Get(e.place.key()) == nil {
				continue
			}
			removed[e.place.bucket]++
			if err := b.Delete(e.place.key()); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		for bucket, n := range removed {
			bucket.waiting.Add(-n)
		}
	}
	return err
}
