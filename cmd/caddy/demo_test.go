package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/shared"
)

// startDemo runs a Caddy whose only site has the directive, and behind it a handler that answers "next", with a 404.
// It returns the base URL for an SDK.
func startDemo(t *testing.T, directive string) string {
	t.Helper()
	addr := freeAddress(t)
	config, err := adapt(fmt.Sprintf(`{
	admin off
	persist_config off
	skip_install_trust
	default_bind 127.0.0.1
	log {
		level ERROR
	}
}

http://%s {
	route {
		%s
		respond next 404
	}
}
`, addr, directive))
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	return "http://" + addr + "/v1"
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// adapt treats warnings as errors.
func adapt(text string) ([]byte, error) {
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), nil)
	if err == nil && len(warnings) > 0 {
		err = fmt.Errorf("adapting: %s", warnings[0].Message)
	}
	return config, err
}

func sdk(baseURL string) openai.Client {
	return openai.NewClient(option.WithBaseURL(baseURL), option.WithAPIKey("any"), option.WithMaxRetries(0))
}

func says(text string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model:    "demo/model",
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(text)},
	}
}

func complete(t *testing.T, baseURL string, params openai.ChatCompletionNewParams) *openai.ChatCompletion {
	t.Helper()
	client := sdk(baseURL)
	completion, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	if len(completion.Choices) != 1 {
		t.Fatalf("got %d choices, want 1", len(completion.Choices))
	}
	return completion
}

// streamed is what the SDK makes of a stream.
func streamed(t *testing.T, baseURL string, params openai.ChatCompletionNewParams) *openai.ChatCompletion {
	t.Helper()
	params.StreamOptions.IncludeUsage = openai.Bool(true)
	client := sdk(baseURL)
	stream := client.Chat.Completions.NewStreaming(t.Context(), params)
	var all openai.ChatCompletionAccumulator
	for stream.Next() {
		if !all.AddChunk(stream.Current()) {
			t.Fatalf("the SDK does not accept the frame %s", stream.Current().RawJSON())
		}
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	if len(all.Choices) != 1 {
		t.Fatalf("got %d choices, want 1", len(all.Choices))
	}
	return &all.ChatCompletion
}

func post(t *testing.T, url, body string) (status int, answer string) {
	t.Helper()
	resp, err := http.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(read)
}

func TestCompletionRepeatsWhatTheUserSaid(t *testing.T) {
	got := complete(t, startDemo(t, "demo_model"), says("How <are> you?"))

	choice := got.Choices[0]
	if !strings.HasSuffix(choice.Message.Content, "You said: How <are> you?") {
		t.Errorf("got content %q", choice.Message.Content)
	}
	if choice.FinishReason != "stop" || choice.Message.Role != "assistant" {
		t.Errorf("got finish reason %q, role %q", choice.FinishReason, choice.Message.Role)
	}
	if got.Model != "demo/model" || got.Object != "chat.completion" || time.Since(time.Unix(got.Created, 0)) > time.Hour {
		t.Errorf("got model %q, object %q, created %d", got.Model, got.Object, got.Created)
	}
	said := int64(len(strings.Fields(choice.Message.Content)))
	if u := got.Usage; u.PromptTokens != 4 || u.CompletionTokens != said || u.TotalTokens != 4+said {
		t.Errorf("got usage %s, want 4 prompt tokens and %d completion tokens", u.RawJSON(), said)
	}
}

func TestSameRequestGetsSameAnswer(t *testing.T) {
	url := startDemo(t, "demo_model")
	first, second := complete(t, url, says("one")), complete(t, url, says("one"))
	other := complete(t, url, says("two"))
	if first.ID != second.ID || first.Choices[0].Message.Content != second.Choices[0].Message.Content {
		t.Errorf("got %s and %s for the same request", first.RawJSON(), second.RawJSON())
	}
	if other.ID == first.ID {
		t.Errorf("got id %s for two different requests", other.ID)
	}
}

func TestPartsOfAMessageAreRead(t *testing.T) {
	image := openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: "data:image/png;base64,AA=="})
	message := openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{openai.TextContentPart("Look!"), image})
	got := complete(t, startDemo(t, "demo_model"), openai.ChatCompletionNewParams{
		Messages: []openai.ChatCompletionMessageParamUnion{openai.SystemMessage("Be brief."), message},
	})
	if text := got.Choices[0].Message.Content; !strings.HasSuffix(text, "I see 1 image. You said: Look!") {
		t.Errorf("got content %q", text)
	}
}

func TestMaxTokensCutsTheAnswer(t *testing.T) {
	url := startDemo(t, "demo_model 0")
	for _, tc := range []struct {
		name               string
		tokens, completion int64
		want               string
	}{
		{name: "max_tokens", tokens: 2, want: "Hello from"},
		{name: "max_completion_tokens", completion: 3, want: "Hello from the"},
		{name: "max_completion_tokens wins", tokens: 5, completion: 1, want: "Hello"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			params := says("hi")
			if tc.tokens > 0 {
				params.MaxTokens = openai.Int(tc.tokens)
			}
			if tc.completion > 0 {
				params.MaxCompletionTokens = openai.Int(tc.completion)
			}
			for _, got := range []*openai.ChatCompletion{complete(t, url, params), streamed(t, url, params)} {
				if got.Choices[0].Message.Content != tc.want || got.Choices[0].FinishReason != "length" {
					t.Errorf("got %q, finish reason %q", got.Choices[0].Message.Content, got.Choices[0].FinishReason)
				}
				if want := int64(len(strings.Fields(tc.want))); got.Usage.CompletionTokens != want {
					t.Errorf("got %d completion tokens, want %d", got.Usage.CompletionTokens, want)
				}
			}
		})
	}
}

