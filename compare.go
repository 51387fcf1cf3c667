package mesh

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/oklog/ulid/v2"
)

const comparePath = chatPrefix + "compare"

// Compare sets up /v1/chat/compare.
type Compare struct {
	// The model that compares the answers, where the request names none. Default: default_model.
	Model string `json:"model,omitempty"`

	// What that model is told to do, where the request does not say it. Default: to judge accuracy, completeness and
	// clarity, and to recommend an answer.
	Instructions string `json:"instructions,omitempty"`

	// How many models a request may compare, at most 10. Default: 10.
	MaxModels int64 `json:"max_models,omitempty"`

	// How long each model may take, at most 2 minutes. Default: 2 minutes.
	Timeout caddy.Duration `json:"timeout,omitempty"`
}

// maxCompareTimeout is how long one model of a compare may take.
const maxCompareTimeout = 120 * time.Second

func (c *Compare) check(models modelTable) error {
	switch {
	case c.Model != "" && models.find(c.Model) == nil:
		return fmt.Errorf("compare: no model matches %s", c.Model)
	case c.MaxModels < 0 || c.MaxModels > maxComparedModels:
		return fmt.Errorf("compare: max_models is %d, and not from 1 to %d", c.MaxModels, maxComparedModels)
	case c.Timeout < 0 || time.Duration(c.Timeout) > maxCompareTimeout:
		return fmt.Errorf("compare: timeout is %s, and not up to %s", time.Duration(c.Timeout), maxCompareTimeout)
	}
	return nil
}

// comparison is one request to /v1/chat/compare on its way.
type comparison struct {
	x       *exchange
	ctx     context.Context
	id      string
	started time.Time
	req     *compareRequest
	limit   time.Duration // of each call
	calls   []*innerCall
	results []compareResult // in the order of the models

	pinging sync.WaitGroup

	judge    *innerCall   // the one that compared; nil where none did
	fallback bool         // and it was not the comparison model
	unjudged []*innerCall // those that were to compare, and could not
}

// compare serves POST /v1/chat/compare.
func (x *exchange) compare() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	body, refusal := readBody(x.w, x.r, x.h.MaxBodySize)
	if refusal != nil {
		return refusal
	}
	x.taken = true
	config := x.h.compareConfig()
	req, refusal := parseCompare(body, int(config.MaxModels))
	if refusal != nil {
		return refusal
	}
	x.event.SessionID, x.event.Stream = req.sessionID, req.stream
	req.instructions = cmp.Or(req.instructions, config.Instructions)
	ctx, cancel := context.WithCancel(x.r.Context())
	c := &comparison{
		x: x, ctx: ctx, req: req,
		id:      "cmp_" + ulid.Make().String(),
		started: time.Now(),
		limit:   min(time.Duration(config.Timeout), time.Duration(x.h.Timeout)),
	}
	defer func() {
		cancel() // what is left of it
		c.pinging.Wait()
	}()
	if refusal := c.prepare(config.Model); refusal != nil {
		return refusal
	}
	store, err := x.acquire()
	if err != nil {
		return x.storeFailed(err)
	}
	defer x.h.releaseStore()
	return c.serve(store)
}

// compareConfig returns what is configured, with its defaults.
func (h *Handler) compareConfig() Compare {
	var c Compare
	if h.Compare != nil {
		c = *h.Compare
	}
	c.Model = cmp.Or(c.Model, h.DefaultModel)
	c.Instructions = cmp.Or(c.Instructions, defaultInstructions)
	c.MaxModels = cmp.Or(c.MaxModels, maxComparedModels)
	c.Timeout = cmp.Or(c.Timeout, caddy.Duration(maxCompareTimeout))
	return c
}

// prepare makes all calls ready, so that what is wrong with one shows before any is made.
func (c *comparison) prepare(judge string) *apiError {
	for _, model := range c.req.models {
		call := c.newCall(model, c.req.bodyFor(model, c.req.stream && c.req.skip))
		if call.refusal != nil {
			if call.refusal.param == "model" { // of the call; the client has named it here
				call.refusal.param = "models"
			}
			return call.refusal
		}
		c.calls = append(c.calls, call)
	}
	if c.req.skip || len(c.calls) < 2 {
		return nil
	}
	c.req.prompt = c.calls[0].req.templateMessages()
	if c.req.judge != "" { // the configured one may fall back on another
		return c.mayUse(c.req.judge)
	}
	c.req.judge = judge
	return nil
}

func (c *comparison) mayUse(model string) *apiError {
	_, refusal := c.x.model(model)
	if refusal != nil {
		refusal.param = "comparison_model"
	}
	return refusal
}

// serve admits the comparison, which counts once, has all models answer, and one of them judge.
func (c *comparison) serve(store Store) *apiError {
	first := c.calls[0]
	first.x.w, first.x.keeps = c.x.w, true // its limits are those of the whole
	refusal := first.x.admit(store, first.req, first.candidates)
	first.x.w = first.taker
	if refusal != nil {
		return refusal
	}
	defer store.Leave(first.x.event.KeyID, first.x.event.RequestID)
	var out *compareStream
	if c.req.stream {
		out = c.openStream()
	}
	c.answerAll(store, out)
	if c.ctx.Err() != nil {
		c.finish(OutcomeClientGone)
		return nil
	}
	answered := c.answered()
	if len(answered) == 0 {
		c.finish(OutcomeError)
		return c.end(out, errAllFailed(c.results))
	}
	if len(answered) > 1 && !c.req.skip {
		c.compare(store, answered, out)
	}
	c.finish(OutcomeCompleted)
	return c.end(out, nil)
}

