package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/ssestream"
)

// wantError checks the error that the SDK makes of an answer.
func wantError(t *testing.T, err error, want openai.Error) {
	t.Helper()
	var got *openai.Error
	if !errors.As(err, &got) {
		t.Fatalf("not an *openai.Error: %v", err)
	}
	if got.StatusCode != want.StatusCode || got.Code != want.Code || got.Type != want.Type || got.Param != want.Param || got.Message != want.Message {
		t.Errorf("got %d %s\nwant %d %s %s %s %s", got.StatusCode, got.RawJSON(), want.StatusCode, want.Code, want.Type, want.Param, want.Message)
	}
	if id := got.Response.Header.Get("X-Request-Id"); !strings.HasPrefix(id, "req_") {
		t.Errorf("X-Request-Id %q", id)
	}
}

func TestSDKReadsErrors(t *testing.T) {
	tooLong := string(recorded(t, "context_too_long.json"))
	for _, tc := range []struct {
		name     string
		key      string
		upstream http.HandlerFunc
		params   openai.ChatCompletionNewParams
		want     openai.Error
	}{
		{
			"no such key", "rsk_01BX5ZZKBKACTAV9WEVGEMMVS0", nil, asking("openai/gpt-4o", greeting...),
			openai.Error{StatusCode: 401, Code: "unauthorized", Type: "authentication_error", Message: errUnauthorized.message},
		},
		{
			"a key of OpenAI's", "sk-proj-abc", nil, asking("openai/gpt-4o", greeting...),
			openai.Error{StatusCode: 401, Code: "unauthorized", Type: "authentication_error", Message: errUnauthorized.message},
		},
		{
			"a model that is not the key's", otherKey, nil, asking("openai/gpt-4.1", greeting...),
			openai.Error{StatusCode: 403, Code: "forbidden", Type: "permission_error", Message: `This API key may not use the model "openai/gpt-4.1".`},
		},
		{
			"a model that is not there", testKey, nil, asking("acme/none", greeting...),
			openai.Error{StatusCode: 404, Code: "model_not_found", Type: "invalid_request_error", Param: "model", Message: `The model "acme/none" does not exist.`},
		},
		{
			"a value out of range", testKey, nil, openai.ChatCompletionNewParams{Model: "openai/gpt-4o", Messages: greeting, Temperature: openai.Float(3)},
			openai.Error{StatusCode: 422, Code: "validation_error", Type: "invalid_request_error", Param: "temperature", Message: "temperature: Input should be less than or equal to 2"},
		},
		{
			"a provider's refusal", testKey, answers(400, "application/json", tooLong), asking("openai/gpt-4o", greeting...),
			openai.Error{StatusCode: 400, Code: "context_length_exceeded", Type: "invalid_request_error", Param: "messages", Message: "This model's maximum context length is 128000 tokens. " +
				"However, your messages resulted in 131313 tokens. Please reduce the length of the messages."},
		},
		{
			"a provider that is down", testKey, answers(503, "text/html", "<html>"), asking("openai/gpt-4o", greeting...),
			openai.Error{StatusCode: 502, Code: "upstream_error", Type: "api_error", Message: "The upstream failed (status 503)."},
		},
		{
			"a provider that refuses the gateway", testKey, answers(401, "application/json", `{"error":{"message":"Incorrect API key provided: sk-upstream"}}`), asking("openai/gpt-4o", greeting...),
			openai.Error{StatusCode: 502, Code: "upstream_error", Type: "api_error", Message: "The upstream refused the gateway's credentials."},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) { tc.upstream(w, r) })
			p := startProcess(t, up.address(), sdkSite)
			client := newSDK(p.url, tc.key)
			_, err := client.Chat.Completions.New(t.Context(), tc.params)
			wantError(t, err, tc.want)
			// An error before the first byte of a stream is no different.
			stream := client.Chat.Completions.NewStreaming(t.Context(), tc.params)
			_, _, err = drain(stream)
			wantError(t, err, tc.want)
			if n := len(up.received()); (n == 0) != (tc.upstream == nil) {
				t.Errorf("the upstream received %d requests", n)
			}
		})
	}
}

