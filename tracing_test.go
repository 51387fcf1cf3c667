package mesh

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// spans is an OpenTelemetry collector that keeps what it is sent.
type spans struct {
	*httptest.Server
	t   testing.TB
	mu  sync.Mutex
	all []*tracepb.Span
}

// startCollector runs a collector, and has the processes that the test starts send it their spans.
func startCollector(t *testing.T) *spans {
	t.Helper()
	s := &spans{t: t}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", s.URL)
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
	t.Setenv("OTEL_TRACES_EXPORTER", "otlp")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
	return s
}

// ServeHTTP takes an export of OTLP over HTTP.
func (s *spans) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Error(err)
	}
	var export collector.ExportTraceServiceRequest
	if err := proto.Unmarshal(body, &export); err != nil {
		s.t.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, resource := range export.ResourceSpans {
		for _, scope := range resource.ScopeSpans {
			s.all = append(s.all, scope.Spans...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// ofRequest waits for the span of a request, and returns it with the attempts below it, in order.
func (s *spans) ofRequest(requestID string) (request *tracepb.Span, attempts []*tracepb.Span) {
	s.t.Helper()
	eventually(s.t, "the span of "+requestID, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, span := range s.all {
			if attributesOf(span)["test.request_id"] == requestID {
				request = span
			}
		}
		return request != nil
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, span := range s.all { // an attempt ends before its request, so that it is here
		if string(span.ParentSpanId) == string(request.SpanId) {
			attempts = append(attempts, span)
		}
	}
	slices.SortFunc(attempts, func(a, b *tracepb.Span) int { return int(a.StartTimeUnixNano) - int(b.StartTimeUnixNano) })
	return request, attempts
}

// attributesOf returns a span's attributes as text.
func attributesOf(span *tracepb.Span) map[string]string {
	all := make(map[string]string)
	for _, a := range span.Attributes {
		all[a.Key] = textOf(a.Value)
	}
	return all
}

func textOf(v *common.AnyValue) string {
	switch v := v.Value.(type) {
	case *common.AnyValue_StringValue:
		return v.StringValue
	case *common.AnyValue_IntValue:
		return fmt.Sprint(v.IntValue)
	case *common.AnyValue_BoolValue:
		return fmt.Sprint(v.BoolValue)
	case *common.AnyValue_DoubleValue:
		return fmt.Sprint(v.DoubleValue)
	case *common.AnyValue_ArrayValue:
		var parts []string
		for _, value := range v.ArrayValue.Values {
			parts = append(parts, textOf(value))
		}
		return strings.Join(parts, ",")
	}
	return ""
}

const traced = "tracing {\n\tspan_attributes {\n\t\ttest.request_id {http.mesh.request_id}\n\t}\n}\n"

// expect compares those attributes that are wanted; "-" stands for one that must not be there, "*" for any value.
func expect(t *testing.T, what string, span *tracepb.Span, want map[string]string) {
	t.Helper()
	got := attributesOf(span)
	for key, value := range want {
		has, ok := got[key]
		switch {
		case value == "-" && ok, value != "-" && !ok, value != "-" && value != "*" && has != value:
			t.Errorf("%s: %s is %q (there: %v), want %q", what, key, has, ok, value)
		}
	}
}

func TestSpanSaysWhatWasAskedAnsweredAndUsed(t *testing.T) {
	collector := startCollector(t)
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, traced+site(observedModels)))
	g := p.gateway()

	r := g.post(chatFor("test/two", `"max_tokens":77`, `"session_id":"s1"`, `"n":2`))
	request, attempts := collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "request", request, map[string]string{
		"gen_ai.operation.name":                "chat",
		"gen_ai.provider.name":                 "spare",
		"gen_ai.request.model":                 "test/two",
		"gen_ai.request.max_tokens":            "77",
		"gen_ai.request.choice.count":          "2",
		"gen_ai.request.stream":                "false",
		"gen_ai.conversation.id":               "s1",
		"gen_ai.response.id":                   "chatcmpl-1",
		"gen_ai.response.model":                "gpt-4o-2024-08-06",
		"gen_ai.response.finish_reasons":       "stop",
		"gen_ai.usage.input_tokens":            "1000",
		"gen_ai.usage.output_tokens":           "200",
		"gen_ai.usage.cache_read.input_tokens": "400",
		"gen_ai.response.time_to_first_chunk":  "-",
		"gen_ai.input.messages":                "-",
		"gen_ai.output.messages":               "-",
		"error.type":                           "-",
	})
	if len(attempts) != 2 {
		t.Fatalf("%d spans of attempts", len(attempts))
	}
	for i, want := range []struct {
		name   string
		status tracepb.Status_StatusCode
		has    map[string]string
	}{
		{"chat two", tracepb.Status_STATUS_CODE_ERROR, map[string]string{
			"gen_ai.operation.name": "chat", "gen_ai.provider.name": "up", "gen_ai.request.model": "two",
			"server.address": "127.0.0.1", "server.port": "*", "http.response.status_code": "500", "error.type": "500",
		}},
		{"chat second", tracepb.Status_STATUS_CODE_UNSET, map[string]string{
			"gen_ai.provider.name": "spare", "gen_ai.request.model": "second", "http.response.status_code": "200", "error.type": "-",
		}},
	} {
		a := attempts[i]
		if a.Name != want.name || a.Kind != tracepb.Span_SPAN_KIND_CLIENT || a.Status.GetCode() != want.status {
			t.Errorf("attempt %d is %q, %s, %s", i, a.Name, a.Kind, a.Status)
		}
		expect(t, fmt.Sprint("attempt ", i), a, want.has)
		if got := up.received()[i].Header.Get("Traceparent"); got != fmt.Sprintf("00-%x-%x-01", request.TraceId, a.SpanId) {
			t.Errorf("attempt %d of trace %x, span %x, went out as %q", i, request.TraceId, a.SpanId, got)
		}
	}
}

func TestSpanSaysHowAStreamWent(t *testing.T) {
	collector := startCollector(t)
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, traced+site(observedModels)))
	g := p.gateway()

	r := g.post(chatFor("test/streaming", `"stream":true`))
	request, attempts := collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "stream", request, map[string]string{
		"gen_ai.request.stream":               "true",
		"gen_ai.request.max_tokens":           "-",
		"gen_ai.response.id":                  "*",
		"gen_ai.response.model":               "*",
		"gen_ai.response.finish_reasons":      "stop",
		"gen_ai.response.time_to_first_chunk": "*",
		"gen_ai.usage.output_tokens":          "*",
		"error.type":                          "-",
	})
	if len(attempts) != 1 || attempts[0].Status.GetCode() != tracepb.Status_STATUS_CODE_UNSET {
		t.Errorf("attempts: %v", attempts)
	}

	r = g.post(chatFor("test/cut", `"stream":true`))
	request, attempts = collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "cut", request, map[string]string{"error.type": "upstream_error", "gen_ai.response.finish_reasons": "-"})
	expect(t, "attempt that was cut", attempts[0], map[string]string{"error.type": "cut", "http.response.status_code": "200"})

	r = g.post(chatFor("test/gone"))
	request, attempts = collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "unreachable", request, map[string]string{"error.type": "upstream_error"})
	expect(t, "attempt that reached nobody", attempts[0], map[string]string{
		"error.type": "failed", "http.response.status_code": "-", "server.port": "1"})

	r = g.post(chatFor("nobody/has-this"))
	request, attempts = collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "refused", request, map[string]string{
		"gen_ai.operation.name": "chat", "error.type": "model_not_found", "gen_ai.usage.input_tokens": "-"})
	if len(attempts) != 0 {
		t.Errorf("attempts: %v", attempts)
	}
}

