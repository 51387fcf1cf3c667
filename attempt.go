package mesh

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// result is how an upstream did when it was asked.
type result string

const (
	resultAnswered   result = "answered"    // whole
	resultRefused    result = "refused"     // it says that the request is at fault, or that it does not have the model
	resultBusy       result = "busy"        // it said 429
	resultFailed     result = "failed"      // it could not be reached, failed, made no sense, or took no credentials
	resultTimeout    result = "timeout"     // the request's time ran out first
	resultCut        result = "cut"         // it broke off in the middle of its answer
	resultClientGone result = "client_gone" // the client left first
	resultLost       result = "lost"        // a hedge: another upstream was faster
)

var results = []result{
	resultAnswered, resultRefused, resultBusy, resultFailed, resultTimeout, resultCut, resultClientGone, resultLost,
}

// ended takes in how an attempt went after which no other is made, and returns s.
func (a *answer) ended(s *served) *served {
	own := a.req.timeout != 0
	r := resultAnswered
	switch s.outcome {
	case OutcomeClientGone:
		r = resultClientGone
	case OutcomeTimeout:
		r = resultTimeout
	case OutcomeCut:
		r = resultCut
	case OutcomeError: // in a stream's event
		r = resultRefused
		if s.errorCode == errCut.code {
			r = resultFailed
		}
	}
	if a.stopped() { // which says nothing of the upstream either
		r = resultClientGone
	}
	a.x.attempted(a, r, nil)
	if r != resultClientGone && !(r == resultTimeout && own) { // a client that gives up early says nothing of the upstream
		a.by.upstream.health.note(r)
	}
	sign := signAlive
	switch {
	case r == resultClientGone, r == resultTimeout && own:
		sign = signNone
	case r == resultTimeout, r == resultCut, r == resultFailed:
		sign = signFailed
	}
	a.tellCircuit(sign)
	return s
}

// failed takes in how an attempt went that came to nothing.
func (a *answer) failed(f *failure) {
	if a.lost {
		a.x.attempted(a, resultLost, nil)
		a.tellCircuit(signNone)
		return
	}
	r := resultFailed
	switch status := f.tell.status; {
	case status == http.StatusTooManyRequests:
		r = resultBusy
	case status == http.StatusGatewayTimeout:
		r = resultTimeout
	case status < 500:
		r = resultRefused
	}
	a.x.attempted(a, r, f.cause)
	a.by.upstream.health.note(r)
	sign := signAlive
	if !f.credentials && (r == resultFailed || r == resultTimeout) {
		sign = signFailed
	}
	if r == resultBusy {
		a.by.upstream.circuit(a.by.as).restFor(time.Now(), f.tell.retryAfter)
	}
	a.tellCircuit(sign)
}

// tellCircuit says how the attempt went to those that come after it.
func (a *answer) tellCircuit(s sign) {
	u := a.by.upstream
	if !u.circuit(a.by.as).note(time.Now(), u.rules, s, a.probe) {
		return
	}
	logger := a.x.h.logger.With(zap.String("upstream", u.Name), zap.String("model_there", a.by.as))
	if s == signAlive {
		logger.Info("upstream answers again")
		return
	}
	logger.Warn("upstream is left alone for a while: it has failed too often", zap.Duration("rest", time.Duration(u.rules.Rest)))
}

// attempted counts an attempt. cause, if there is more to say than r, is for the trace.
func (x *exchange) attempted(a *answer, r result, cause error) {
	a.trace.endAttempt(a.status, r, cause)
	x.series = a.by.series
	if x.series == nil {
		return
	}
	x.series.resolve()
	x.series.attempts[r].Inc()
}

// upstreamHealth knows whether an upstream answers. It outlives a configuration as long as the next one has the same
// upstream.
type upstreamHealth struct {
	name     string
	failures atomic.Int32 // in a row
	down     atomic.Bool  // so said the last event
	circuits circuits
}

// maxUpstreamFailures is how many failures in a row take an upstream down.
const maxUpstreamFailures = 5

// healths has those of all upstreams, by what identifies them.
var healths = caddy.NewUsagePool()

// note takes in how an attempt went.
func (h *upstreamHealth) note(r result) {
	if h == nil {
		return
	}
	switch r {
	case resultFailed, resultTimeout, resultCut:
		if h.failures.Add(1) >= maxUpstreamFailures && h.down.CompareAndSwap(false, true) {
			notices.emit(eventUpstreamDown, map[string]any{"upstream": h.name, "failures": maxUpstreamFailures, "result": string(r)})
		}
		return
	}
	if h.failures.Load() == 0 && !h.down.Load() {
		return
	}
	h.failures.Store(0)
	if h.down.CompareAndSwap(true, false) {
		notices.emit(eventUpstreamUp, map[string]any{"upstream": h.name})
	}
}

// Destruct is for the pool.
func (h *upstreamHealth) Destruct() error {
	h.circuits.forget()
	return nil
}

// shareHealth is for provisioning, before Caddy takes the handler's JSON away.
func (u *Upstream) shareHealth() {
	key := digestText(u.Name, u.BasePath, string(u.HandlerRaw))
	health, _, err := healths.LoadOrNew(key, func() (caddy.Destructor, error) { return &upstreamHealth{name: u.Name}, nil })
	if err == nil { // it cannot fail
		u.health, u.healthKey = health.(*upstreamHealth), key
	}
}

// leaveHealth ends what shareHealth began, if it did. Requests under way may still use it.
func (u *Upstream) leaveHealth() {
	if u == nil || u.healthKey == "" {
		return
	}
	key := u.healthKey
	u.healthKey = ""
	healths.Delete(key) //nolint:errcheck // Destruct does not fail
}
