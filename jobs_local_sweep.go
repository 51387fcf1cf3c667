package mesh

import (
	"context"
	"errors"
)

// SweepJobs ends jobs that have waited too long, and deletes those that have ended long enough ago.
// It does so in all queues: one may have nobody else any more.
func (s *localStore) SweepJobs(context.Context, string) error {
	return errors.Join(s.expireJobs(), s.forgetSettledJobs(), s.deleteJobs())
}

// waitingJobs returns the jobs that wait, in all queues.
func (l *localJobs) waitingJobs() (ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, q := range l.queues {
		ids = append(ids, q.waiting...)
	}
	return ids
}

func (s *localStore) expireJobs() error {
	for _, id := range s.jobs.waitingJobs() {
		began, _ := requestBegan(id)
		if s.now().Sub(began) < maxJobWait {
			continue // those that were returned come first, and may be younger
		}
		var j *Job
		var end *JobEnd
		err := s.changeJobs(func(b *jobBuckets) (err error) {
			end = nil
			if j, err = b.get(id); err != nil || j.Status != JobQueued {
				return err
			}
			expired := j.abandoned(errJobExpired, s.now())
			end = &expired
			return b.end(j, end)
		})
		if err != nil {
			return err
		}
		if end != nil {
			s.settleJob(j, end)
		}
	}
	return nil
}

// forgetSettledJobs deletes events that are in the ledger by now.
func (s *localStore) forgetSettledJobs() error {
	s.jobs.mu.Lock()
	settled := s.jobs.settled
	s.jobs.settled = nil
	s.jobs.mu.Unlock()
	if len(settled) == 0 {
		return nil
	}
	err := s.flush()
	if err == nil {
		err = s.changeJobs(func(b *jobBuckets) (err error) {
			for _, id := range settled {
				err = errors.Join(err, b.owed.Delete([]byte(id)))
			}
			return err
		})
	}
	if err != nil {
		s.jobs.mu.Lock()
		s.jobs.settled = append(settled, s.jobs.settled...)
		s.jobs.mu.Unlock()
	}
	return err
}

// deleteJobs deletes what is past its time, some at once: a body that comes meanwhile is not to wait for long.
func (s *localStore) deleteJobs() error {
	const some = 200
	for deleted := some; deleted == some; {
		err := s.changeJobs(func(b *jobBuckets) (err error) {
			deleted, err = b.deleteExpired(s.now(), some)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
