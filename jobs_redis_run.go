package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// Variables, so that tests need not wait.
var (
	jobPoll = 200 * time.Millisecond // between looks at a queue that was empty

	// jobLease is after what time without a sign of the run a job is another's to run.
	jobLease = 10 * time.Second
)

const (
	jobGroup    = "workers"
	jobConsumer = "gateway" // as redis_jobs.lua has it
)

// TakeJob looks for a job again and again: first for one whose instance has died, then for one that nobody has run.
func (s *redisStore) TakeJob(ctx context.Context, queue string) (*JobRun, error) {
	q := s.jobs.queue(queue)
	select {
	case q.looking <- struct{}{}:
		defer func() { <-q.looking }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	failing := trouble{message: "Redis refuses to give jobs; none is run here"}
	for ctx.Err() == nil {
		run, more, err := s.takeJob(queue, q)
		if run != nil {
			return run, nil
		}
		pause := around(jobPoll)
		if err != nil {
			pause = around(jobRetry)
			s.claimLater(q)
		}
		if err == nil || !isNetwork(err) && !errors.Is(err, errRedisDown) {
			failing.note(s.logger, err)
		}
		if more && err == nil {
			continue
		}
		select {
		case <-time.After(pause):
		case <-q.wake:
		case <-ctx.Done():
		}
	}
	return nil, ctx.Err()
}

// claimLater is for a Redis that was away. Whoever could not reach it either gets the time of a lease to show up.
func (s *redisStore) claimLater(q *redisQueue) {
	s.jobs.mu.Lock()
	defer s.jobs.mu.Unlock()
	q.nextClaim = time.Now().Add(jobLease)
}

// claims reports whether to look for jobs of instances that died. It is not asked for again for a while.
func (s *redisStore) claims(q *redisQueue) bool {
	s.jobs.mu.Lock()
	defer s.jobs.mu.Unlock()
	now := time.Now()
	if now.Before(q.nextClaim) {
		return false
	}
	q.nextClaim = now.Add(around(jobLease / 3))
	return true
}

// takeJob takes a job if there is one. more says that it makes sense to look again at once.
func (s *redisStore) takeJob(queue string, q *redisQueue) (run *JobRun, more bool, err error) {
	if s.degraded() {
		return nil, false, errRedisDown
	}
	var message *redis.XMessage
	if s.claims(q) {
		if message, err = s.claimJob(queue); err != nil {
			return nil, false, err
		}
		if message != nil {
			s.jobs.mu.Lock()
			q.nextClaim = time.Time{} // there may be others
			s.jobs.mu.Unlock()
		}
	}
	if message == nil {
		if message, err = s.readNextJob(queue); message == nil || err != nil {
			return nil, false, err
		}
	}
	id, _ := message.Values["job"].(string)
	run, err = s.beginJob(queue, id, message.ID)
	return run, true, err
}

// readNextJob returns an entry that no instance has been given yet, or nil.
func (s *redisStore) readNextJob(queue string) (*redis.XMessage, error) {
	ctx, cancel := s.jobContext(0)
	defer cancel()
	streams, err := s.jobs.client.XReadGroup(ctx, &redis.XReadGroupArgs{
		Group: jobGroup, Consumer: jobConsumer, Streams: []string{s.jobKey(queue, "stream"), ">"}, Count: 1, Block: -1,
	}).Result()
	if errors.Is(err, redis.Nil) || redis.HasErrorPrefix(err, "NOGROUP") { // there has been no job
		return nil, nil
	}
	if err != nil || len(streams) == 0 || len(streams[0].Messages) == 0 {
		return nil, err
	}
	return &streams[0].Messages[0], nil
}

// claimJob returns an entry whose run has given no sign for a lease, or nil.
func (s *redisStore) claimJob(queue string) (*redis.XMessage, error) {
	ctx, cancel := s.jobContext(0)
	defer cancel()
	const page = 100
	stream, from := s.jobKey(queue, "stream"), "-"
	for {
		given, err := s.jobs.client.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: stream, Group: jobGroup, Start: from, End: "+", Count: page}).Result()
		if errors.Is(err, redis.Nil) || redis.HasErrorPrefix(err, "NOGROUP") {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		for _, one := range given {
			if one.Idle < jobLease {
				continue
			}
			claimed, err := s.jobs.client.XClaim(ctx, &redis.XClaimArgs{
				Stream: stream, Group: jobGroup, Consumer: jobConsumer, MinIdle: jobLease, Messages: []string{one.ID},
			}).Result()
			if err != nil && !errors.Is(err, redis.Nil) {
				return nil, err
			}
			if len(claimed) > 0 { // else another was faster
				return &claimed[0], nil
			}
		}
		if len(given) < page {
			return nil, nil
		}
		from = streamAfter(given[len(given)-1].ID)
	}
}

