package mesh

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// maxRefusal is how much of an upstream's error is read: reading a short one to its end keeps the connection
	// alive, a long one is not worth it.
	maxRefusal = 64 << 10

	// maxWhole is how long an answer that is not a stream may be. It is held back until it is whole.
	maxWhole = 64 << 20
)

var (
	errTooLong    = errors.New("the upstream's answer is too long")
	errUnreadable = errors.New("the upstream's answer is not what was asked for")
	errLast       = errors.New("the upstream's stream ended in an error")
)

// answer is the http.ResponseWriter that one candidate answers into. It keeps status line and header to itself until
// it is known whether this candidate's answer is the one: a stream is as soon as its header comes, any other answer
// when it has come whole. Everything else never reaches the client.
type answer struct {
	x   *exchange
	req *chatRequest
	by  *candidate

	attempt
	asked   time.Time // when the attempt began
	trace   *requestTrace
	ttft    time.Duration
	wait    *firstByteWait // nil where it may take its time
	hold    *held          // nil where nothing is held back
	company *company       // nil where nobody is pinged
	over    bool           // the upstream's handler has returned

	header http.Header // this candidate's own
	status int

	stream *stream      // where the answer is one
	whole  bytes.Buffer // where it is not, or an error
	images int64        // that were made for a request for images

	err        error // what the handler returned
	timedOut   bool  // the request's time ran out meanwhile
	gaveUp     bool  // it has not begun in time
	lost       bool  // another was faster
	fault      error // what is wrong with an answer of status 200
	committed  bool  // the client has received status and header
	clientGone bool
	unflushed  bool

	result served

	reused  atomic.Bool // it went out on a connection that had been idle
	reached atomic.Bool // it was sent to the upstream
	sent    bool        // reached, once the attempt is over
}

func newAnswer(x *exchange, req *chatRequest, by *candidate) *answer {
	return &answer{x: x, req: req, by: by, header: make(http.Header)}
}

// Header returns this candidate's header.
func (a *answer) Header() http.Header { return a.header }

// WriteHeader notes the status, and sends it on if it is that of a stream the client asked for.
func (a *answer) WriteHeader(status int) {
	if a.status != 0 || status < 200 {
		return // the 1xx of a candidate that may yet be refused is not the client's business
	}
	a.status = status
	if status >= 300 {
		a.wait.heard()
		return
	}
	isStream := mediaType(a.header) == "text/event-stream"
	encoding := a.header.Get("Content-Encoding")
	if !isStream {
		a.begun()
	}
	switch {
	case isStream && !a.req.wantsEvents(),
		encoding != "" && !strings.EqualFold(encoding, "identity"):
		a.fault = errUnreadable
	case isStream:
		a.stream = newStream(a)
		if !a.last || a.wait != nil {
			a.hold = &held{forContent: !a.last}
			return
		}
		a.commit()
	}
}

// Write takes the next bytes of the answer.
func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	switch {
	case a.fault != nil:
		return 0, a.fault
	case a.stream != nil:
		return a.stream.Write(p)
	}
	limit := maxWhole
	if a.status >= 300 {
		limit = maxRefusal
	}
	if a.whole.Len()+len(p) > limit {
		a.fault = errTooLong
		return 0, a.fault
	}
	return a.whole.Write(p)
}

// FlushError is what http.ResponseController looks for before it unwraps: a flush must not send the status line of
// an answer that is held back.
func (a *answer) FlushError() error {
	if a.hold != nil {
		a.hold.mu.Lock()
		defer a.hold.mu.Unlock()
	}
	return a.flush()
}

func (a *answer) flush() error {
	if !a.unflushed {
		return nil
	}
	a.unflushed = false
	if a.company != nil {
		return a.company.flush()
	}
	return http.NewResponseController(a.x.w).Flush()
}

// Unwrap lets http.ResponseController set deadlines.
func (a *answer) Unwrap() http.ResponseWriter { return a.x.w }

// toClient writes to the client. One that has left is no error while the answer is drained.
func (a *answer) toClient(p []byte) error {
	if a.hold == nil {
		return a.send(p)
	}
	a.hold.mu.Lock()
	defer a.hold.mu.Unlock()
	if !a.committed {
		return a.hold.keep(a, p)
	}
	return a.send(p)
}

func (a *answer) send(p []byte) error {
	if a.clientGone {
		return a.gone(context.Canceled)
	}
	if err := a.write(p); err != nil {
		a.clientGone = true
		return a.gone(err)
	}
	a.unflushed = true
	return nil
}

