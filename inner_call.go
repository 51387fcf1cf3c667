package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
)

// innerCall is a chat completion that the gateway makes in the course of a request, for a compare or to choose a model: it is
// routed, metered and charged like any other, under a request id of its own. Its answer goes into an answerTaker.
type innerCall struct {
	model      string
	x          *exchange
	req        *chatRequest
	candidates []candidate
	taker      *answerTaker
	refusal    *apiError // why there is no answer
}

// newCall returns a call that may take as long as limit, and that has yet to be prepared.
func (x *exchange) newCall(ctx context.Context, model string, limit time.Duration) *innerCall {
	call := &innerCall{model: model, taker: &answerTaker{header: make(http.Header)}}
	call.x = x.call(ctx, call.taker)
	call.x.limit = limit
	return call
}

func (c *innerCall) prepare(body []byte) {
	c.req, c.candidates, c.refusal = c.x.prepare(body)
}

// call returns an exchange for a request that is made in the course of x, by the same client, and that runs beside
// others.
func (x *exchange) call(ctx context.Context, w http.ResponseWriter) *exchange {
	call := &exchange{h: x.h, w: w, started: time.Now(), key: x.key, taken: true, silent: true}
	call.r = x.apart(ctx, call.placeholder)
	call.event = Event{
		RequestID: "req_" + ulid.Make().String(),
		KeyID:     x.event.KeyID,
		KeyName:   x.event.KeyName,
		Owner:     x.event.Owner,
		SessionID: x.event.SessionID,
		Outcome:   outcomeRefused,
	}
	return call
}

// run makes a call that was admitted, and settles it.
func (c *innerCall) run(store Store) {
	defer c.x.count()
	c.refusal = c.x.run(store, c.req, c.candidates)
	if c.refusal != nil {
		c.x.event.Status, c.x.event.Error = c.refusal.status, c.refusal.code
	}
}

// admitAndRun is run for a call that was not admitted yet. The request as a whole has been counted, so this is not.
func (c *innerCall) admitAndRun(store Store) {
	c.x.uncounted = true
	if c.refusal = c.x.admit(store, c.req, c.candidates); c.refusal != nil {
		c.x.event.Status, c.x.event.Error = c.refusal.status, c.refusal.code
		c.x.count()
		return
	}
	c.run(store)
}

// failed says why the call has no whole answer, in a code and in words; the code is empty where it has one.
func (c *innerCall) failed() (code, message string) {
	switch {
	case c.refusal != nil:
		return c.refusal.code, c.refusal.message
	case c.taker.failure != nil:
		return c.taker.failure.Code, c.taker.failure.Message
	case c.x.event.Outcome != OutcomeCompleted:
		return "upstream_error", "The model's answer broke off."
	}
	return "", ""
}

// callUsage is what a call used, as far as is known.
type callUsage struct {
	PromptTokens     int64  `json:"prompt_tokens"`
	CompletionTokens int64  `json:"completion_tokens"`
	TotalTokens      int64  `json:"total_tokens"`
	Cost             *Money `json:"cost,omitempty"`
}

func (c *innerCall) usage() *callUsage {
	e := &c.x.event
	if e.PromptTokens+e.CompletionTokens == 0 {
		return nil
	}
	u := &callUsage{PromptTokens: e.PromptTokens, CompletionTokens: e.CompletionTokens, TotalTokens: e.PromptTokens + e.CompletionTokens}
	if len(c.candidates) > 0 && c.candidates[0].price != nil || e.Cost > 0 {
		u.Cost = &e.Cost
	}
	return u
}

// answerTaker is the client of a call.
type answerTaker struct {
	header http.Header
	status int
	body   bytes.Buffer // of an answer that is no stream; else the event that has not ended yet

	streamed bool
	delta    func(text string) error // is told of each piece of a stream's text; nil: nobody is
	content  strings.Builder         // of a stream
	failure  *takenFailure           // that a stream ended in
}

type takenFailure struct{ Code, Message string }

// Header returns the header of the answer.
func (t *answerTaker) Header() http.Header { return t.header }

// WriteHeader notes whether the answer is a stream.
func (t *answerTaker) WriteHeader(status int) {
	if t.status == 0 {
		t.status = status
		t.streamed = mediaType(t.header) == "text/event-stream"
	}
}

// Write takes the next bytes of the answer.
func (t *answerTaker) Write(p []byte) (int, error) {
	t.WriteHeader(http.StatusOK)
	t.body.Write(p)
	if !t.streamed {
		return len(p), nil
	}
	for {
		line, err := t.body.ReadBytes('\n')
		if err != nil { // it has not ended yet
			t.body.Reset()
			t.body.Write(line)
			return len(p), nil
		}
		if err := t.line(line); err != nil {
			return 0, err
		}
	}
}

// FlushError does nothing: there is nobody to wait.
func (t *answerTaker) FlushError() error { return nil }

// line takes one line of a stream. The events of a chat completion have their data in one.
func (t *answerTaker) line(line []byte) error {
	data, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data:"))
	if !ok {
		return nil
	}
	var chunk struct {
		Choices []struct {
			Delta struct{ Content string }
		}
		Error *takenFailure
	}
	if json.Unmarshal(data, &chunk) != nil {
		return nil // [DONE]
	}
	if chunk.Error != nil {
		t.failure = chunk.Error
	}
	if len(chunk.Choices) == 0 || chunk.Choices[0].Delta.Content == "" {
		return nil
	}
	text := chunk.Choices[0].Delta.Content
	t.content.WriteString(text)
	if t.delta == nil {
		return nil
	}
	return t.delta(text)
}

// text returns the text of the first choice.
func (t *answerTaker) text() string {
	if t.streamed {
		return t.content.String()
	}
	var answer struct {
		Choices []struct {
			Message struct {
				Content json.RawMessage
			}
		}
	}
	if json.Unmarshal(t.body.Bytes(), &answer) != nil || len(answer.Choices) == 0 {
		return ""
	}
	return contentText(answer.Choices[0].Message.Content)
}

// contentText returns the text of a message's content.
func contentText(content json.RawMessage) string {
	var text string
	if json.Unmarshal(content, &text) == nil {
		return text
	}
	var parts []struct{ Type, Text string }
	if json.Unmarshal(content, &parts) != nil {
		return ""
	}
	var all strings.Builder
	for _, p := range parts {
		if p.Type == "text" {
			all.WriteString(p.Text)
		} else {
			all.WriteString("[" + p.Type + "]")
		}
	}
	return all.String()
}

var _ interface{ FlushError() error } = (*answerTaker)(nil)