// end sends what remains to be sent.
func (c *comparison) end(out *compareStream, failed *apiError) *apiError {
	switch {
	case out == nil && failed != nil:
		return failed
	case out == nil:
		return c.x.answer(c.summary())
	}
	out.end(c, failed)
	return nil
}

// answerAll makes all calls at once and waits for their ends.
func (c *comparison) answerAll(store Store, out *compareStream) {
	c.results = make([]compareResult, len(c.calls))
	var running sync.WaitGroup
	panics := make(chan any, len(c.calls))
	for i, call := range c.calls {
		call.taker.delta = out.deltasOf(call)
		running.Go(func() {
			defer func() {
				if p := recover(); p != nil { // net/http keeps one from ending the process on the request's goroutine only
					panics <- p
				}
			}()
			if i == 0 {
				call.run(store)
			} else {
				call.admitAndRun(store)
			}
			c.results[i] = call.result()
			out.completed(&c.results[i])
		})
	}
	running.Wait()
	select {
	case p := <-panics:
		panic(p)
	default:
	}
}

// answered returns the results that are answers.
func (c *comparison) answered() []compareResult {
	return slices.DeleteFunc(slices.Clone(c.results), func(r compareResult) bool { return r.Error != nil })
}

// compare has the comparison model judge, or where it cannot, the first of those that answered that can.
func (c *comparison) compare(store Store, answered []compareResult, out *compareStream) {
	judges := []string{c.req.judge}
	for _, r := range answered {
		if r.Model != c.req.judge {
			judges = append(judges, r.Model)
		}
	}
	for i, model := range judges {
		call := c.newCall(model, judgeBody(model, c.req.instructions, c.req, answered))
		call.taker.delta = out.judgement
		if call.refusal == nil {
			call.admitAndRun(store)
		}
		// what has begun to go out is the comparison, though it broke off
		if code, _ := call.failed(); code == "" || call.taker.content.Len() > 0 {
			c.judge, c.fallback = call, i > 0
			return
		}
		c.unjudged = append(c.unjudged, call)
		if c.ctx.Err() != nil {
			return
		}
	}
}

// finish sums up what the access log says of the comparison. The ledger has the calls.
func (c *comparison) finish(outcome Outcome) {
	c.x.sum = true
	e := &c.x.event
	e.Outcome, e.Model = outcome, strings.Join(c.req.models, ",")
	for _, call := range append(slices.Clone(c.calls), c.judge) {
		if call == nil {
			continue
		}
		e.Attempts += call.x.event.Attempts
		e.PromptTokens += call.x.event.PromptTokens
		e.CachedTokens += call.x.event.CachedTokens
		e.CompletionTokens += call.x.event.CompletionTokens
		e.PromptAudioTokens += call.x.event.PromptAudioTokens
		e.CompletionAudioTokens += call.x.event.CompletionAudioTokens
		e.Cost = e.Cost.plus(call.x.event.Cost)
	}
}

func errAllFailed(results []compareResult) *apiError {
	var reasons []string
	for _, r := range results {
		reasons = append(reasons, fmt.Sprintf("%s: %s", r.Model, *r.Error))
	}
	return errorf(http.StatusBadGateway, "all_models_failed", "No model answered. %s", strings.Join(reasons, " "))
}

// comparisonError says why there is no comparison, or only the beginning of one.
type comparisonError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// comparisonError returns nil where the comparison is whole, and where none was to be made.
func (c *comparison) comparisonError() *comparisonError {
	if c.judge != nil {
		code, message := c.judge.failed()
		if code == "" {
			return nil
		}
		return &comparisonError{code, message}
	}
	if len(c.unjudged) == 0 {
		return nil
	}
	var e comparisonError
	reasons := []string{"No model could compare the answers."}
	for _, call := range c.unjudged {
		code, message := call.failed()
		e.Code = cmp.Or(e.Code, code) // the comparison model's
		reasons = append(reasons, call.model+": "+message)
	}
	e.Message = strings.Join(reasons, " ")
	return &e
}

// compareSummary is the answer to a comparison.
type compareSummary struct {
	ID              string           `json:"comparison_id"`
	Object          string           `json:"object"`
	Created         int64            `json:"created"`
	Models          []string         `json:"models"`
	Results         []compareResult  `json:"results"`
	Comparison      *string          `json:"comparison"`
	ComparisonError *comparisonError `json:"comparison_error"`
	ComparisonModel *string          `json:"comparison_model"`
	ComparisonUsage *callUsage       `json:"comparison_usage"`
	FallbackUsed    bool             `json:"comparison_fallback_used"`
	TotalLatencyMS  int64            `json:"total_latency_ms"`
	Partial         bool             `json:"partial"`
	SkipComparison  bool             `json:"skip_comparison"`
}

func (c *comparison) summary() *compareSummary {
	s := &compareSummary{
		ID: c.id, Object: "compare.completion", Created: c.started.Unix(),
		Models: c.req.models, Results: c.results,
		ComparisonError: c.comparisonError(),
		FallbackUsed:    c.fallback,
		TotalLatencyMS:  time.Since(c.started).Milliseconds(),
		Partial:         len(c.answered()) < len(c.results),
		SkipComparison:  c.req.skip,
	}
	if c.judge != nil {
		text := c.judge.taker.text()
		s.Comparison, s.ComparisonModel, s.ComparisonUsage = &text, &c.judge.model, c.judge.usage()
	}
	return s
}
