package mesh

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
)

const (
	jobsPath  = chatPrefix + "jobs"
	jobPrefix = "job_"
)

// errNoJobs is for a store that keeps none.
var errNoJobs = errorf(http.StatusServiceUnavailable, "store_unavailable", "The gateway's store keeps no jobs.")

// errQueueless is for a site that has no queue to itself: see (*App).settleQueues.
var errQueueless = &apiError{
	status: http.StatusUnprocessableEntity, code: "unprocessable_entity", param: "async_mode",
	message: "This site takes no jobs: it shares its store with other sites, and its configuration names no queue.",
}

// queuePause is after what time it makes sense to come again to a full queue.
const queuePause = 5 * time.Second

var errQueueFull = &apiError{
	status: http.StatusTooManyRequests, code: "rate_limit_exceeded", retryAfter: queuePause,
	message: "The gateway's queue of jobs is full. Try again in 5 s.",
}

// submission is a JobStore to which admitting a request is to queue it.
type submission struct {
	JobStore
	job  *Job
	body []byte
	most int64 // that may wait
}

// Admit submits the job.
func (s *submission) Admit(ctx context.Context, a Admission) (Verdict, error) {
	a.Job = s.job
	s.job.Request.Pending, s.job.Request.MaxCost = a.Pending, a.MaxCost
	return s.SubmitJob(ctx, a, s.job, s.body, s.most)
}

// submit queues a request as a job. It is admitted now.
func (x *exchange) submit(store Store, req *chatRequest, candidates []candidate) *apiError {
	jobs, ok := store.(JobStore)
	if !ok {
		return errNoJobs
	}
	if x.h.jobs.queueless.Load() {
		return errQueueless
	}
	model := candidates[0].model
	if x.auto != nil { // it is chosen when the job runs
		model = autoModel
	}
	job := x.newJob(req, model)
	s := &submission{JobStore: jobs, job: job, body: req.expanded(), most: x.h.async.maxPending}
	if refusal := x.admit(s, req, candidates); refusal != nil {
		return refusal
	}
	x.locate(jobsPath + "/" + job.ID)
	return x.answerWith(http.StatusAccepted, job.view())
}

func (x *exchange) newJob(req *chatRequest, model string) *Job {
	key := *x.key
	key.Secret = ""
	header := make(http.Header)
	for _, name := range passedOn {
		if values := x.r.Header[name]; len(values) > 0 {
			header[name] = values
		}
	}
	return &Job{
		ID:        jobPrefix + ulid.Make().String(),
		Queue:     x.h.async.queue,
		Scope:     string(x.key.templateScope()),
		RequestID: x.event.RequestID,
		Model:     model,
		Created:   time.Now().UTC().Truncate(time.Millisecond),
		Retention: x.h.async.retention,
		Status:    JobQueued,
		Request: &JobRequest{
			KeyID: key.id, Key: key, Header: header, RemoteAddr: x.r.RemoteAddr, TemplateModel: req.templateModel,
		},
	}
}

// expanded returns the body as the client would have sent it without a template or defaults: with what these bring. The
// job is to be what was asked for, whatever becomes of them.
func (r *chatRequest) expanded() []byte {
	var added []edit
	for _, e := range r.edits {
		if e.added {
			added = append(added, e)
		}
	}
	parts, _ := r.cut(added, "")
	return bytes.Join(parts, nil)
}

// getJob serves GET /v1/chat/jobs/{id}.
func (x *exchange) getJob() *apiError {
	return x.withJob(func(_ JobStore, job *Job) *apiError { return x.answer(job.view()) })
}

// cancelJob serves DELETE /v1/chat/jobs/{id}.
func (x *exchange) cancelJob() *apiError {
	return x.withJob(func(jobs JobStore, job *Job) *apiError {
		if job.Status.ended() {
			return x.answer(job.view())
		}
		job, err := jobs.CancelJob(x.r.Context(), job.Queue, job.ID)
		if err != nil {
			return x.jobFailed(err)
		}
		x.h.jobs.cancel(job.ID)
		return x.answer(job.view())
	})
}

// withJob calls answer with the job that the path names, if it is the owner's.
func (x *exchange) withJob(answer func(JobStore, *Job) *apiError) *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	id, ok := jobID(strings.TrimPrefix(x.r.URL.Path, jobsPath+"/"))
	if !ok {
		return errJobNotFound
	}
	store, err := x.h.store.acquire()
	if err != nil {
		return x.storeFailed(err)
	}
	defer x.h.releaseStore()
	jobs, ok := store.(JobStore)
	if !ok {
		return errNoJobs
	}
	job, err := jobs.GetJob(x.r.Context(), x.h.async.queue, id)
	if err != nil {
		return x.jobFailed(err)
	}
	if job.Scope != string(x.key.templateScope()) {
		return errJobNotFound
	}
	return answer(jobs, job)
}

var errJobNotFound = errorf(http.StatusNotFound, "not_found", "There is no such job.")

func (x *exchange) jobFailed(err error) *apiError {
	if errors.Is(err, errNoSuchJob) {
		return errJobNotFound
	}
	return x.storeFailed(err)
}

// jobID checks the form of an id, whose letters may be small.
func jobID(name string) (id string, ok bool) {
	encoded, ok := strings.CutPrefix(name, jobPrefix)
	if !ok {
		return "", false
	}
	parsed, err := ulid.ParseStrict(encoded)
	return jobPrefix + parsed.String(), err == nil
}