func TestMaxTokensThatSufficeCutNothing(t *testing.T) {
	url := startDemo(t, "demo_model 0")
	params := says("hi")
	whole := complete(t, url, params)
	params.MaxTokens = openai.Int(whole.Usage.CompletionTokens)
	got := complete(t, url, params)
	if got.Choices[0].Message.Content != whole.Choices[0].Message.Content || got.Choices[0].FinishReason != "stop" {
		t.Errorf("got %q, finish reason %q", got.Choices[0].Message.Content, got.Choices[0].FinishReason)
	}
}

func TestStructuredOutputMatchesItsSchema(t *testing.T) {
	params := says("Ada Lovelace")
	params.ResponseFormat.OfJSONSchema = &shared.ResponseFormatJSONSchemaParam{
		JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{
			Name:   "person",
			Strict: openai.Bool(true),
			Schema: json.RawMessage(`{
				"type": "object", "additionalProperties": false, "required": ["name", "age", "role", "tags"],
				"properties": {"name": {"type": "string"}, "age": {"type": "integer"},
					"role": {"type": "string", "enum": ["admin", "guest"]}, "tags": {"type": "array", "items": {"type": "string"}}}}`),
		},
	}
	url := startDemo(t, "demo_model 0")
	for _, got := range []*openai.ChatCompletion{complete(t, url, params), streamed(t, url, params)} {
		const want = `{"age":1,"name":"Ada Lovelace","role":"admin","tags":[]}`
		if text := got.Choices[0].Message.Content; text != want {
			t.Errorf("got %s, want %s", text, want)
		}
	}
}

func TestJSONModeAnswersWithAnObject(t *testing.T) {
	params := says(`say "hi"`)
	params.ResponseFormat.OfJSONObject = &shared.ResponseFormatJSONObjectParam{}
	got := complete(t, startDemo(t, "demo_model 0"), params)
	if text := got.Choices[0].Message.Content; text != `{"answer":"say \"hi\""}` {
		t.Errorf("got %s", text)
	}
}

func TestRequestsThatCannotBeAnsweredAreRefusedInOpenAIsForm(t *testing.T) {
	url := startDemo(t, "demo_model") + "/chat/completions"
	const hi = `"messages":[{"role":"user","content":"hi"}]`
	for name, body := range map[string]string{
		"not JSON":            `hello`,
		"nothing":             ``,
		"not an object":       `[]`,
		"null":                `null`,
		"no messages":         `{"model":"m"}`,
		"empty messages":      `{"messages":[]}`,
		"content is a number": `{"messages":[{"role":"user","content":1}]}`,
		"max_tokens 0":        `{` + hi + `,"max_tokens":0}`,
		"unknown tool forced": `{` + hi + `,"tool_choice":{"type":"function","function":{"name":"x"}}}`,
		"tool without tools":  `{` + hi + `,"tool_choice":"required"}`,
		"tool without a name": `{` + hi + `,"tools":[{"type":"function","function":{}}]}`,
	} {
		status, answer := post(t, url, body)
		var envelope struct {
			Error struct{ Message, Type string }
		}
		if err := json.Unmarshal([]byte(answer), &envelope); err != nil {
			t.Errorf("%s: got %q: %v", name, answer, err)
		}
		if status != http.StatusBadRequest || envelope.Error.Type != "invalid_request_error" || envelope.Error.Message == "" {
			t.Errorf("%s: got %d %s", name, status, answer)
		}
	}
}

func TestSDKSeesARefusalAsAnError(t *testing.T) {
	client := sdk(startDemo(t, "demo_model"))
	_, err := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{})
	refusal, ok := errors.AsType[*openai.Error](err)
	if !ok || refusal.StatusCode != http.StatusBadRequest || !strings.Contains(refusal.Message, "messages") {
		t.Errorf("got error %v", err)
	}
}

func TestBodyOverTheLimitIsRefused(t *testing.T) {
	body := `{"messages":[{"role":"user","content":"` + strings.Repeat("x", maxDemoBody) + `"}]}`
	r := httptest.NewRequest(http.MethodPost, "/chat/completions", strings.NewReader(body))
	w := httptest.NewRecorder()
	if err := new(DemoModel).ServeHTTP(w, r, nil); err != nil {
		t.Fatal(err)
	}
	if w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("got status %d", w.Code)
	}
}

func TestOtherRequestsGoToTheNextHandler(t *testing.T) {
	url := strings.TrimSuffix(startDemo(t, "demo_model"), "/v1")
	resp, err := http.Get(url + "/v1/chat/completions")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("GET: got status %d", resp.StatusCode)
	}
	if status, answer := post(t, url+"/v1/models", "{}"); status != http.StatusNotFound || answer != "next" {
		t.Errorf("another path: got %d %q", status, answer)
	}
	if status, _ := post(t, url+"/any/prefix/chat/completions", `{"messages":[{"role":"user"}]}`); status != http.StatusOK {
		t.Errorf("another prefix: got status %d", status)
	}
}
