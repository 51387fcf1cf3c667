package mesh

import (
	"cmp"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	chatPrefix = "/v1/chat/"
	chatPath   = chatPrefix + "completions"
	modelsPath = "/v1/models"
)

// endpoint is what serves a path, by method.
type endpoint struct {
	get, post, patch, delete func(*exchange) *apiError
}

var (
	chatEndpoint      = endpoint{post: (*exchange).chat}
	compareEndpoint   = endpoint{post: (*exchange).compare}
	modelsEndpoint    = endpoint{get: (*exchange).listModels}
	selectEndpoint    = endpoint{post: (*exchange).selectModel}
	freeEndpoint      = endpoint{get: (*exchange).listFreeModels}
	paidEndpoint      = endpoint{get: (*exchange).listPaidModels}
	searchEndpoint    = endpoint{get: (*exchange).searchModels}
	modelEndpoint     = endpoint{get: (*exchange).getModel}
	usageEndpoint     = endpoint{post: (*exchange).reportUsage}
	eventsEndpoint    = endpoint{post: (*exchange).listEvents}
	requestEndpoint   = endpoint{get: (*exchange).getEvent}
	standingEndpoint  = endpoint{get: (*exchange).getStanding}
	templatesEndpoint = endpoint{get: (*exchange).listTemplates, post: (*exchange).createTemplate}
	jobEndpoint       = endpoint{get: (*exchange).getJob, delete: (*exchange).cancelJob}
	templateEndpoint  = endpoint{get: (*exchange).getTemplate, patch: (*exchange).updateTemplate, delete: (*exchange).deleteTemplate}
)

// findEndpoint returns what serves a path; nil where that is not the gateway's.
func findEndpoint(path string) *endpoint {
	switch {
	case path == chatPath:
		return &chatEndpoint
	case path == comparePath:
		return &compareEndpoint
	case path == selectPath:
		return &selectEndpoint
	case path == jobsPath, strings.HasPrefix(path, jobsPath+"/"):
		return &jobEndpoint
	case path == modelsPath:
		return &modelsEndpoint
	case path == modelsPath+"/free":
		return &freeEndpoint
	case path == modelsPath+"/paid":
		return &paidEndpoint
	case path == modelsPath+"/search":
		return &searchEndpoint
	case strings.HasPrefix(path, modelsPath+"/"):
		return &modelEndpoint
	case strings.HasPrefix(path, usagePath):
		return findUsageEndpoint(path)
	case path == templatesPath:
		return &templatesEndpoint
	case strings.HasPrefix(path, templatesPath+"/"):
		return &templateEndpoint
	}
	return nil
}

func findUsageEndpoint(path string) *endpoint {
	switch {
	case path == usagePath:
		return &usageEndpoint
	case path == eventsPath:
		return &eventsEndpoint
	case path == standingPath:
		return &standingEndpoint
	case strings.HasPrefix(path, requestsPath):
		return &requestEndpoint
	}
	return nil
}

// method returns what serves a method, or nil.
func (e *endpoint) method(name string) func(*exchange) *apiError {
	switch name {
	case http.MethodPost:
		return e.post
	case http.MethodGet:
		return e.get
	case http.MethodPatch:
		return e.patch
	case http.MethodDelete:
		return e.delete
	}
	return nil
}

// wrongMethod is the error for a method that the endpoint does not have.
func (e *endpoint) wrongMethod() *apiError {
	var allowed []string
	for _, name := range []string{http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete} {
		if e.method(name) != nil {
			allowed = append(allowed, name)
		}
	}
	allow := strings.Join(allowed, ", ")
	refusal := errorf(http.StatusMethodNotAllowed, "method_not_allowed", "This endpoint answers %s only.", allow)
	refusal.allow = allow
	return refusal
}

// exchange is one request on its way through the gateway, and what is known of it so far.
type exchange struct {
	h *Handler
	w http.ResponseWriter
	r *http.Request

	started time.Time
	waited  time.Duration // for the store to find the key
	taken   bool          // the body was read
	limit   time.Duration // of an upstream's answer; 0: the handler's
	key     *Key
	event   Event // as far as it is known; the ledger gets it only if the request was admitted

	auto *autoRoute // nil where the client has chosen the model

	asking sync.Mutex // of the event's Upstream and Attempts, while two candidates are asked

	refusal *apiError // that the client got; nil where none

	uncounted bool // it is part of a request that was counted
	inHand    bool // it holds the store
	keeps     bool // it is the part by which the request was counted, and takes its place for all of them
	sum       bool // the event only sums up what has been counted

	series  *targetSeries    // the metrics of the last upstream that was asked
	streams prometheus.Gauge // counts the stream as open, once it is
	trace   *requestTrace
	gate    *gate // of a stream: keeps its client company until it begins
	silent  bool  // it has no client that waits

	expanded *JobRequest // of a job: its template and defaults are in the body

	only [1]*answer // of the one candidate that is asked
}

