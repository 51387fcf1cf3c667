package mesh

import (
	"net/http"
	"sync"
	"time"
)

// compareStream is the answer to a comparison as it goes on: events, each with its name in its data too.
//
//	compare.started      what is compared
//	model.delta          a piece of a model's text; where there is no comparison
//	model.completed      what became of a model
//	comparison.delta     a piece of the comparison
//	compare.completed    all of it once more, but for the models' texts
//	error                the request as a whole has failed
type compareStream struct {
	c *comparison

	mu    sync.Mutex // held while an event is written
	gone  error      // why nothing more can be written
	wrote time.Time  // last
}

// keepAlive tells the client that its request is alive, whenever it has heard nothing for a while. It ends with the
// comparison.
func (s *compareStream) keepAlive(every time.Duration) {
	ticker := time.NewTicker(every / 4)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.mu.Lock()
			silent := time.Since(s.wrote) >= every
			s.mu.Unlock()
			if silent {
				s.write(": ping\n\n") //nolint:errcheck // the context tells of a client that has left
			}
		case <-s.c.ctx.Done():
			return
		}
	}
}

// openStream begins the answer. There is nothing to wait for: whatever happens now is told in events.
func (c *comparison) openStream() *compareStream {
	header := c.x.w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-cache")
	header.Set("X-Accel-Buffering", "no") // for an nginx in front
	c.x.w.WriteHeader(http.StatusOK)
	s := &compareStream{c: c}
	s.send("compare.started", map[string]any{ //nolint:errcheck // the context tells of a client that has left
		"comparison_id": c.id, "object": "compare.completion.chunk", "created": c.started.Unix(),
		"models": c.req.models, "skip_comparison": c.req.skip,
	})
	c.pinging.Go(func() { s.keepAlive(c.x.h.pingEvery) })
	return s
}

// send writes one event, whole.
func (s *compareStream) send(event string, data map[string]any) error {
	data["event"] = event
	encoded, err := encodeJSON(data)
	if err != nil {
		return err
	}
	return s.write("event: " + event + "\ndata: " + string(encoded) + "\n\n")
}

func (s *compareStream) write(text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone != nil {
		return s.gone
	}
	s.wrote = time.Now()
	if _, s.gone = s.c.x.w.Write([]byte(text)); s.gone == nil {
		s.gone = http.NewResponseController(s.c.x.w).Flush()
	}
	return s.gone
}

// deltasOf returns what is told of a model's text, piece by piece.
func (s *compareStream) deltasOf(call *innerCall) func(string) error {
	if s == nil {
		return nil
	}
	return func(text string) error {
		return s.send("model.delta", map[string]any{
			"comparison_id": s.c.id, "model": call.model, "request_id": call.x.event.RequestID, "content": text,
		})
	}
}

// completed tells what became of a model.
func (s *compareStream) completed(r *compareResult) {
	if s == nil {
		return
	}
	s.send("model.completed", map[string]any{ //nolint:errcheck // the context tells of a client that has left
		"comparison_id": s.c.id, "model": r.Model, "response_body": r.ResponseBody, "content": r.Content,
		"latency_ms": r.LatencyMS, "error": r.Error, "error_code": r.ErrorCode, "usage": r.Usage, "request_id": r.RequestID,
	})
}

// judgement tells a piece of the comparison.
func (s *compareStream) judgement(text string) error {
	if s == nil {
		return nil
	}
	return s.send("comparison.delta", map[string]any{"comparison_id": s.c.id, "content": text})
}

// end tells the end, and how it ended.
func (s *compareStream) end(c *comparison, failed *apiError) {
	if failed != nil {
		c.x.event.Status, c.x.event.Error = failed.status, failed.code
		s.send("error", map[string]any{ //nolint:errcheck // as above
			"comparison_id": c.id, "request_id": c.x.event.RequestID,
			"error": map[string]any{"code": failed.code, "message": failed.message},
		})
	} else {
		sum := c.summary()
		var broke *string
		if sum.ComparisonError != nil {
			broke = &sum.ComparisonError.Message
		}
		s.send("compare.completed", map[string]any{ //nolint:errcheck // as above
			"error":         broke,
			"comparison_id": sum.ID, "object": sum.Object, "created": sum.Created, "models": sum.Models,
			"comparison": sum.Comparison, "comparison_error": sum.ComparisonError, "comparison_model": sum.ComparisonModel, "comparison_usage": sum.ComparisonUsage,
			"comparison_fallback_used": sum.FallbackUsed, "total_latency_ms": sum.TotalLatencyMS, "partial": sum.Partial,
			"skip_comparison": sum.SkipComparison,
		})
	}
	s.write("data: [DONE]\n\n") //nolint:errcheck // as above
}
