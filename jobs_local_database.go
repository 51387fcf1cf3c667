package mesh

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// bucketJobs has the buckets of jobBuckets.
var bucketJobs = []byte("jobs")

// jobBatchDelay is how long a change waits for others that could be committed with it.
const jobBatchDelay = 2 * time.Millisecond

// jobBuckets are the jobs in a database, within a transaction.
type jobBuckets struct {
	records *bbolt.Bucket // id → Job
	bodies  *bbolt.Bucket // id → the request's body, until the job ends
	results *bbolt.Bucket // id → its response or error
	open    *bbolt.Bucket // ids of jobs that are not settled
	owed    *bbolt.Bucket // id → the event of a job that has ended, until it is in the ledger for certain
	expiry  *bbolt.Bucket // time and id of jobs that have ended
}

// each calls fn for the name and the place of each bucket.
func (b *jobBuckets) each(fn func(name string, to **bbolt.Bucket) error) error {
	for _, one := range []struct {
		name string
		to   **bbolt.Bucket
	}{
		{"records", &b.records}, {"bodies", &b.bodies}, {"results", &b.results},
		{"open", &b.open}, {"owed", &b.owed}, {"expiry", &b.expiry},
	} {
		if err := fn(one.name, one.to); err != nil {
			return err
		}
	}
	return nil
}

// prepareJobs creates the buckets where they are missing.
func (s *localStore) prepareJobs() error {
	s.database.bolt.MaxBatchDelay = jobBatchDelay
	there := false
	err := s.database.bolt.View(func(tx *bbolt.Tx) error {
		there = tx.Bucket(bucketJobs) != nil
		return nil
	})
	if err != nil || there {
		return err
	}
	return s.database.bolt.Update(func(tx *bbolt.Tx) error {
		all, err := tx.CreateBucket(bucketJobs)
		if err != nil {
			return err
		}
		return new(jobBuckets).each(func(name string, _ **bbolt.Bucket) error {
			_, err := all.CreateBucket([]byte(name))
			return err
		})
	})
}

func jobBucketsOf(tx *bbolt.Tx) *jobBuckets {
	b := new(jobBuckets)
	all := tx.Bucket(bucketJobs)
	b.each(func(name string, to **bbolt.Bucket) error { //nolint:errcheck // it has none
		*to = all.Bucket([]byte(name))
		return nil
	})
	return b
}

// changeJobs runs fn in a synced transaction, together with others that come at the same time. It may run more than
// once.
func (s *localStore) changeJobs(fn func(*jobBuckets) error) error {
	return guard(func() error {
		return s.database.bolt.Batch(func(tx *bbolt.Tx) error { return fn(jobBucketsOf(tx)) })
	})
}

func (s *localStore) viewJobs(fn func(*jobBuckets) error) error {
	return guard(func() error {
		return s.database.bolt.View(func(tx *bbolt.Tx) error { return fn(jobBucketsOf(tx)) })
	})
}

func (b *jobBuckets) get(id string) (*Job, error) {
	encoded := b.records.Get([]byte(id))
	if encoded == nil {
		return nil, errNoSuchJob
	}
	j := new(Job)
	if err := json.Unmarshal(encoded, j); err != nil {
		return nil, fmt.Errorf("the job %q is damaged: %w", id, err)
	}
	return j, nil
}

func (b *jobBuckets) put(j *Job) error {
	encoded, err := encodeJSON(j)
	if err != nil {
		return err
	}
	return b.records.Put([]byte(j.ID), encoded)
}

func (b *jobBuckets) create(j *Job, body []byte) error {
	if err := b.put(j); err != nil {
		return err
	}
	if err := b.bodies.Put([]byte(j.ID), body); err != nil {
		return err
	}
	return b.open.Put([]byte(j.ID), nil)
}

// end ends a job that has not ended.
func (b *jobBuckets) end(j *Job, end *JobEnd) error {
	j.Status, j.Ended = end.Status, end.Event.Time
	result := end.Response
	if end.Status == JobFailed {
		result = end.Error
	}
	if len(result) > 0 {
		if err := b.results.Put([]byte(j.ID), result); err != nil {
			return err
		}
	}
	return b.close(j, end)
}

