package mesh

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

//go:embed redis_jobs.lua
var jobsLua string

// redisJobs are the jobs that instances share. All of a queue has one hash tag: the stream `<prefix>:{jobs:<queue>}:stream`,
// of which a consumer group gives each entry to one instance; the sorted set `waiting`; and a hash for each job.
//
// Until it is settled, a job is pending under its own name and not under that of the instance which admitted it: as long as
// the hash is there, the reaper leaves it alone.
type redisJobs struct {
	client redis.UniversalClient // has more time than the store's own: bodies and results are large

	mu     sync.Mutex
	queues map[string]*redisQueue
}

// redisQueue is what this instance knows of a queue.
type redisQueue struct {
	wake      chan struct{} // a job has been submitted here
	looking   chan struct{} // has one in it while a worker looks for a job: one of them is enough
	nextClaim time.Time     // when to look for jobs of instances that died; is guarded by redisJobs.mu
}

const (
	jobTransfer = 30 * time.Second // of a body or a result
	jobsTag     = "jobs:"
	jobHolder   = "job:" // begins what stands in place of an instance in a pending entry
)

func newRedisJobs(options redis.UniversalOptions) redisJobs {
	options.ReadTimeout = max(options.ReadTimeout, jobTransfer)
	options.WriteTimeout = options.ReadTimeout
	options.PoolTimeout = max(options.PoolTimeout, settleTimeout) // bodies keep connections for a while
	return redisJobs{client: redis.NewUniversalClient(&options), queues: make(map[string]*redisQueue)}
}

func (r *redisJobs) queue(name string) *redisQueue {
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.queues[name]
	if q == nil {
		q = &redisQueue{wake: make(chan struct{}, 1), looking: make(chan struct{}, 1)}
		r.queues[name] = q
	}
	return q
}

func (s *redisStore) jobKey(queue, name string) string { return s.key(jobsTag+queue, name) }

// holder stands in place of an instance in the pending entry of a job.
func (j *Job) holder() string { return jobHolder + j.Queue + ":" + j.ID }

// lifeSign returns the key that shows that the requests pending under a name are not lost, and whether that name is a
// job's.
func (s *redisStore) lifeSign(holder string) (key string, isJob bool) {
	name, isJob := strings.CutPrefix(holder, jobHolder)
	if !isJob {
		return s.shared("instance:" + holder), false
	}
	queue, id, _ := strings.Cut(name, ":")
	return s.jobKey(queue, "job:"+id), true
}

// jobScript runs a part of the script for one job. A timeout of 0 is for what is short.
func (s *redisStore) jobScript(timeout time.Duration, do, queue, id string, args ...any) (any, error) {
	keys := []string{s.jobKey(queue, "stream"), s.jobKey(queue, "waiting"), s.jobKey(queue, "job:"+id)}
	return s.jobEval(timeout, keys, append([]any{do}, args...))
}

func (s *redisStore) jobEval(timeout time.Duration, keys []string, args []any) (any, error) {
	ctx, cancel := s.jobContext(timeout)
	defer cancel()
	return s.jobs.client.Eval(ctx, jobsLua, keys, args...).Result()
}

// jobContext has what was begun end, whoever waits for it.
func (s *redisStore) jobContext(timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout == 0 {
		timeout = max(settleTimeout, s.timeout)
	}
	return context.WithTimeout(context.Background(), timeout)
}

func (s *redisStore) jobsFailed(err error) error {
	return fmt.Errorf("jobs in Redis: %w: %w", errUnavailable, err)
}

// errJobPlace is for a job that took longer to submit than its place was kept.
var errJobPlace = errors.New("the place in the queue is gone")

