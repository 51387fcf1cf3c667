package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(DemoModel{})
	httpcaddyfile.RegisterHandlerDirective("demo_model", parseDemoModel)
	// Behind the gateway, so that a site with both sends its requests through the gateway first.
	httpcaddyfile.RegisterDirectiveOrder("demo_model", httpcaddyfile.After, "reverse_proxy")
}

const (
	defaultDemoDelay = 30 * time.Millisecond
	maxDemoBody      = 32 << 20 // bytes
)

// DemoModel is a chat model to try a gateway with: it needs no account, costs nothing and understands nothing, but it
// speaks OpenAI's Chat Completions API, streams and tools and structured output included. What it says depends on
// the request alone.
//
// It answers POST requests to every path that ends in `/chat/completions`, and in `/images/generations`, where what it
// paints is of a single colour. Others go to the next handler.
//
// A token is a word: of the messages for `prompt_tokens`, of the answer for `completion_tokens` and the limits. It
// calls a tool when the user's message names one, or when `tool_choice` wants it to.
type DemoModel struct {
	// How long to wait before each word of a stream. Default: 30ms. Negative: no wait. Whole answers never wait.
	Delay caddy.Duration `json:"delay,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (DemoModel) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.demo_model",
		New: func() caddy.Module { return new(DemoModel) },
	}
}

// Provision sets the default delay.
func (m *DemoModel) Provision(caddy.Context) error {
	if m.Delay == 0 {
		m.Delay = caddy.Duration(defaultDemoDelay)
	}
	return nil
}

func parseDemoModel(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	m := new(DemoModel)
	return m, m.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the model from Caddyfile tokens. Syntax:
//
//	demo_model [<matcher>] [<delay>]
//
// The delay is the wait before each word of a stream; 0 is none.
func (m *DemoModel) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if d.NextArg() {
		delay, err := caddy.ParseDuration(d.Val())
		if err != nil {
			return d.Errf("parsing delay: %v", err)
		}
		if delay < 0 {
			return d.Errf("delay %s is negative", d.Val())
		}
		m.Delay = caddy.Duration(delay)
		if delay == 0 {
			m.Delay = -1 // in JSON, 0 is the default
		}
	}
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(0) {
		return d.Errf("unrecognized subdirective %q of demo_model", d.Val())
	}
	return nil
}

func (m *DemoModel) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	images := strings.HasSuffix(r.URL.Path, "/images/generations")
	if r.Method != http.MethodPost || !images && !strings.HasSuffix(r.URL.Path, "/chat/completions") {
		return next.ServeHTTP(w, r)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxDemoBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return writeDemoError(w, http.StatusRequestEntityTooLarge, err)
	}
	if err != nil {
		return caddyhttp.Error(http.StatusBadRequest, err)
	}
	if images {
		return answerImages(w, body)
	}
	req, err := readDemoRequest(body)
	if err != nil {
		return writeDemoError(w, http.StatusBadRequest, err)
	}

	hash := sha256.Sum256(body)
	id := hex.EncodeToString(hash[:12])
	answer := req.answer("call_" + id)
	envelope := demoCompletion{ID: "chatcmpl-" + id, Created: time.Now().Unix(), Model: req.Model}
	usage := newDemoUsage(req.promptTokens(), len(answer.words))

	if !req.Stream {
		return envelope.write(w, answer, usage)
	}
	s := demoStream{ctx: r.Context(), w: w, delay: time.Duration(m.Delay), envelope: envelope}
	err = s.send(answer, usage, req.StreamOptions.IncludeUsage)
	if r.Context().Err() != nil {
		return nil // the client left; nobody to tell
	}
	return err
}

// demoCompletion is a whole answer, or what every frame of a stream repeats.
type demoCompletion struct {
	ID      string       `json:"id"`
	Object  string       `json:"object"`
	Created int64        `json:"created"` // Unix time, seconds
	Model   string       `json:"model"`
	Choices []demoChoice `json:"choices"`
	Usage   any          `json:"usage,omitempty"` // *demoUsage; nil is no member at all, a nil *demoUsage is null
}

type demoChoice struct {
	Index        int     `json:"index"`
	Message      object  `json:"message,omitempty"`
	Delta        *object `json:"delta,omitempty"` // a pointer, because the last one is there and empty
	Logprobs     any     `json:"logprobs"`        // never any
	FinishReason *string `json:"finish_reason"`
}

type demoUsage struct {
	PromptTokens        int            `json:"prompt_tokens"`
	CompletionTokens    int            `json:"completion_tokens"`
	TotalTokens         int            `json:"total_tokens"`
	PromptTokensDetails map[string]int `json:"prompt_tokens_details"`
}

func newDemoUsage(prompt, completion int) *demoUsage {
	return &demoUsage{
		PromptTokens:        prompt,
		CompletionTokens:    completion,
		TotalTokens:         prompt + completion,
		PromptTokensDetails: map[string]int{"cached_tokens": 0},
	}
}

func (c demoCompletion) write(w http.ResponseWriter, answer demoAnswer, usage *demoUsage) error {
	c.Object = "chat.completion"
	c.Choices = []demoChoice{{Message: answer.message(), FinishReason: &answer.finish}}
	c.Usage = usage
	return writeDemoJSON(w, http.StatusOK, c)
}

// demoStream sends an answer as server-sent events, each flushed on its own.
type demoStream struct {
	ctx      context.Context // the request's
	w        http.ResponseWriter
	delay    time.Duration
	envelope demoCompletion
}

// send ends early, with an error, when the client leaves.
func (s *demoStream) send(answer demoAnswer, usage *demoUsage, includeUsage bool) error {
	s.w.Header().Set("Content-Type", "text/event-stream")
	s.w.Header().Set("Cache-Control", "no-cache")
	s.envelope.Object = "chat.completion.chunk"
	if includeUsage {
		s.envelope.Usage = (*demoUsage)(nil)
	}

	if err := s.choice(demoChoice{Delta: answer.opening()}); err != nil {
		return err
	}
	for _, word := range answer.words {
		if err := s.pause(); err != nil {
			return err
		}
		if err := s.choice(demoChoice{Delta: answer.delta(word)}); err != nil {
			return err
		}
	}
	if err := s.choice(demoChoice{Delta: &object{}, FinishReason: &answer.finish}); err != nil {
		return err
	}
	if includeUsage {
		s.envelope.Usage = usage
		if err := s.frame([]demoChoice{}); err != nil {
			return err
		}
	}
	return s.event([]byte("[DONE]"))
}

func (s *demoStream) choice(c demoChoice) error { return s.frame([]demoChoice{c}) }

func (s *demoStream) frame(choices []demoChoice) error {
	s.envelope.Choices = choices
	encoded, err := encodeJSON(s.envelope)
	if err != nil {
		return fmt.Errorf("encoding frame: %w", err)
	}
	return s.event(encoded)
}

func (s *demoStream) event(data []byte) error {
	if _, err := fmt.Fprintf(s.w, "data: %s\n\n", data); err != nil {
		return err
	}
	return http.NewResponseController(s.w).Flush()
}

func (s *demoStream) pause() error {
	if s.delay <= 0 {
		return s.ctx.Err()
	}
	select {
	case <-s.ctx.Done():
		return s.ctx.Err()
	case <-time.After(s.delay):
		return nil
	}
}

// writeDemoError answers with an error in OpenAI's form.
func writeDemoError(w http.ResponseWriter, status int, err error) error {
	return writeDemoJSON(w, status, object{"error": object{
		"message": err.Error(),
		"type":    "invalid_request_error",
		"param":   nil,
		"code":    nil,
	}})
}

func writeDemoJSON(w http.ResponseWriter, status int, v any) error {
	encoded, err := encodeJSON(v)
	if err != nil {
		return fmt.Errorf("encoding answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, err = w.Write(encoded)
	return err
}

// object is a JSON object.
type object = map[string]any

// encodeJSON is json.Marshal without the escapes that only HTML needs.
func encodeJSON(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), err
}

var (
	_ caddy.Provisioner           = (*DemoModel)(nil)
	_ caddyfile.Unmarshaler       = (*DemoModel)(nil)
	_ caddyhttp.MiddlewareHandler = (*DemoModel)(nil)
)