func (h *Handler) newExchange(w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{h: h, w: w, r: r, started: time.Now()}
	x.event.RequestID = "req_" + ulid.Make().String()
	x.event.Outcome = outcomeRefused
	w.Header().Set("X-Request-Id", x.event.RequestID)
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(x.placeholder)
	}
	return x
}

// authenticate finds the key of the request.
func (x *exchange) authenticate() *apiError {
	secret, ok := bearer(x.r)
	if !ok {
		return noBearer(x.r)
	}
	began := time.Now()
	key, err := x.h.findKey(x.r.Context(), secret)
	now := time.Now()
	x.waited = now.Sub(began)
	if err != nil {
		return x.storeFailed(err)
	}
	if key != nil {
		x.key = key
		x.event.KeyID, x.event.KeyName, x.event.Owner = key.id, key.Name, key.Owner
	}
	return key.refusal(now)
}

// meshClient reports whether the client is one written for the Mesh API.
func (x *exchange) meshClient() bool { return x.r.Header.Get("X-Meshapi-Sdk") != "" }

// chat serves POST /v1/chat/completions.
func (x *exchange) chat() *apiError {
	x.traceChat()
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	body, refusal := readBody(x.w, x.r, x.h.MaxBodySize)
	if refusal != nil {
		return refusal
	}
	x.taken = true
	req, candidates, refusal := x.prepare(body)
	if refusal != nil {
		return refusal
	}
	x.trace.request(req, &x.event, &candidates[0])
	store, err := x.acquire()
	if err != nil {
		return x.storeFailed(err)
	}
	defer x.h.releaseStore()
	if req.async {
		return x.submit(store, req, candidates)
	}
	if refusal := x.admit(store, req, candidates); refusal != nil {
		return refusal
	}
	return x.run(store, req, candidates)
}

// prepare reads and checks a chat completion's body, and finds who may serve it.
func (x *exchange) prepare(body []byte) (*chatRequest, []candidate, *apiError) {
	req, refusal := parseChat(body)
	if refusal != nil {
		return nil, nil, refusal
	}
	req.includeUsage = req.includeUsage || x.meshClient()
	x.event.SessionID, x.event.Stream = req.sessionID, req.stream
	if refusal := x.expand(req); refusal != nil {
		return nil, nil, refusal
	}
	candidates, refusal := x.route(req)
	return req, candidates, refusal
}

// run hands off a request that was admitted, and settles it.
func (x *exchange) run(store Store, req *chatRequest, candidates []candidate) *apiError {
	served := &served{outcome: OutcomeError} // if the hand-off panics: what was admitted is settled, whatever comes
	defer func() { x.settle(store, req, served) }()
	if req.stream {
		req.keepSample()
		x.gate = x.openGate(req)
		defer x.gate.close()
	}
	served = x.serve(store, req, candidates)
	x.tellInStream(served)
	return served.refusal
}

// serve hands off a request, to whom the gateway chooses where the client has not.
func (x *exchange) serve(store Store, req *chatRequest, candidates []candidate) *served {
	if x.auto != nil {
		chosen := x.choose(store, req)
		if chosen == nil {
			x.countAs(&candidates[0])
			return &served{outcome: OutcomeTimeout, refusal: errTimeout}
		}
		candidates = chosen
	}
	return x.handOff(store, req, candidates)
}

// storeFailed is the answer where the store could not say. An outage is the store's to log, and every request's error:
// of those only the debug log has each, as of any refusal.
func (x *exchange) storeFailed(err error) *apiError {
	if !errors.Is(err, errUnavailable) {
		x.h.store.faults.note(x.h.logger, x.event.RequestID, err)
	}
	e := *errStoreUnavailable
	e.cause, e.retryAfter = err, time.Second
	return &e
}

func (h *Handler) releaseStore() {
	if err := h.store.release(); err != nil {
		h.logger.Error("closing store", zap.Error(err))
	}
}

// answer writes a whole JSON answer of the gateway's own.
func (x *exchange) answer(v any) *apiError { return x.answerWith(http.StatusOK, v) }

func (x *exchange) answerWith(status int, v any) *apiError {
	x.event.Outcome = OutcomeCompleted
	if err := writeJSON(x.w, status, v); err != nil {
		x.h.logger.Debug("client did not take the answer", zap.Error(err))
	}
	return nil
}

// locate tells the client where to find what its request has made: under the prefix that it asks for the gateway with, and
// that `handle_path` has taken off.
func (x *exchange) locate(path string) {
	prefix := ""
	if original, ok := x.r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		before, stripped := strings.CutSuffix(original.URL.EscapedPath(), x.r.URL.EscapedPath())
		if before = strings.Trim(before, "/"); stripped && before != "" { // two slashes would begin the name of a host
			prefix = "/" + before
		}
	}
	x.w.Header().Set("Location", prefix+path)
}

