package mesh

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// served is how the hand-off ended.
type served struct {
	by      *candidate // nil where no candidate's answer went out
	outcome Outcome
	status  int
	usage   usage      // of the answer
	known   bool       // usage is what the upstream said
	told    bool       // usage is an estimate, and the client has been told it
	text    textSample // what the client was sent, for an estimate
	prompt  bool       // the prompt has reached an upstream that may charge for it
	refusal *apiError  // what the client must be told; nil where it has its answer, or has left

	errorCode string // of the error that a stream ended in
}

// maxStale is how many times one candidate is asked again because an idle connection turned out to be closed.
const maxStale = 2

var errOutOfTime = errors.New("the request's time ran out")

// handOff lets the candidates answer, one after another until one does. Once the first byte has gone out there is no
// second try.
func (x *exchange) handOff(store Store, req *chatRequest, candidates []candidate) *served {
	timeout := req.timeout
	if timeout == 0 {
		timeout = cmp.Or(x.limit, time.Duration(x.h.Timeout))
	}
	deadline := time.Now().Add(timeout)

	var failures []*failure
	final := false
	for i := 0; i < len(candidates) && !final; i++ {
		c := &candidates[i]
		probe, f := x.turn(store, c, i)
		if f != nil {
			x.note(c, f)
			failures = append(failures, f)
			continue
		}
		x.begin(c)
		at := attempt{place: i, probe: probe, last: !req.stream || !anyOpen(candidates[i+1:])}
		for _, a := range x.ask(store, req, candidates, at, deadline) {
			i = max(i, a.place)
			if s := x.ending(a, req); s != nil {
				return s
			}
			f := a.failure()
			f.requestID = requestIDOf(a.header)
			a.failed(f)
			x.logFailure(a.by, f)
			x.note(a.by, f)
			failures = append(failures, f)
			final = final || !f.retriable
		}
	}
	if x.event.Attempts == 0 {
		x.countAs(&candidates[0])
	}
	x.tellAttempts()
	refusal := tell(failures)
	for _, f := range failures {
		if f.tell == refusal && f.requestID != "" {
			x.w.Header().Set(upstreamRequestID, f.requestID)
		}
	}
	return &served{outcome: OutcomeError, refusal: refusal}
}

// countAs has metrics count a request that nobody was asked as one of a candidate.
func (x *exchange) countAs(c *candidate) {
	x.series = c.series
	if x.series != nil {
		x.series.resolve()
	}
}

// ask lets a candidate answer; where its model has a hedge, the next one too. An answer that goes out comes last.
func (x *exchange) ask(store Store, req *chatRequest, candidates []candidate, at attempt, deadline time.Time) []*answer {
	c := &candidates[at.place]
	if c.hedge > 0 && anyOpen(candidates[at.place+1:]) {
		return x.hedged(store, req, candidates, at, deadline)
	}
	x.only[0] = x.try(req, c, at, deadline)
	return x.only[:]
}

// begin notes that a candidate is being asked.
func (x *exchange) begin(c *candidate) {
	x.gate.lock()
	defer x.gate.unlock()
	x.asking.Lock()
	defer x.asking.Unlock()
	x.event.Upstream = c.upstream.Name // an answer's header may be made of it
	x.event.Attempts++
}

// ending returns how the request ended with an attempt, or nil where others may follow.
func (x *exchange) ending(a *answer, req *chatRequest) *served {
	switch {
	case a.committed:
		x.event.TTFT, x.trace = a.ttft, a.trace
		if len(x.event.Tried) > 0 {
			x.logFallback(a.by)
		}
		return a.ended(a.served())
	case a.lost:
		return nil
	case x.r.Context().Err() != nil || a.clientGone:
		return a.ended(x.clientLeft(a))
	case a.timedOut:
		return a.ended(x.outOfTime(a, req.timeout != 0))
	case a.stopped():
		x.tellAttempts()
		return a.ended(&served{outcome: OutcomeError, refusal: errEnding})
	}
	return nil
}

// attempt is what is special about asking one candidate.
type attempt struct {
	race   *race           // nil where it is the only one that is asked
	ctx    context.Context // the request's, of its own
	quit   context.Context // ends when another has won the race
	runner int             // its place in the race

	in *inAttempt // nil for a job

	place int  // of it, among the candidates
	probe bool // it finds out whether the upstream is back
	last  bool // nobody else could be asked
}

// turn reports whether it is a candidate's turn, and whether asking it is a probe. If it may not be asked, it says why.
func (x *exchange) turn(store Store, c *candidate, place int) (probe bool, f *failure) {
	circuit, rules, now := c.upstream.circuit(c.as), c.upstream.rules, time.Now()
	if f := circuit.mayAsk(now, rules); f != nil {
		return false, f
	}
	if place > 0 && x.overCap(store, c) {
		return false, overCap()
	}
	return circuit.take(now, rules)
}

// anyOpen reports whether one of the candidates could be asked.
func anyOpen(candidates []candidate) bool {
	for i := range candidates {
		c := &candidates[i]
		if c.upstream.circuit(c.as).mayAsk(time.Now(), c.upstream.rules) == nil {
			return true
		}
	}
	return false
}

const clientClosedRequest = 499 // nginx's, and reverse_proxy's, number for the access log

