package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/oklog/ulid/v2"
)

// JobStore is a Store that keeps jobs. A job that was confirmed is durable, and ends once: with one result and one entry in the
// ledger, however often it was run.
type JobStore interface {
	Store

	// SubmitJob admits a request and queues it as a job: both or neither. A verdict with LimitQueue says that as many as
	// maxPending are waiting in its queue.
	SubmitJob(ctx context.Context, a Admission, j *Job, body []byte, maxPending int64) (Verdict, error)

	// GetJob returns a job of a queue with its result, or errNoSuchJob.
	GetJob(ctx context.Context, queue, id string) (*Job, error)

	// CancelJob ends a job that has not ended, and has the one who runs it know. It returns the job as it is then.
	CancelJob(ctx context.Context, queue, id string) (*Job, error)

	// TakeJob waits for a job to run. It returns an error only when ctx has ended.
	TakeJob(ctx context.Context, queue string) (*JobRun, error)

	// KeepJobs says that the jobs are still being run, and ends the context of those that are not this instance's to run any
	// more. It is called every jobBeat.
	KeepJobs(ctx context.Context, queue string, runs []*JobRun)

	// FinishJob records the end of a job, once, and settles it. errJobLost means that it is not this run's to end.
	FinishJob(ctx context.Context, run *JobRun, end JobEnd) error

	// ReturnJob has a job that was taken wait again.
	ReturnJob(ctx context.Context, run *JobRun) error

	// WaitingJobs returns how many jobs of a queue wait to be run.
	WaitingJobs(ctx context.Context, queue string) (int64, error)

	// SweepJobs ends the jobs that have waited for longer than maxJobWait, and removes what is past its time. It is called
	// every jobSweep.
	SweepJobs(ctx context.Context, queue string) error
}

// Variables, so that tests need not wait.
var (
	jobBeat    = time.Second
	jobSweep   = 10 * time.Second
	maxJobWait = 24 * time.Hour
)

// maxJobRuns is how often a job is begun. One whose gateway dies each time is most likely the reason.
const maxJobRuns = 5

// JobStatus says where a job is.
type JobStatus string

// The statuses there are.
const (
	JobQueued     JobStatus = "queued"
	JobInProgress JobStatus = "in_progress"
	JobCompleted  JobStatus = "completed"
	JobFailed     JobStatus = "failed"
	JobCancelled  JobStatus = "cancelled"
)

func (s JobStatus) ended() bool { return s != JobQueued && s != JobInProgress }

// Job is a request that is answered later.
type Job struct {
	ID        string        `json:"id"`
	Queue     string        `json:"queue"`
	Scope     string        `json:"scope"` // whose it is, as that of a template
	RequestID string        `json:"request_id"`
	Model     string        `json:"model"`
	Created   time.Time     `json:"created_at"`
	Retention time.Duration `json:"retention_ns"` // after its end

	Status  JobStatus `json:"status,omitempty"`
	Started time.Time `json:"started_at,omitzero"` // the last time
	Ended   time.Time `json:"ended_at,omitzero"`
	Runs    int       `json:"runs,omitempty"` // how often it was begun and not given back

	Request *JobRequest `json:"request,omitempty"` // until it is settled

	Response json.RawMessage `json:"-"`
	Error    json.RawMessage `json:"-"`
}

// JobRequest is what is needed to run a job as at its submit, beside the body.
type JobRequest struct {
	KeyID         string      `json:"key_id"`
	Key           Key         `json:"key"` // without the secret
	Header        http.Header `json:"header,omitempty"`
	RemoteAddr    string      `json:"remote_addr,omitempty"`
	TemplateModel string      `json:"template_model,omitempty"` // of the template that is in the body by now
	MaxCost       Money       `json:"max_cost_usd,omitempty"`
	Pending       Event       `json:"pending"` // the entry if nobody knows what it cost
}

// key returns the key as it was at the submit.
func (r *JobRequest) key() *Key {
	key := r.Key
	key.id = r.KeyID
	return &key
}

// admission is what the job holds of its key's limits until it is settled.
func (j *Job) admission() Admission {
	key := j.Request.key()
	return Admission{KeyID: key.id, RequestID: j.RequestID, Limits: key.limits(), MaxCost: j.Request.MaxCost}
}