// SubmitJob takes a place in the queue, admits, and puts the job there, or gives back what it has taken. Without Redis there
// is no job, whatever on_failure says. Should this instance die in between, the place is given up after a minute, and then
// the admission, by the reaper.
func (s *redisStore) SubmitJob(ctx context.Context, a Admission, j *Job, body []byte, maxPending int64) (Verdict, error) {
	if s.degraded() {
		return Verdict{}, errRedisDown
	}
	reserved, err := s.jobScript(s.timeout, "reserve", j.Queue, j.ID, j.ID, maxPending)
	if err != nil {
		return Verdict{}, s.jobsFailed(err) // if there is a place after all, it runs out
	}
	if reserved != int64(1) {
		return Verdict{Refused: LimitQueue}, nil
	}
	verdict, err := s.Admit(ctx, a)
	if err != nil || verdict.Refused != "" {
		s.withdrawJob(j) // or it runs out
		return verdict, err
	}
	if err := s.enqueueJob(j, body); err != nil {
		return s.undoSubmit(a, j, verdict, s.jobsFailed(err))
	}
	s.callWorkers(j.Queue)
	return verdict, nil
}

func (s *redisStore) enqueueJob(j *Job, body []byte) error {
	about := *j
	about.Status, about.Request = "", nil
	encoded, err := encodeJSON(&about)
	if err != nil {
		return err
	}
	request, err := encodeJSON(j.Request)
	if err != nil {
		return err
	}
	queued, err := s.jobScript(jobTransfer, "enqueue", j.Queue, j.ID, j.ID, encoded, request, body)
	if err == nil && queued != int64(1) {
		err = errJobPlace
	}
	return err
}

// undoSubmit is for a job that may be in the queue, and should not be. If that cannot be said, it is left to itself: if it
// is there it is run, and else the reaper undoes the admission.
func (s *redisStore) undoSubmit(a Admission, j *Job, verdict Verdict, cause error) (Verdict, error) {
	gone, err := s.withdrawJob(j)
	switch {
	case err != nil:
		return Verdict{}, cause
	case gone:
		s.void(a)
		return Verdict{}, cause
	}
	return verdict, nil // it has begun
}

// withdrawJob removes a job that has not begun.
func (s *redisStore) withdrawJob(j *Job) (gone bool, err error) {
	reply, err := s.jobScript(0, "withdraw", j.Queue, j.ID, j.ID)
	return reply == int64(1), err
}

func (s *redisStore) callWorkers(queue string) {
	select {
	case s.jobs.queue(queue).wake <- struct{}{}:
	default: // they have been called already
	}
}

// GetJob reads the job's hash.
func (s *redisStore) GetJob(_ context.Context, queue, id string) (*Job, error) {
	j, err := s.readJob(queue, id)
	if err != nil {
		return nil, err
	}
	j.Request = nil
	return j, nil
}

func (s *redisStore) readJob(queue, id string) (*Job, error) {
	if s.degraded() {
		return nil, errRedisDown
	}
	ctx, cancel := s.jobContext(jobTransfer)
	defer cancel()
	names := []string{"status", "job", "request", "started", "ended", "response", "error", "runs"}
	values, err := s.jobs.client.HMGet(ctx, s.jobKey(queue, "job:"+id), names...).Result()
	if err != nil {
		return nil, s.jobsFailed(err)
	}
	fields := make(map[string]string, len(names))
	for i, value := range values {
		fields[names[i]], _ = value.(string)
	}
	j, err := decodeJob(fields)
	if err != nil {
		return nil, fmt.Errorf("the job %s is damaged: %w", id, err)
	}
	if j == nil || j.gone(s.now()) {
		return nil, errNoSuchJob
	}
	return j, nil
}

// decodeJob returns the job of a hash, or nil where it is none yet.
func decodeJob(fields map[string]string) (*Job, error) {
	if fields["job"] == "" {
		return nil, nil
	}
	j := new(Job)
	if err := json.Unmarshal([]byte(fields["job"]), j); err != nil {
		return nil, err
	}
	if request := fields["request"]; request != "" {
		if err := json.Unmarshal([]byte(request), &j.Request); err != nil {
			return nil, err
		}
	}
	j.Status = JobStatus(fields["status"])
	j.Started, j.Ended = unixMilli(fields["started"]), unixMilli(fields["ended"])
	j.Runs, _ = strconv.Atoi(fields["runs"])
	bytesOf := func(name string) json.RawMessage {
		if fields[name] == "" {
			return nil
		}
		return json.RawMessage(fields[name])
	}
	j.Response, j.Error = bytesOf("response"), bytesOf("error")
	return j, nil
}

