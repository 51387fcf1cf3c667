package mesh

import (
	"net/http"
	"runtime/debug"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// jobLedger is the store as a job's request sees it: what it used is kept until the end of the job is recorded, because
// another run of the job may be the one that counts.
type jobLedger struct {
	Store
	settled *Event
}

// Settle keeps the event. That of a classifier which chose the job's model is another request's: it has the same id in each run, so
// that the store charges for the first alone.
func (l *jobLedger) Settle(e Event) {
	if e.ParentID != "" {
		l.Store.Settle(e)
		return
	}
	l.settled = &e
}

// runJob makes the request of a job, as its client would have, and returns how it ended.
func (h *Handler) runJob(store Store, run *JobRun) (call *exchange, end JobEnd) {
	taker := &answerTaker{header: make(http.Header)}
	call = h.jobCall(run, taker)
	ledger := &jobLedger{Store: store}
	refusal := call.runJob(ledger, run)
	e := &call.event
	if most := h.async.maxResult; refusal == nil && e.Outcome == OutcomeCompleted && int64(taker.body.Len()) > most {
		refusal = errorf(http.StatusBadGateway, "result_too_large", "The answer has %d bytes, and that of a job may have %d.", taker.body.Len(), most)
		e.Outcome = OutcomeError // at the cost of the answer
	}
	if refusal != nil {
		e.Status, e.Error = refusal.status, refusal.code
	}
	if ledger.settled == nil { // it has not come to asking anybody
		e.Outcome, e.Time = OutcomeError, time.Now().UTC()
		e.Duration = e.Time.Sub(call.started)
	}
	end = JobEnd{Status: JobCompleted, Response: taker.body.Bytes(), Event: *e}
	if refusal == nil && e.Outcome != OutcomeCompleted {
		refusal = errorf(http.StatusBadGateway, "upstream_error", "The model's answer broke off.")
	}
	if refusal != nil {
		end.Status, end.Response, end.Error = JobFailed, nil, refusal.object()
	}
	h.logger.Debug("job ran", zap.String("job", run.Job.ID), zap.Object("mesh", e), zap.Error(asError(refusal)))
	return call, end
}

func asError(refusal *apiError) error {
	if refusal == nil {
		return nil
	}
	return refusal
}

// jobCall returns the exchange of a job's request. It comes from no server.
func (h *Handler) jobCall(run *JobRun, taker *answerTaker) *exchange {
	request := run.Job.Request
	r, _ := http.NewRequestWithContext(run.ctx, http.MethodPost, chatPath, nil) // a method and a path that are right
	r.RemoteAddr = request.RemoteAddr
	if request.Header != nil {
		r.Header = request.Header.Clone()
	}
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), taker, new(caddyhttp.Server))
	key := request.key()
	client := &exchange{h: h, w: taker, r: r, key: key}
	client.event.KeyID, client.event.KeyName, client.event.Owner = key.id, key.Name, key.Owner
	call := client.call(r.Context(), taker)
	call.event.RequestID = run.Job.RequestID
	call.event.Model = run.Job.Model
	call.expanded = request
	return call
}

// runJob makes the request. A panic of an upstream's handler ends the job and not the process.
func (x *exchange) runJob(store Store, run *JobRun) (refusal *apiError) {
	defer func() {
		if p := recover(); p != nil {
			x.h.logger.Error("a job panicked", zap.String("job", run.Job.ID), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			refusal = errJobPanic
		}
	}()
	req, candidates, refusal := x.prepare(run.Body)
	if refusal != nil {
		return refusal
	}
	return x.run(store, req, candidates)
}