func TestSDKIsToldWhenItsKeyMayTryAgain(t *testing.T) {
	up := startUpstream(t, plays(t, "completion.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, otherKey)
	var err error
	for range 3 { // of three requests two are in the same minute
		if _, err = client.Chat.Completions.New(t.Context(), asking("openai/gpt-4o", greeting...)); err != nil {
			break
		}
	}
	if err == nil {
		t.Fatal("no request was refused: is there a store that counts?")
	}
	var refused *openai.Error
	if !errors.As(err, &refused) {
		t.Fatal(err)
	}
	wait := refused.Response.Header.Get("Retry-After")
	wantError(t, err, openai.Error{StatusCode: 429, Code: "rate_limit_exceeded", Type: "rate_limit_error",
		Message: fmt.Sprintf("Rate limit reached: 1 requests per minute. Try again in %s s.", wait)})
	var body struct {
		RetryAfter json.Number `json:"retry_after_seconds"`
	}
	if err := json.Unmarshal([]byte(refused.RawJSON()), &body); err != nil || body.RetryAfter.String() != wait || wait == "" {
		t.Errorf("Retry-After %q, %s", wait, refused.RawJSON())
	}
	if got := refused.Response.Header.Get("X-Ratelimit-Remaining-Requests"); got != "0" {
		t.Errorf("remaining %q", got)
	}
}

func TestSDKTriesAgainWhenTheUpstreamSays(t *testing.T) {
	asked := make(chan time.Time, 9)
	busy, calm := recorded(t, "rate_limited.json"), plays(t, "completion.json")
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- time.Now()
		if len(asked) == 1 {
			w.Header().Set("Retry-After", "1")
			answers(http.StatusTooManyRequests, "application/json", string(busy))(w, r)
			return
		}
		calm(w, r)
	})
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey, option.WithMaxRetries(2))
	got, err := client.Chat.Completions.New(t.Context(), asking("openai/gpt-4o", greeting...))
	if err != nil || got.Choices[0].Message.Content != hello {
		t.Fatal(err)
	}
	if len(asked) != 2 {
		t.Fatalf("the upstream was asked %d times", len(asked))
	}
	// Without a Retry-After, the client would have waited for half a second at most.
	if first, second := <-asked, <-asked; second.Sub(first) < time.Second {
		t.Errorf("the client tried again after %v", second.Sub(first))
	}
	client.checkUpstream(t, up, "")
}

// babbles is an upstream's handler that streams until its client leaves, and then says so.
func babbles(left chan<- struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		defer close(left)
		w.Header().Set("Content-Type", "text/event-stream")
		for r.Context().Err() == nil {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
			time.Sleep(time.Millisecond)
		}
	}
}

func wantLeft(t *testing.T, left <-chan struct{}) {
	t.Helper()
	select {
	case <-left:
	case <-time.After(10 * time.Second):
		t.Error("the upstream was not cancelled")
	}
}

func TestSDKCancelsAStream(t *testing.T) {
	left := make(chan struct{})
	up := startUpstream(t, babbles(left))
	p := startProcess(t, up.address(), sdkSite)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := newSDK(p.url, testKey).Chat.Completions.NewStreaming(ctx, asking("openai/gpt-4o", greeting...))
	for range 10 {
		if !stream.Next() || stream.Current().Choices[0].Delta.Content != " word" {
			t.Fatal(stream.Err())
		}
	}
	cancel()
	for stream.Next() { // what had arrived before
	}
	if !errors.Is(stream.Err(), context.Canceled) {
		t.Errorf("%v", stream.Err())
	}
	wantLeft(t, left)
}

func TestSDKGivesUpInTime(t *testing.T) {
	left := make(chan struct{}, 1)
	up := startUpstream(t, func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		left <- struct{}{}
	})
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	_, err := client.Chat.Completions.New(t.Context(), asking("openai/gpt-4o", greeting...), option.WithRequestTimeout(time.Second))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the client's own limit: %v", err)
	}
	wantLeft(t, left)
	_, err = client.Chat.Completions.New(t.Context(), asking("openai/gpt-4o", greeting...), option.WithJSONSet("timeout", 1))
	wantError(t, err, openai.Error{StatusCode: 504, Code: "gateway_timeout", Type: "api_error", Message: errTimeout.message})
	wantLeft(t, left)
}

func TestSDKIsToldOfAStreamThatBreaksOff(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, roleFrame+wordFrame)
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	p := startProcess(t, up.address(), sdkSite)
	acc, _, err := drain(newSDK(p.url, testKey).Chat.Completions.NewStreaming(t.Context(), asking("openai/gpt-4o", greeting...)))
	var cut *ssestream.StreamError
	if !errors.As(err, &cut) || !strings.Contains(string(cut.Event.Data), errCut.message) {
		t.Errorf("%v", err)
	}
	if got := acc.Choices[0].Message.Content; got != " word" {
		t.Errorf("%q", got)
	}
}