// clientLeft ends a request whose client left before the first byte of an answer.
func (x *exchange) clientLeft(a *answer) *served {
	if !x.gate.close() {
		x.w.WriteHeader(clientClosedRequest)
	}
	failed := a.status >= 300 && a.status != clientClosedRequest
	return &served{by: a.by, outcome: OutcomeClientGone, status: clientClosedRequest, prompt: a.sent && !failed}
}

// outOfTime ends a request whose time ran out before an answer. If the limit was its own, that is as if the client
// had left: it pays for what the upstream had begun.
func (x *exchange) outOfTime(a *answer, own bool) *served {
	x.tellAttempts()
	x.logFailure(a.by, &failure{cause: errOutOfTime, retriable: true})
	s := &served{outcome: OutcomeTimeout, refusal: errTimeout}
	if own {
		s.by, s.prompt = a.by, a.sent
	}
	return s
}

func (x *exchange) tellAttempts() {
	x.gate.close() // its header is not shared any more
	x.w.Header().Set("X-Mesh-Routing-Attempts", strconv.Itoa(x.event.Attempts))
}

func (x *exchange) logFailure(c *candidate, f *failure) {
	level := zapcore.WarnLevel
	if !f.retriable {
		level = zapcore.DebugLevel // the request's own fault
	}
	x.h.logger.Log(level, "upstream attempt failed",
		zap.String("request_id", x.event.RequestID),
		zap.String("model", c.model),
		zap.String("upstream", c.upstream.Name),
		zap.Int("status", f.status),
		zap.Bool("retriable", f.retriable),
		zap.Error(f.cause))
}

// stopped reports whether the end of the process has ended the attempt.
func (a *attempt) stopped() bool { return a.in != nil && a.in.ended.Load() }

// try lets one candidate answer. A kept-alive connection that the upstream had closed meanwhile is not its fault:
// then it is asked again.
func (x *exchange) try(req *chatRequest, c *candidate, at attempt, deadline time.Time) *answer {
	ctx, trace := x.r.Context(), x.trace
	if at.race != nil {
		ctx, trace = at.ctx, x.trace.beside()
	}
	ctx, cancel := c.upstream.OnHangup.attempt(ctx, deadline)
	defer cancel()
	if x.expanded == nil { // a job is not ended, but waits again
		in := inHand.begin(cancel)
		defer inHand.over(in)
		at.in = in
	}
	if at.race != nil {
		var leave context.CancelFunc
		ctx, leave = at.join(ctx)
		defer leave()
	}
	var wait *firstByteWait
	if limit := cmp.Or(c.firstByte, time.Duration(x.h.FirstByteTimeout)); limit > 0 {
		var giveUp context.CancelCauseFunc
		ctx, giveUp, wait = waitFor(ctx, limit)
		defer giveUp(nil)
		defer wait.heard() // ends the timer
	}
	ctx = trace.beginAttempt(ctx, c)
	began := time.Now()
	for stale := 0; ; stale++ {
		a := newAnswer(x, req, c)
		a.attempt, a.wait, a.asked, a.trace = at, wait, began, trace
		a.err = a.from(ctx)
		cause := context.Cause(ctx)
		a.timedOut, a.gaveUp = cause == errOutOfTime, cause == errNoFirstByte
		a.lost = a.lost || cause == errLost
		a.finish()
		if stale == maxStale || ctx.Err() != nil || !a.wasStale() {
			return a
		}
	}
}

// from lets the candidate's handler answer into a. A panic with http.ErrAbortHandler is how reverse_proxy says that
// an answer broke off after its header; any other goes on.
func (a *answer) from(ctx context.Context) (err error) {
	defer a.end()
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			err = errBrokenOff
		default:
			panic(p)
		}
	}()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:      func(info httptrace.GotConnInfo) { a.reused.Store(info.Reused) },
		WroteHeaders: func() { a.reached.Store(true) },
	})
	out := a.by.upstream.outbound(ctx, a.x.r, a.req.path())
	a.trace.propagate(ctx, out.Header)
	parts, size := a.req.segmentsFor(a.by)
	out.ContentLength = size
	out.Header.Set("Content-Length", strconv.FormatInt(size, 10))
	out.Body = &segmentReader{parts: parts}
	out.GetBody = a.body
	return a.by.upstream.handler.ServeHTTP(a, out, noAnswer)
}

// body is the request's body once more, for net/http to send on a new connection where the upstream had closed a
// kept-alive one. It does not hold on to the bytes.
func (a *answer) body() (io.ReadCloser, error) {
	parts, _ := a.req.segmentsFor(a.by)
	return &segmentReader{parts: parts}, nil
}

var noAnswer = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
	return caddyhttp.Error(http.StatusBadGateway, errors.New("the upstream's handler did not answer"))
})

var errBrokenOff = errors.New("the upstream's answer broke off")

// wasStale reports whether nothing came of the attempt because it went out on a connection that had been idle, and
// that the upstream had closed.
func (a *answer) wasStale() bool {
	if a.status != 0 || a.err == nil || !a.reused.Load() {
		return false
	}
	return errors.Is(a.err, io.EOF) || errors.Is(a.err, io.ErrUnexpectedEOF) ||
		errors.Is(a.err, syscall.ECONNRESET) || errors.Is(a.err, syscall.EPIPE) || isServerClosedIdle(a.err)
}

// isServerClosedIdle recognises an error that net/http does not export.
func isServerClosedIdle(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if err.Error() == "http: server closed idle connection" {
			return true
		}
	}
	return false
}