// refuse writes an error to the client: the one place that does.
func (x *exchange) refuse(e *apiError) error {
	x.event.Status, x.event.Error, x.refusal = e.status, e.code, e
	if c := x.h.logger.Check(zapcore.DebugLevel, "request refused"); c != nil {
		c.Write(zap.String("request_id", x.event.RequestID), zap.Int("status", e.status), zap.Error(e))
	}
	unread := x.bodyIsUnread()
	if unread {
		x.w.Header().Set("Connection", "close")
		http.NewResponseController(x.w).EnableFullDuplex() //nolint:errcheck // else what it has sent is lost, at worst
	}
	if err := e.write(x.w, x.event.RequestID); err != nil {
		x.h.logger.Debug("client did not take the error", zap.Error(err))
	} else if unread {
		x.linger()
	}
	return nil
}

// outcomeRefused is the outcome of a request that was not let through. The ledger never has it.
const outcomeRefused Outcome = "refused"

// placeholder returns the value of one of the {http.mesh.*} placeholders.
func (e *Event) placeholder(name string) (any, bool) {
	name, ok := strings.CutPrefix(name, "http.mesh.")
	if !ok {
		return nil, false
	}
	switch name {
	case "request_id":
		return e.RequestID, true
	case "key.id":
		return e.KeyID, true
	case "key.name":
		return e.KeyName, true
	case "key.owner":
		return e.Owner, true
	case "session_id":
		return e.SessionID, true
	case "model":
		return e.Model, true
	case "upstream":
		return e.Upstream, true
	case "attempts":
		return e.Attempts, true
	case "outcome":
		return string(e.Outcome), true
	case "error":
		return e.Error, true
	case "usage.prompt_tokens":
		return e.PromptTokens, true
	case "usage.cached_tokens":
		return e.CachedTokens, true
	case "usage.completion_tokens":
		return e.CompletionTokens, true
	case "usage.total_tokens":
		return e.PromptTokens + e.CompletionTokens, true
	case "usage.estimated":
		return e.Estimated, true
	case "cost":
		return e.Cost.String(), true
	}
	return nil, false
}

// log adds what is known of the request to its entry in the access log, if there is one.
func (x *exchange) log() {
	if server, ok := x.r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok && server.Logs == nil {
		return
	}
	if fields, ok := x.r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		fields.Set(zap.Object("mesh", x))
	}
}

// MarshalLogObject writes what the access log shows of the request. It says more of a refusal than the ledger does, which has
// none.
func (x *exchange) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if x.refusal == nil {
		return x.event.MarshalLogObject(enc)
	}
	e := x.event
	e.Model = cmp.Or(x.refusal.model, e.Model)
	if err := e.MarshalLogObject(enc); err != nil {
		return err
	}
	if x.refusal.reason != "" {
		enc.AddString("reason", x.refusal.reason)
	}
	if len(x.refusal.details) > 0 {
		if field := x.refusal.details[0].where(); field != "" {
			enc.AddString("field", field[:min(len(field), maxLoggedField)]) // may have names of the client's in it
		}
	}
	return nil
}

const maxLoggedField = 256 // bytes

// MarshalLogObject writes the event as the access log shows it.
func (e *Event) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	text := func(name, value string) {
		if value != "" {
			enc.AddString(name, value)
		}
	}
	text("request_id", e.RequestID)
	text("key", cmp.Or(e.KeyName, e.KeyID))
	text("owner", e.Owner)
	text("session_id", e.SessionID)
	text("model", e.Model)
	text("upstream", e.Upstream)
	text("outcome", string(e.Outcome))
	text("error", e.Error)
	if len(e.Tried) > 0 {
		enc.AddArray("tried", triedList(e.Tried)) //nolint:errcheck // triedList has none
	}
	if e.Attempts == 0 {
		return nil
	}
	enc.AddInt("attempts", e.Attempts)
	enc.AddBool("stream", e.Stream)
	enc.AddDuration("ttft", e.TTFT)
	enc.AddInt64("prompt_tokens", e.PromptTokens)
	enc.AddInt64("cached_tokens", e.CachedTokens)
	enc.AddInt64("completion_tokens", e.CompletionTokens)
	number := func(name string, n int64) {
		if n != 0 {
			enc.AddInt64(name, n)
		}
	}
	number("prompt_audio_tokens", e.PromptAudioTokens)
	number("completion_audio_tokens", e.CompletionAudioTokens)
	number("images", e.Images)
	enc.AddBool("estimated", e.Estimated)
	enc.AddString("cost_usd", e.Cost.String())
	return nil
}
