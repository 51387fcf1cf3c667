package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/openai/openai-go/v3"
)

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

func TestStreamSaysWhatTheWholeAnswerSays(t *testing.T) {
	url := startDemo(t, "demo_model 0")
	whole, stream := complete(t, url, says("one  two\nthree")), streamed(t, url, says("one  two\nthree"))

	if got, want := stream.Choices[0].Message.Content, whole.Choices[0].Message.Content; got != want {
		t.Errorf("got content %q, want %q", got, want)
	}
	if stream.Choices[0].FinishReason != "stop" || stream.Choices[0].Message.Role != "assistant" {
		t.Errorf("got finish reason %q, role %q", stream.Choices[0].FinishReason, stream.Choices[0].Message.Role)
	}
	if stream.Usage.CompletionTokens != whole.Usage.CompletionTokens || stream.Usage.PromptTokens != 4 {
		t.Errorf("got usage %+v, want that of %s", stream.Usage, whole.Usage.RawJSON())
	}
}

func TestStreamHasOpenAIsFramesInOpenAIsOrder(t *testing.T) {
	url := startDemo(t, "demo_model 0") + "/chat/completions"
	const request = `{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":2,"stream":true%s}`
	deltas := []string{
		`"choices":[{"index":0,"delta":{"content":"","refusal":null,"role":"assistant"},"logprobs":null,"finish_reason":null}]`,
		`"choices":[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]`,
		`"choices":[{"index":0,"delta":{"content":" from"},"logprobs":null,"finish_reason":null}]`,
		`"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]`,
	}
	usage := `"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}`

	t.Run("without usage", func(t *testing.T) {
		_, answer := post(t, url, fmt.Sprintf(request, ""))
		wantFrames(t, answer, deltas)
	})
	t.Run("with usage", func(t *testing.T) {
		_, answer := post(t, url, fmt.Sprintf(request, `,"stream_options":{"include_usage":true}`))
		var want []string
		for _, delta := range deltas {
			want = append(want, delta+`,"usage":null`)
		}
		wantFrames(t, answer, append(want, usage))
	})
}

// wantFrames compares what follows the head that all frames of a stream share.
func wantFrames(t *testing.T, stream string, want []string) {
	t.Helper()
	events := strings.Split(strings.TrimSuffix(stream, "\n\n"), "\n\n")
	if last := events[len(events)-1]; last != "data: [DONE]" {
		t.Errorf("got last event %q", last)
	}
	var got []string
	for _, event := range events[:len(events)-1] {
		head, rest, ok := strings.Cut(event, `"model":"m",`)
		if !ok || !strings.HasPrefix(head, `data: {"id":"chatcmpl-`) || !strings.Contains(head, `"object":"chat.completion.chunk"`) {
			t.Errorf("got frame %q", event)
		}
		got = append(got, strings.TrimSuffix(rest, "}"))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got frames\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// flushes records what each flush sent.
type flushes struct {
	*httptest.ResponseRecorder
	sent []string
}

func (f *flushes) Flush() {
	f.sent = append(f.sent, f.Body.String())
	f.Body.Reset()
}

func TestEachFrameIsFlushedOnItsOwn(t *testing.T) {
	w := &flushes{ResponseRecorder: httptest.NewRecorder()}
	body := `{"messages":[{"role":"user","content":"hi"}],"max_tokens":3,"stream":true}`
	r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(body))
	if err := (&DemoModel{Delay: -1}).ServeHTTP(w, r, nil); err != nil {
		t.Fatal(err)
	}
	if len(w.sent) != 6 || w.Body.Len() != 0 { // role, three words, finish, [DONE]
		t.Errorf("got %d flushes, want 6, and %d bytes after the last", len(w.sent), w.Body.Len())
	}
	for _, sent := range w.sent {
		if strings.Count(sent, "\n\n") != 1 || !strings.HasSuffix(sent, "\n\n") {
			t.Errorf("got %q in one flush", sent)
		}
	}
}

func TestWordsOfAStreamComeAtTheirPace(t *testing.T) {
	const delay = 20 * time.Millisecond
	params := says("hi")
	params.MaxTokens = openai.Int(10)
	url := startDemo(t, "demo_model 20ms")

	start := time.Now()
	streamed(t, url, params)
	if took := time.Since(start); took < 10*delay {
		t.Errorf("ten words took %s, want at least %s", took, 10*delay)
	}
}

func TestStreamEndsWhenTheClientLeaves(t *testing.T) {
	ended := make(chan error, 1)
	model := &DemoModel{Delay: caddy.Duration(2 * patience)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ended <- model.ServeHTTP(w, r, nil)
	}))
	defer server.Close()

	ctx, leave := context.WithTimeout(t.Context(), patience)
	defer leave()
	body := strings.NewReader(`{"messages":[{"role":"user","content":"hi"}],"stream":true}`)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/chat/completions", body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	// The first frame is here long before the second.
	if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || !strings.Contains(line, `"role":"assistant"`) {
		t.Fatalf("got first line %q, error %v", line, err)
	}

	leave()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("got error %v for a client that left", err)
		}
	case <-time.After(patience):
		t.Error("the handler still runs")
	}
}
