package mesh

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

// localJobs are the jobs of a local store as far as they are in memory: which wait, in order, and which run. All else,
// bodies above all, is in the database, which also decides: every change of a job is one synced transaction.
type localJobs struct {
	mu      sync.Mutex // held for memory only
	queues  map[string]*localQueue
	running map[string]*JobRun
	settled []string // jobs whose event has been settled, and may not have been committed yet
}

// localQueue are the jobs that wait.
type localQueue struct {
	waiting []string
	places  int64         // for those that are being submitted
	wake    chan struct{} // there may be one that waits
}

// queue returns the queue of a name. The caller holds l.mu.
func (l *localJobs) queue(name string) *localQueue {
	if l.queues == nil {
		l.queues, l.running = make(map[string]*localQueue), make(map[string]*JobRun)
	}
	q := l.queues[name]
	if q == nil {
		q = &localQueue{wake: make(chan struct{}, 1)}
		l.queues[name] = q
	}
	return q
}

// reserve keeps a place for a job, unless there is none.
func (l *localJobs) reserve(queue string, most int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue(queue)
	if int64(len(q.waiting))+q.places >= most {
		return false
	}
	q.places++
	return true
}

// leave gives a place back.
func (l *localJobs) leave(queue string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue(queue).places--
}

// enter has a job wait in the place that was kept for it.
func (l *localJobs) enter(queue, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue(queue)
	q.places--
	q.waiting = append(q.waiting, id)
	q.call()
}

// putBack has a job wait before all others.
func (l *localJobs) putBack(queue, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, id)
	q := l.queue(queue)
	q.waiting = slices.Insert(q.waiting, 0, id)
	q.call()
}

func (q *localQueue) call() {
	select {
	case q.wake <- struct{}{}:
	default: // it has been called already
	}
}

// callAnother is for one who asks no more, and may have been called.
func (l *localJobs) callAnother(queue string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue(queue).call()
}

// next returns the job that has waited the longest, as one that runs; else a channel that says when to ask again.
func (l *localJobs) next(queue string) (id string, run *JobRun, wake <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue(queue)
	if len(q.waiting) == 0 {
		return "", nil, q.wake
	}
	id, q.waiting = q.waiting[0], q.waiting[1:]
	if len(q.waiting) > 0 {
		q.call() // others may wait for one
	}
	run = newJobRun(nil, nil)
	l.running[id] = run
	return id, run, nil
}

// over forgets a job that has ended.
func (l *localJobs) over(queue, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, id)
	q := l.queue(queue)
	if i := slices.Index(q.waiting, id); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	}
}

func (l *localJobs) cancel(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if run := l.running[id]; run != nil {
		run.stop(errJobCancelled)
	}
}

// SubmitJob takes a place in the queue, admits, and commits the job, or gives back what it has taken.
func (s *localStore) SubmitJob(ctx context.Context, a Admission, j *Job, body []byte, maxPending int64) (Verdict, error) {
	if !s.jobs.reserve(j.Queue, maxPending) {
		return Verdict{Refused: LimitQueue}, nil
	}
	now := s.now()
	verdict, err := s.Admit(ctx, a)
	if err != nil || verdict.Refused != "" {
		s.jobs.leave(j.Queue)
		return verdict, err
	}
	if err := s.changeJobs(func(b *jobBuckets) error { return b.create(j, body) }); err != nil {
		s.jobs.leave(j.Queue)
		s.withdraw(a, now)
		return Verdict{}, fmt.Errorf("writing a job to the database: %w", err)
	}
	s.jobs.enter(j.Queue, j.ID)
	return verdict, nil
}

// withdraw takes an admission back.
func (s *localStore) withdraw(a Admission, at time.Time) {
	account := s.account(a.KeyID)
	account.mu.Lock()
	account.withdraw(a, at)
	news := account.change()
	account.mu.Unlock()
	if news {
		s.tellWriter(account)
	}
}

// withdraw takes back what admit did at a time. The caller holds a.mu.
func (a *account) withdraw(asked Admission, at time.Time) {
	a.reserved.release(asked.RequestID)
	a.underWay.end(asked.RequestID)
	if asked.Uncounted {
		return
	}
	one := func(t tally, start int64) tally { return t.take(tally{Start: start, Sum: 1}) }
	a.balance.Minute, a.balance.Day = one(a.balance.Minute, minuteOf(at)), one(a.balance.Day, dayOf(at))
}

// WaitingJobs counts them.
func (s *localStore) WaitingJobs(_ context.Context, queue string) (int64, error) {
	s.jobs.mu.Lock()
	defer s.jobs.mu.Unlock()
	return int64(len(s.jobs.queue(queue).waiting)), nil
}