// close notes what a job that has ended cost, and deletes what it was made of.
func (b *jobBuckets) close(j *Job, end *JobEnd) error {
	j.Request = nil
	if err := b.put(j); err != nil {
		return err
	}
	event, err := encodeJSON(&end.Event)
	if err != nil {
		return err
	}
	id := []byte(j.ID)
	for _, err := range []error{
		b.bodies.Delete(id), b.open.Delete(id), b.owed.Put(id, event), b.expiry.Put(expiryKey(j.Ended.Add(j.Retention), j.ID), nil),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func expiryKey(at time.Time, id string) []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(at.UnixNano())), id...)
}

// readResult adds the result of a job that has one.
func (b *jobBuckets) readResult(j *Job) {
	result := bytes.Clone(b.results.Get([]byte(j.ID)))
	switch j.Status {
	case JobCompleted:
		j.Response = result
	case JobFailed:
		j.Error = result
	}
}

// deleteExpired deletes up to a number of jobs that are past their time.
func (b *jobBuckets) deleteExpired(now time.Time, most int) (deleted int, err error) {
	var keys [][]byte
	end := expiryKey(now, "")
	cursor := b.expiry.Cursor()
	for key, _ := cursor.First(); key != nil && bytes.Compare(key, end) < 0 && len(keys) < most; key, _ = cursor.Next() {
		keys = append(keys, bytes.Clone(key))
	}
	for _, key := range keys {
		id := key[8:]
		for _, err := range []error{b.expiry.Delete(key), b.results.Delete(id), b.records.Delete(id)} {
			if err != nil {
				return 0, err
			}
		}
	}
	return len(keys), nil
}

// loadJobs has the jobs of an earlier process wait again, and hold of their keys' limits what they held then. Those that
// it was running are among them. What had ended and may not be in the ledger is settled.
func (s *localStore) loadJobs() error {
	if err := s.prepareJobs(); err != nil {
		return err
	}
	var waiting []*Job
	var owed []Event
	var ids []string
	err := guard(func() error {
		return s.database.bolt.Update(func(tx *bbolt.Tx) error {
			b := jobBucketsOf(tx)
			if err := b.reopen(&waiting, s.now()); err != nil {
				return err
			}
			return b.owed.ForEach(func(id, encoded []byte) error {
				var e Event
				if err := json.Unmarshal(encoded, &e); err != nil {
					return fmt.Errorf("the event of job %q is damaged: %w", id, err)
				}
				owed, ids = append(owed, e), append(ids, string(id))
				return nil
			})
		})
	})
	if err != nil {
		return err
	}
	if err := s.settleOwed(owed); err != nil {
		return err
	}
	s.jobs.settled = ids
	for _, j := range waiting {
		a := j.admission()
		account := s.account(a.KeyID)
		account.mu.Lock()
		account.begin(a, false)
		account.mu.Unlock()
		q := s.jobs.queue(j.Queue)
		q.waiting = append(q.waiting, j.ID)
		q.call()
	}
	return nil
}

// settleOwed settles those events that the ledger does not have.
func (s *localStore) settleOwed(owed []Event) error {
	events := make([]settledEvent, len(owed))
	for i := range owed {
		events[i].requestID = owed[i].RequestID
	}
	entered, err := s.database.has(events)
	if err != nil {
		return err
	}
	for i, e := range owed {
		if !entered[i] {
			s.Settle(e)
		}
	}
	return nil
}

// reopen finds the jobs that are to be run. One that was cancelled while it ran, and whose run has not said what it cost,
// is charged by estimate.
func (b *jobBuckets) reopen(waiting *[]*Job, now time.Time) error {
	var ids []string
	err := b.open.ForEach(func(id, _ []byte) error {
		ids = append(ids, string(id))
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		j, err := b.get(id)
		if err != nil {
			return err
		}
		switch j.Status {
		case JobCancelled:
			end := j.unsaid(now)
			err = b.close(j, &end)
		case JobInProgress:
			j.Status, j.Started = JobQueued, time.Time{}
			err = b.put(j)
			fallthrough
		default:
			*waiting = append(*waiting, j)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