func TestSpanHasPromptsAndAnswersOnlyIfAskedFor(t *testing.T) {
	collector := startCollector(t)
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, traced+site(observedModels+"\n\ttracing {\n\t\tcontent\n\t}")))
	g := p.gateway()
	r := g.post(`{"model":"test/priced","messages":[{"role":"system","content":"Be \"brief\"."},` +
		`{"role":"user","content":[{"type":"text","text":"Hi"},{"type":"image_url","image_url":{"url":"data:x"}}]}]}`)
	request, _ := collector.ofRequest(r.Header.Get("X-Request-Id"))
	expect(t, "whole", request, map[string]string{
		"gen_ai.input.messages": `[{"role":"system","parts":[{"type":"text","content":"Be \"brief\"."}]},` +
			`{"role":"user","parts":[{"type":"text","content":"Hi"}]}]`,
		"gen_ai.output.messages": `[{"role":"assistant","parts":[{"type":"text","content":"Hello there."}],"finish_reason":"stop"}]`,
	})
	r = g.post(chatFor("test/streaming", `"stream":true`))
	request, _ = collector.ofRequest(r.Header.Get("X-Request-Id"))
	if got := attributesOf(request)["gen_ai.output.messages"]; strings.Count(got, `"role"`) != 1 || !strings.Contains(got, `"finish_reason":"stop"`) {
		t.Errorf("streamed: %s", got)
	}
}

func TestTracedContentIsBounded(t *testing.T) {
	long := strings.Repeat(`\u00e9`, 1<<20)
	for what, messages := range map[string]string{
		"one long":       `{"role":"user","content":"` + long + `"}`,
		"many short":     `{"role":"user","content":"x"}` + strings.Repeat(`,{"role":"user","content":"x"}`, 100_000),
		"many parts":     `{"role":"user","content":[{"text":"x"}` + strings.Repeat(`,{"text":"x"}`, 100_000) + `]}`,
		"cut in escape":  `{"role":"user","content":"a` + strings.Repeat(`\\`, 1<<17) + `"}`,
		"long role":      `{"role":"` + long + `","content":"x"}`,
		"no text at all": `{"role":"user"}` + strings.Repeat(`,{"role":"user"}`, 100_000),
	} {
		got := inputMessages([]byte(`{"messages":[` + messages + `]}`))
		if len(got) > 4*maxTraceContent {
			t.Errorf("%s: %d bytes", what, len(got))
		}
		if !strings.HasPrefix(got, `[{"role":`) || strings.Contains(got, `\\u00e9`) {
			t.Errorf("%s: %.100s", what, got)
		}
	}
	var answer answerContent
	for range 100 {
		for index := range 100 {
			answer.read(fmt.Appendf(nil, `{"choices":[{"index":%d,"delta":{"content":%q}}]}`, index, strings.Repeat("é", 500)), true)
		}
	}
	for _, a := range answer.attributes(true) {
		if len(a.Value.AsString()) > 2*maxTraceContent {
			t.Errorf("%s has %d bytes", a.Key, len(a.Value.AsString()))
		}
	}
}

// TestWithoutTracingTheTraceContextPasses has a client that traces behind a gateway that does not.
func TestWithoutTracingTheTraceContextPasses(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site(""))
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	g.post(chatBody, "Traceparent", parent)
	if got := up.last(t).Header.Get("Traceparent"); got != parent {
		t.Errorf("the upstream received %q", got)
	}
}