// GetJob reads the database.
func (s *localStore) GetJob(_ context.Context, queue, id string) (j *Job, err error) {
	err = s.viewJobs(func(b *jobBuckets) (err error) {
		if j, err = b.get(id); err == nil {
			b.readResult(j)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if j.Queue != queue || j.gone(s.now()) {
		return nil, errNoSuchJob
	}
	return j, nil
}

// CancelJob ends a job that waits. One that runs is stopped, and its run says what it cost.
func (s *localStore) CancelJob(_ context.Context, queue, id string) (j *Job, err error) {
	var end *JobEnd
	runs := false
	err = s.changeJobs(func(b *jobBuckets) (err error) {
		end, runs = nil, false
		if j, err = b.get(id); err != nil {
			return err
		}
		switch {
		case j.Queue != queue:
			return errNoSuchJob
		case j.Status == JobQueued:
			cancelled := j.cancelled(s.now())
			end = &cancelled
			return b.end(j, end)
		case j.Status == JobInProgress:
			runs = true
			j.Status, j.Ended = JobCancelled, s.now().UTC()
			return errors.Join(b.bodies.Delete([]byte(id)), b.put(j))
		}
		b.readResult(j)
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case runs:
		s.jobs.cancel(id)
	case end != nil:
		s.settleJob(j, end)
	}
	return j, nil
}

// settleJob settles a job whose end has been committed.
func (s *localStore) settleJob(j *Job, end *JobEnd) {
	s.jobs.over(j.Queue, j.ID)
	s.Settle(end.Event)
	s.jobs.mu.Lock()
	defer s.jobs.mu.Unlock()
	s.jobs.settled = append(s.jobs.settled, j.ID)
}

// TakeJob takes the job that has waited the longest.
func (s *localStore) TakeJob(ctx context.Context, queue string) (*JobRun, error) {
	for ctx.Err() == nil {
		id, run, wake := s.jobs.next(queue)
		if run == nil {
			select {
			case <-wake:
			case <-ctx.Done():
			}
			continue
		}
		begun, err := s.beginJob(id, run)
		if err != nil {
			s.logger.Error("a job cannot be begun; it waits", zap.String("job", id), zap.Error(err))
			s.jobs.putBack(queue, id)
			select {
			case <-time.After(jobRetry):
			case <-ctx.Done():
			}
		}
		if begun {
			return run, nil
		}
	}
	s.jobs.callAnother(queue)
	return nil, ctx.Err()
}

// beginJob notes in the database that a job is begun, and reads its body. One that was begun too often ends instead.
func (s *localStore) beginJob(id string, run *JobRun) (begun bool, err error) {
	var j *Job
	var end *JobEnd
	err = s.changeJobs(func(b *jobBuckets) (err error) {
		begun, end = false, nil
		if j, err = b.get(id); err != nil || j.Status != JobQueued {
			return err
		}
		if j.Runs >= maxJobRuns {
			abandoned := j.abandoned(errJobDropped, s.now())
			end = &abandoned
			return b.end(j, end)
		}
		begun = true
		j.Status, j.Started, j.Runs = JobInProgress, s.now().UTC(), j.Runs+1
		run.Job, run.Body = j, slices.Clone(b.bodies.Get([]byte(id)))
		return b.put(j)
	})
	switch {
	case errors.Is(err, errNoSuchJob):
		return false, nil
	case err != nil:
		return false, err
	case end != nil:
		s.settleJob(j, end)
	case !begun:
		s.jobs.over(j.Queue, id)
	}
	return begun, nil
}

// KeepJobs does nothing: whoever runs a job is in this process.
func (s *localStore) KeepJobs(context.Context, string, []*JobRun) {}

// FinishJob commits the end of a job, unless it was cancelled: then only what it cost.
func (s *localStore) FinishJob(_ context.Context, run *JobRun, end JobEnd) error {
	var j *Job
	err := s.changeJobs(func(b *jobBuckets) (err error) {
		j, err = b.get(run.Job.ID)
		switch {
		case errors.Is(err, errNoSuchJob):
			return errJobLost
		case err != nil:
			return err
		case j.Status == JobCancelled && j.Request != nil:
			return b.close(j, &end)
		case j.Status != JobInProgress:
			return errJobLost
		}
		if end.Event.Time.IsZero() {
			end.Event.Time = s.now().UTC()
		}
		return b.end(j, &end)
	})
	if err != nil {
		return err
	}
	s.settleJob(j, &end)
	return nil
}

// ReturnJob has a job wait again, before all others.
func (s *localStore) ReturnJob(_ context.Context, run *JobRun) error {
	waits := false
	err := s.changeJobs(func(b *jobBuckets) error {
		waits = false
		j, err := b.get(run.Job.ID)
		if err != nil || j.Status != JobInProgress {
			return err
		}
		waits = true
		j.Status, j.Started, j.Runs = JobQueued, time.Time{}, j.Runs-1
		return b.put(j)
	})
	if waits && err == nil {
		s.jobs.putBack(run.Job.Queue, run.Job.ID)
	}
	return err
}

var _ JobStore = (*localStore)(nil)