func (a *answer) write(p []byte) error {
	if a.company != nil {
		return a.company.write(p)
	}
	_, err := a.x.w.Write(p)
	return err
}

func (a *answer) gone(err error) error {
	if a.by.upstream.OnHangup.Policy == hangupDrain {
		return nil
	}
	return err
}

// commit makes this candidate's answer the one.
func (a *answer) commit() {
	begun := a.x.gate.close()
	a.committed, a.unflushed = true, true
	if a.stream != nil {
		a.x.opened(a.by)
		if a.probe { // others need not wait until it has ended
			a.tellCircuit(signAlive)
			a.probe = false
		}
		if a.race == nil {
			a.req.forget()
		}
		defer a.keepCompany()
	}
	if begun {
		return // with pings, and another header
	}
	header := a.x.w.Header()
	passHeader(header, a.header)
	header.Set("X-Mesh-Routing-Model", a.by.model)
	a.x.tellAttempts()
	header.Set("X-Mesh-Routing-Fallback", strconv.FormatBool(a.place > 0))
	if a.x.h.ExposeUpstream {
		header.Set("X-Mesh-Upstream", a.by.upstream.Name)
	}
	if a.stream != nil {
		streamHeader(header)
	}
	a.x.w.WriteHeader(a.status)
}

// served closes an answer that went out, whole or not.
func (a *answer) served() *served {
	s := &a.result
	s.by, s.status, s.prompt = a.by, a.status, true
	if a.stream != nil {
		s.outcome = a.stream.end()
		s.prompt = s.outcome != OutcomeError || a.stream.answered // an error alone is no answer
		a.logEnd()
	}
	return s
}

// logEnd says in the log how a stream ended that did not end well.
func (a *answer) logEnd() {
	outcome := a.result.outcome
	if outcome == OutcomeCompleted || outcome == OutcomeClientGone {
		return
	}
	a.x.h.logger.Warn("stream did not end well",
		zap.String("request_id", a.x.event.RequestID),
		zap.String("model", a.by.model),
		zap.String("upstream", a.by.upstream.Name),
		zap.String("outcome", string(outcome)),
		zap.String("error", a.result.errorCode))
}

// finish ends the attempt: an answer that was held back until it was whole goes out now, if it is one.
func (a *answer) finish() {
	a.sent = a.reached.Load()
	if a.stream != nil && !a.committed {
		return
	}
	if a.committed || a.err != nil || a.fault != nil || a.status < 200 || a.status >= 300 {
		return
	}
	body := a.whole.Bytes()
	if a.req.images != nil {
		if body = a.imagesBody(); a.req.stream {
			a.streamImages(body)
			return
		}
	}
	said := readAnswer(body, nil)
	said.usage.images = a.images
	if !said.readable || said.failed || a.req.wantsEvents() {
		a.fault = errUnreadable
		return
	}
	a.trace.read(body)
	a.result.usage, a.result.known = said.usage, said.hasUsage
	if !said.hasUsage {
		readAnswer(body, &a.result.text) // there will be an estimate
	}
	if !a.claim() {
		return
	}
	if a.x.auto != nil {
		body = a.x.auto.mark(body, said)
		said = said.anew(body)
	}
	insert, at, until := said.costEdit(a.by.price)
	a.header.Set("Content-Type", "application/json")
	a.x.w.Header().Set("Content-Length", strconv.Itoa(len(body)-(until-at)+len(insert)))
	a.result.outcome = OutcomeCompleted
	if a.x.r.Context().Err() != nil { // it left while the answer was drained
		a.result.outcome = OutcomeClientGone
	}
	a.commit()
	a.firstByte()
	for _, part := range [][]byte{body[:at], insert, body[until:]} {
		if len(part) > 0 && (a.toClient(part) != nil || a.clientGone) {
			a.result.outcome = OutcomeClientGone
			return
		}
	}
	if !a.result.known {
		a.FlushError() //nolint:errcheck // the client shall not wait for the estimate; if it is gone, it will not
	}
}

// begun notes that the upstream has begun to answer.
func (a *answer) begun() {
	a.wait.heard()
	a.race.heard()
	if a.by.measured {
		a.by.latency().note(time.Since(a.asked))
	}
}

// firstByte notes when the answer began.
func (a *answer) firstByte() {
	if a.ttft == 0 {
		a.ttft = time.Since(a.x.started)
	}
}