func unixMilli(text string) time.Time {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(n).UTC()
}

// CancelJob ends a job that waits. Who runs one hears of it at the next beat, and says what it cost.
func (s *redisStore) CancelJob(_ context.Context, queue, id string) (*Job, error) {
	j, err := s.readJob(queue, id)
	if err != nil || j.Request == nil {
		return j, err
	}
	end := j.cancelled(s.now())
	if err := s.closeJob(j, end); err != nil {
		return nil, err
	}
	return s.GetJob(context.Background(), queue, id)
}

// closeJob ends a job that has not begun.
func (s *redisStore) closeJob(j *Job, end JobEnd) error {
	event, err := encodeEvent(&end.Event)
	if err != nil {
		return err
	}
	before, err := s.jobScript(0, "close", j.Queue, j.ID, j.ID, string(end.Status), []byte(end.Error), event)
	switch {
	case errors.Is(err, redis.Nil):
		return errNoSuchJob
	case err != nil:
		return s.jobsFailed(err)
	case before == string(JobQueued):
		s.settleJob(j, end.Event)
	}
	return nil
}

// settleJob settles a job that has ended and lets it rest. What does not succeed is done by whoever finds the job's entry in
// the stream. The event goes through the writer too, which knows what to do where Redis forgets it.
func (s *redisStore) settleJob(j *Job, e Event) {
	s.Settle(e)
	ctx, cancel := s.jobContext(0)
	defer cancel()
	_, err := s.enterOne(ctx, settlement{Kind: settleEvent, Event: e})
	if err != nil && !isScriptFault(err) { // of which the writer speaks
		return
	}
	left := j.Retention - max(0, s.now().Sub(e.Time))
	s.jobScript(0, "settled", j.Queue, j.ID, j.ID, max(1, seconds(left))) //nolint:errcheck // see above
}

// WaitingJobs asks Redis, and counts those that are about to come, too.
func (s *redisStore) WaitingJobs(ctx context.Context, queue string) (int64, error) {
	if s.degraded() {
		return 0, errRedisDown
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	return s.jobs.client.ZCard(ctx, s.jobKey(queue, "waiting")).Result()
}

// SweepJobs ends the jobs that have waited for too long, and gives up places whose job did not come.
func (s *redisStore) SweepJobs(ctx context.Context, queue string) error {
	if s.degraded() {
		return errRedisDown
	}
	const some, young = 500, 2 * time.Minute
	now := s.now()
	ids, err := s.waitingSince(queue, now.Add(-min(young, maxJobWait)), some)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if ctx.Err() != nil {
			return nil
		}
		j, err := s.readJob(queue, id)
		switch {
		case errors.Is(err, errNoSuchJob):
			err = s.leavePlace(queue, id)
		case err == nil && j.Status == JobQueued && now.Sub(j.Created) >= maxJobWait:
			err = s.closeJob(j, j.abandoned(errJobExpired, now))
		}
		if err != nil && !errors.Is(err, errNoSuchJob) {
			return err
		}
	}
	return nil
}

func (s *redisStore) waitingSince(queue string, since time.Time, most int64) ([]string, error) {
	ctx, cancel := s.jobContext(0)
	defer cancel()
	ids, err := s.jobs.client.ZRangeByScore(ctx, s.jobKey(queue, "waiting"), &redis.ZRangeBy{
		Min: "-inf", Max: strconv.FormatInt(since.UnixMilli(), 10), Count: most,
	}).Result()
	if err != nil {
		return nil, s.jobsFailed(err)
	}
	return ids, nil
}

// leavePlace gives up a place in the queue that no job has.
func (s *redisStore) leavePlace(queue, id string) error {
	ctx, cancel := s.jobContext(0)
	defer cancel()
	if err := s.jobs.client.ZRem(ctx, s.jobKey(queue, "waiting"), id).Err(); err != nil {
		return s.jobsFailed(err)
	}
	return nil
}

var _ JobStore = (*redisStore)(nil)
