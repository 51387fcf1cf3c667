package mesh

import (
	"encoding/json"
	"net/http"
	"time"
)

// newCall returns a call with a body as a client would send it.
func (c *comparison) newCall(model string, body []byte) *innerCall {
	call := c.x.newCall(c.ctx, model, c.limit)
	call.x.event.ComparisonID = c.id
	call.prepare(body)
	if call.refusal == nil && call.req.images != nil {
		call.refusal = imagesNotCompared(model)
	}
	return call
}

func imagesNotCompared(model string) *apiError {
	return errorf(http.StatusUnprocessableEntity, "unprocessable_entity", "%s makes images, and only texts can be compared.", model)
}

// compareResult is what became of one model's call.
type compareResult struct {
	Model        string          `json:"model"`
	ResponseBody json.RawMessage `json:"response_body"` // nil where it was streamed, or failed
	Content      *string         `json:"content"`
	LatencyMS    int64           `json:"latency_ms"`
	Error        *string         `json:"error"`
	ErrorCode    *string         `json:"error_code"`
	Usage        *callUsage      `json:"usage"`
	RequestID    string          `json:"request_id"`
}

func (c *innerCall) result() compareResult {
	r := compareResult{
		Model:     c.model,
		LatencyMS: time.Since(c.x.started).Milliseconds(),
		Usage:     c.usage(),
		RequestID: c.x.event.RequestID,
	}
	code, message := c.failed()
	if code != "" {
		r.ErrorCode, r.Error = &code, &message
	}
	content := c.taker.text()
	if code == "" || content != "" {
		r.Content = &content
	}
	if code == "" && !c.req.stream {
		r.ResponseBody = c.taker.body.Bytes()
	}
	return r
}