// streamAfter returns the first id that can come after one of a stream.
func streamAfter(id string) string {
	var ms, n uint64
	fmt.Sscanf(id, "%d-%d", &ms, &n) //nolint:errcheck // it is Redis's own
	return fmt.Sprintf("%d-%d", ms, n+1)
}

// beginJob takes the job of an entry. One that has ended is settled, by whoever comes by.
func (s *redisStore) beginJob(queue, id, entry string) (*JobRun, error) {
	run := newJobRun(nil, nil)
	run.entry = entry
	reply, err := s.jobScript(jobTransfer, "take", queue, id, id, entry, run.token)
	if err != nil {
		return nil, err
	}
	said, ok := texts(reply)
	if !ok || said[0] != "gone" && len(said) != 7 {
		return nil, answerError("jobs", reply)
	}
	if said[0] == "gone" {
		return nil, nil
	}
	j, err := decodeJob(map[string]string{"status": said[1], "job": said[2], "request": said[3], "runs": said[5]})
	if err == nil && j == nil {
		err = errNoSuchJob
	}
	if err != nil {
		return nil, fmt.Errorf("the job %s is damaged: %w", id, err)
	}
	run.Job, run.Body = j, []byte(said[4])
	switch {
	case said[0] == "ended" && said[6] != "":
		var e Event
		if err := json.Unmarshal([]byte(said[6]), &e); err != nil {
			return nil, fmt.Errorf("the event of job %s is damaged: %w", id, err)
		}
		s.settleJob(j, e)
	case said[0] == "ended" && j.Request != nil: // it was cancelled, and its run did not live to say what it cost
		return nil, s.FinishJob(context.Background(), run, j.unsaid(s.now()))
	case said[0] == "ended": // and settled
		_, err := s.jobScript(0, "settled", queue, id, id, max(1, seconds(j.Retention)))
		return nil, err
	case j.Runs > maxJobRuns:
		return nil, s.FinishJob(context.Background(), run, j.abandoned(errJobDropped, s.now()))
	default:
		return run, nil
	}
	return nil, nil
}

// texts returns the strings of a list that is not empty.
func texts(reply any) (list []string, ok bool) {
	values, _ := reply.([]any)
	for _, value := range values {
		text, isText := value.(string)
		if !isText {
			return nil, false
		}
		list = append(list, text)
	}
	return list, len(list) > 0
}

// KeepJobs renews the leases. Where that does not succeed for too long, another instance runs the job, and this one hears
// of it as soon as it can.
func (s *redisStore) KeepJobs(_ context.Context, queue string, runs []*JobRun) {
	if s.degraded() {
		return
	}
	keys, args := []string{s.jobKey(queue, "stream"), s.jobKey(queue, "waiting")}, []any{"renew"}
	for _, run := range runs {
		keys = append(keys, s.jobKey(queue, "job:"+run.Job.ID))
		args = append(args, run.token, run.entry)
	}
	reply, err := s.jobEval(0, keys, args)
	said, ok := reply.([]any)
	if err != nil || !ok || len(said) != len(runs) {
		s.logger.Debug("leases of jobs are not renewed", zap.Error(err))
		return
	}
	for i, run := range runs {
		switch said[i] {
		case int64(0):
			run.stop(errJobLost)
		case int64(2):
			run.stop(errJobCancelled)
		}
	}
}

// FinishJob records the end, if the job is still this run's, and settles it.
func (s *redisStore) FinishJob(_ context.Context, run *JobRun, end JobEnd) error {
	if s.degraded() {
		return errRedisDown
	}
	event, err := end.Event.finish(s.now)
	if err != nil {
		return err
	}
	done, err := s.jobScript(jobTransfer, "finish", run.Job.Queue, run.Job.ID,
		run.token, string(end.Status), []byte(end.Response), []byte(end.Error), event)
	switch {
	case err != nil:
		return s.jobsFailed(err)
	case done != int64(1):
		return errJobLost
	}
	s.settleJob(run.Job, end.Event)
	return nil
}

// ReturnJob has a job wait again, behind all others.
func (s *redisStore) ReturnJob(_ context.Context, run *JobRun) error {
	if s.degraded() {
		return errRedisDown
	}
	_, err := s.jobScript(0, "giveback", run.Job.Queue, run.Job.ID, run.Job.ID, run.token)
	if err != nil {
		return s.jobsFailed(err)
	}
	return nil
}
