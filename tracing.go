package mesh

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Tracing says what the gateway adds to the spans of Caddy's `tracing` directive.
type Tracing struct {
	// Whether prompts and answers are put on the span, as `gen_ai.input.messages` and `gen_ai.output.messages`: their text,
	// at most 16 KiB of each. Whoever can read the traces can read them then. Default: false.
	Content bool `json:"content,omitempty"`
}

// Attributes, as OpenTelemetry's semantic conventions for generative AI name them: v0.1.0 of the conventions'
// own repository. Of those that are here, v1.41.0 of the general conventions, the last to have them, says the same.
const (
	attrOperation      = attribute.Key("gen_ai.operation.name")
	attrProvider       = attribute.Key("gen_ai.provider.name")
	attrConversation   = attribute.Key("gen_ai.conversation.id")
	attrRequestModel   = attribute.Key("gen_ai.request.model")
	attrMaxTokens      = attribute.Key("gen_ai.request.max_tokens")
	attrChoices        = attribute.Key("gen_ai.request.choice.count")
	attrStream         = attribute.Key("gen_ai.request.stream")
	attrResponseID     = attribute.Key("gen_ai.response.id")
	attrResponseModel  = attribute.Key("gen_ai.response.model")
	attrFinishReasons  = attribute.Key("gen_ai.response.finish_reasons")
	attrFirstChunk     = attribute.Key("gen_ai.response.time_to_first_chunk") // seconds
	attrInputTokens    = attribute.Key("gen_ai.usage.input_tokens")
	attrOutputTokens   = attribute.Key("gen_ai.usage.output_tokens")
	attrCachedTokens   = attribute.Key("gen_ai.usage.cache_read.input_tokens")
	attrInputMessages  = attribute.Key("gen_ai.input.messages")
	attrOutputMessages = attribute.Key("gen_ai.output.messages")
	attrErrorType      = attribute.Key("error.type")
	attrServerAddress  = attribute.Key("server.address")
	attrServerPort     = attribute.Key("server.port")
	attrStatus         = attribute.Key("http.response.status_code")
)

const operationChat = "chat"

// requestTrace is what goes on the span that Caddy has begun for a request, and on one of its own for each attempt. It is
// nil where there is no span that records anything, and all its methods do nothing then.
type requestTrace struct {
	span    trace.Span // the request's
	attempt trace.Span // the one under way; nil where there is none
	server  string     // the address that the attempt went to
	content bool
	said    answerContent
}

// traceChat begins the request's trace, if there is a span for it.
func (x *exchange) traceChat() {
	span := trace.SpanFromContext(x.r.Context())
	if !span.IsRecording() {
		return
	}
	x.trace = &requestTrace{span: span, content: x.h.Tracing != nil && x.h.Tracing.Content}
	span.SetAttributes(attrOperation.String(operationChat))
}

// request notes what is asked for, and of whom first.
func (t *requestTrace) request(req *chatRequest, e *Event, first *candidate) {
	if t == nil {
		return
	}
	attributes := []attribute.KeyValue{
		attrRequestModel.String(first.model),
		attrProvider.String(first.upstream.Name),
		attrStream.Bool(req.stream),
	}
	if req.maxTokens > 0 {
		attributes = append(attributes, attrMaxTokens.Int64(req.maxTokens))
	}
	if req.choices > 1 {
		attributes = append(attributes, attrChoices.Int64(req.choices))
	}
	if e.SessionID != "" {
		attributes = append(attributes, attrConversation.String(e.SessionID))
	}
	if t.content {
		attributes = append(attributes, attrInputMessages.String(inputMessages(req.body)))
	}
	t.span.SetAttributes(attributes...)
}

// beginAttempt returns the context of an attempt.
func (t *requestTrace) beginAttempt(ctx context.Context, c *candidate) context.Context {
	if t == nil {
		return ctx
	}
	tracer := t.span.TracerProvider().Tracer("github.com/caddymesh/mesh")
	ctx, t.attempt = tracer.Start(ctx, operationChat+" "+c.as,
		trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(
			attrOperation.String(operationChat),
			attrProvider.String(c.upstream.Name),
			attrRequestModel.String(c.as)))
	t.server, t.said = "", answerContent{}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(address string) { t.server = address }, // in the goroutine that sends the request, which is ours
	})
}

// beside returns a trace of the same request for an attempt that is made at the same time as others.
func (t *requestTrace) beside() *requestTrace {
	if t == nil {
		return nil
	}
	return &requestTrace{span: t.span, content: t.content}
}

// propagate has the upstream's trace go on from the attempt's span. As Caddy's own, what goes out is W3C's trace context.
func (t *requestTrace) propagate(ctx context.Context, header http.Header) {
	if t != nil {
		propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(header))
	}
}

// read takes in the JSON of an answer, or of one event of a stream.
func (t *requestTrace) read(payload []byte) {
	if t != nil {
		t.said.read(payload, t.content)
	}
}

// endAttempt closes the span of the attempt under way. The status is the upstream's, 0 where it said nothing.
func (t *requestTrace) endAttempt(status int, r result, cause error) {
	if t == nil || t.attempt == nil {
		return
	}
	span := t.attempt
	t.attempt = nil
	defer span.End()
	if host, port, err := net.SplitHostPort(t.server); err == nil {
		span.SetAttributes(attrServerAddress.String(host))
		if n, err := strconv.Atoi(port); err == nil {
			span.SetAttributes(attrServerPort.Int(n))
		}
	}
	if status != 0 && status != clientClosedRequest { // which is reverse_proxy's word, not the upstream's
		span.SetAttributes(attrStatus.Int(status))
	}
	if r == resultAnswered {
		return
	}
	kind, words := string(r), string(r)
	if status >= 400 && status != clientClosedRequest {
		kind = strconv.Itoa(status)
	}
	if cause != nil {
		words = cause.Error()
	}
	span.SetAttributes(attrErrorType.String(kind))
	span.SetStatus(codes.Error, words)
}

// end notes how the request ended. The span itself is Caddy's to end.
func (t *requestTrace) end(e *Event) {
	if t == nil {
		return
	}
	t.endAttempt(0, resultFailed, nil) // if a handler panicked
	var attributes []attribute.KeyValue
	if e.Outcome != OutcomeCompleted {
		attributes = append(attributes, attrErrorType.String(cmp.Or(e.Error, string(e.Outcome))))
	}
	if e.Attempts > 0 {
		attributes = append(attributes,
			attrProvider.String(e.Upstream),
			attrInputTokens.Int64(e.PromptTokens),
			attrOutputTokens.Int64(e.CompletionTokens))
	}
	if e.CachedTokens > 0 {
		attributes = append(attributes, attrCachedTokens.Int64(e.CachedTokens))
	}
	if e.Stream && e.TTFT > 0 {
		attributes = append(attributes, attrFirstChunk.Float64(e.TTFT.Seconds()))
	}
	t.span.SetAttributes(append(attributes, t.said.attributes(t.content)...)...)
}