// JobRun is a job that this instance runs.
type JobRun struct {
	Job  *Job
	Body []byte

	ctx  context.Context // ends when it is to be stopped; its cause says why
	stop context.CancelCauseFunc

	endDrain context.CancelFunc // nobody waits any more for what comes of it after that

	token string // shows that the run is this one
	entry string // of the job in a stream
}

func newJobRun(j *Job, body []byte) *JobRun {
	run := &JobRun{Job: j, Body: body, token: ulid.Make().String()}
	var ctx context.Context
	ctx, run.endDrain = drainable(context.Background())
	run.ctx, run.stop = context.WithCancelCause(ctx)
	return run
}

// halt stops it because the process ends, which does not wait for answers that are drained.
func (run *JobRun) halt() {
	run.endDrain()
	run.stop(errJobHalted)
}

// JobEnd is how a job ended.
type JobEnd struct {
	Status   JobStatus
	Response json.RawMessage
	Error    json.RawMessage
	Event    Event // the ledger's entry
}

var (
	errNoSuchJob    = errors.New("there is no such job")
	errJobLost      = errors.New("the job is not this run's any more")
	errJobCancelled = errors.New("the job was cancelled")
	errJobHalted    = errors.New("the gateway ends")
)

// The ends of jobs that come to no answer of an upstream's.
var (
	errJobExpired = errorf(http.StatusGatewayTimeout, "job_expired", "The job has waited too long to be run.")
	errJobDropped = errorf(http.StatusInternalServerError, "job_abandoned", "The gateway ended again and again while it ran the job.")
	errJobPanic   = errorf(http.StatusInternalServerError, "internal_error", "The gateway failed to run the job.")
)

// abandoned is the end of a job that nobody is to run any more. If it was begun, it is charged by estimate.
func (j *Job) abandoned(why *apiError, now time.Time) JobEnd {
	e := j.Request.Pending
	if j.Runs == 0 {
		e = j.uncharged()
		e.Outcome = OutcomeTimeout
	}
	e.Time, e.Status, e.Error = now.UTC(), why.status, why.code
	return JobEnd{Status: JobFailed, Error: why.object(), Event: e}
}

// cancelled is the end of a job that was not begun.
func (j *Job) cancelled(now time.Time) JobEnd {
	e := j.uncharged()
	e.Time, e.Status, e.Outcome = now.UTC(), clientClosedRequest, OutcomeClientGone
	return JobEnd{Status: JobCancelled, Event: e}
}

// unsaid is the end of a job that was cancelled, and whose run did not live to say what it cost. It is charged by estimate.
func (j *Job) unsaid(now time.Time) JobEnd {
	e := j.Request.Pending
	e.Time, e.Status = now.UTC(), clientClosedRequest
	return JobEnd{Status: JobCancelled, Event: e}
}

// uncharged is the entry of a job that no upstream was asked for.
func (j *Job) uncharged() Event {
	e := j.Request.Pending
	e.PromptTokens, e.CompletionTokens, e.Cost, e.MaxCost, e.Estimated = 0, 0, 0, 0, false
	return e
}

// object returns e as it stands in the envelope of errors.
func (e *apiError) object() json.RawMessage {
	taker := &answerTaker{header: make(http.Header)}
	var envelope struct{ Error json.RawMessage }
	if e.write(taker, "") != nil || json.Unmarshal(taker.body.Bytes(), &envelope) != nil {
		return nil
	}
	return envelope.Error
}

// gone reports whether a job that has ended is past its time.
func (j *Job) gone(now time.Time) bool {
	return j.Status.ended() && now.Sub(j.Ended) >= j.Retention
}

// jobView is a job as its owner sees it.
type jobView struct {
	ID        string          `json:"id"`
	Object    string          `json:"object"`
	Status    JobStatus       `json:"status"`
	Created   int64           `json:"created"`
	Started   int64           `json:"started,omitempty"`
	Ended     int64           `json:"ended,omitempty"`
	Model     string          `json:"model"`
	RequestID string          `json:"request_id"`
	Response  json.RawMessage `json:"response,omitempty"`
	Error     json.RawMessage `json:"error,omitempty"`
}

func (j *Job) view() jobView {
	unix := func(t time.Time) int64 {
		if t.IsZero() {
			return 0
		}
		return t.Unix()
	}
	return jobView{
		ID: j.ID, Object: "chat.completion.job", Status: j.Status, Created: j.Created.Unix(), Started: unix(j.Started), Ended: unix(j.Ended),
		Model: j.Model, RequestID: j.RequestID, Response: j.Response, Error: j.Error,
	}
}
