package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/ssestream"
	"github.com/openai/openai-go/v3/shared"
)

// sdkSite is a gateway that serves openai/* and nothing else.
const sdkSite = `http://$ADDRESS {
	mesh {
		store local $DIR/mesh.db
		key ` + testKey + ` {
			name tester
		}
		key ` + otherKey + ` {
			name limited
			models openai/gpt-4o
			rpm 1
		}
		upstream openai http://$UPSTREAM/v1 {
			api_key sk-upstream
		}
		model openai/* openai
		model openai/gpt-4o openai {
			price 2.50 10.00
		}
		model openai/gpt-4.1 openai {
			context_length 1047576
		}
	}
}
`

// sdk is OpenAI's official client as an application has it: only told where the API is, and with which key.
type sdk struct {
	openai.Client
	mu   sync.Mutex
	sent [][]byte // every body, in its own bytes
}

// newSDK returns a client that does not try again, unless the options say so.
func newSDK(url, key string, options ...option.RequestOption) *sdk {
	s := new(sdk)
	s.Client = openai.NewClient(append([]option.RequestOption{
		option.WithBaseURL(url + "/v1"), option.WithAPIKey(key), option.WithMaxRetries(0),
		option.WithHTTPClient(&http.Client{Transport: s}),
	}, options...)...)
	return s
}

// RoundTrip notes the request's body on its way out.
func (s *sdk) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		r.Body.Close()
		r.Body = io.NopCloser(bytes.NewReader(body))
		s.mu.Lock()
		s.sent = append(s.sent, body)
		s.mu.Unlock()
	}
	return http.DefaultTransport.RoundTrip(r)
}

// checkUpstream compares what the upstream received with what the client sent, but for what the gateway edits: the
// model's name, and added, which stands at the end of the object.
func (s *sdk) checkUpstream(t *testing.T, up *upstream, added string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	received := up.received()
	if len(received) != len(s.sent) {
		t.Fatalf("the client sent %d requests, the upstream received %d", len(s.sent), len(received))
	}
	for i, sent := range s.sent {
		const model = `"model":"openai/`
		if bytes.Count(sent, []byte(model)) != 1 {
			t.Fatalf("the client sent %s", sent)
		}
		want := strings.Replace(string(sent), model, `"model":"`, 1)
		want = strings.TrimSuffix(want, "}") + added + "}"
		if string(received[i].body) != want {
			t.Errorf("the upstream received\n%s\nwant\n%s", received[i].body, want)
		}
	}
}

// plays is an upstream's handler that answers the n-th request with the n-th of the files in testdata/answers, and
// with the last one when there is no other. Streams come frame by frame.
func plays(t *testing.T, files ...string) http.HandlerFunc {
	t.Helper()
	var texts [][]byte
	for _, name := range files {
		texts = append(texts, recorded(t, name))
	}
	var asked atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) {
		i := min(int(asked.Add(1)), len(files)) - 1
		if filepath.Ext(files[i]) == ".json" {
			answers(http.StatusOK, "application/json", string(texts[i]))(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		for frame := range bytes.SplitAfterSeq(texts[i], []byte("\n\n")) {
			w.Write(frame)
			http.NewResponseController(w).Flush()
		}
	}
}

func recorded(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "answers", name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const hello = "Hello! How can I assist you today? 🙂" // of completion.json and completion.sse

// asking returns a request as an application builds it.
func asking(model string, messages ...openai.ChatCompletionMessageParamUnion) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{Model: model, Messages: messages}
}

var greeting = []openai.ChatCompletionMessageParamUnion{
	openai.SystemMessage("You are a helpful assistant."), openai.UserMessage("Hello! <é> \u2028 & \"quotes\""),
}

func TestSDKCompletes(t *testing.T) {
	up := startUpstream(t, plays(t, "completion.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o", greeting...)
	params.Temperature = openai.Float(0.7)
	params.Seed = openai.Int(-9007199254740991)
	params.MaxCompletionTokens = openai.Int(100)
	params.Metadata = shared.Metadata{"topic": "demo"}
	params.Stop = openai.ChatCompletionNewParamsStopUnion{OfStringArray: []string{"\n", "END"}}
	params.LogitBias = map[string]int64{"50256": -100}
	params.ReasoningEffort = shared.ReasoningEffortLow
	got, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	if got.Choices[0].Message.Content != hello || got.Choices[0].FinishReason != "stop" || got.Usage.TotalTokens != 29 {
		t.Errorf("%s", got.RawJSON())
	}
	client.checkUpstream(t, up, "")

	// 19 × 2.50 + 10 × 10.00, per million; and the client still reads the rest as it was
	want := strings.TrimSuffix(strings.TrimSpace(string(recorded(t, "completion.json"))), "}") + `,"cost":"0.0001475"}`
	if got.RawJSON() != want {
		t.Errorf("got %s\nwant %s", got.RawJSON(), want)
	}
}

// TestSDKMaySendWhateverElseTheAPIKnows sends what the gateway has no use of its own for.
func TestSDKMaySendWhateverElseTheAPIKnows(t *testing.T) {
	up := startUpstream(t, plays(t, "completion.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o",
		openai.DeveloperMessage("Be brief."),
		openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
			openai.TextContentPart(""),
			openai.InputAudioContentPart(openai.ChatCompletionContentPartInputAudioInputAudioParam{Data: "UklGRg==", Format: "wav"}),
			openai.FileContentPart(openai.ChatCompletionContentPartFileFileParam{FileID: openai.String("file-abc")}),
		}),
		openai.ChatCompletionMessageParamUnion{OfAssistant: &openai.ChatCompletionAssistantMessageParam{
			Audio: openai.ChatCompletionAssistantMessageParamAudio{ID: "audio_abc"}, Refusal: openai.String("No."),
		}},
		openai.UserMessage("Again"),
	)
	params.Audio = openai.ChatCompletionAudioParam{
		Format: openai.ChatCompletionAudioParamFormatPcm16,
		Voice:  openai.ChatCompletionAudioParamVoiceUnion{OfChatCompletionAudioVoiceID: &openai.ChatCompletionAudioParamVoiceID{ID: "voice_1234"}},
	}
	params.Modalities = []string{"text", "audio"}
	params.FrequencyPenalty, params.PresencePenalty = openai.Float(-2), openai.Float(2)
	params.Logprobs, params.TopLogprobs = openai.Bool(true), openai.Int(20)
	params.N = openai.Int(1)
	params.Prediction = openai.ChatCompletionPredictionContentParam{
		Content: openai.ChatCompletionPredictionContentContentUnionParam{OfString: openai.String("Hello")},
	}
	params.PromptCacheKey, params.SafetyIdentifier = openai.String("cache-1"), openai.String("person-1")
	params.ServiceTier = openai.ChatCompletionNewParamsServiceTierAuto
	params.Store = openai.Bool(false)
	params.Tools = []openai.ChatCompletionToolUnionParam{weatherTool}
	params.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAllowedTools: &openai.ChatCompletionAllowedToolChoiceParam{
		AllowedTools: openai.ChatCompletionAllowedToolsParam{
			Mode: openai.ChatCompletionAllowedToolsModeAuto, Tools: []map[string]any{{"type": "function", "function": map[string]any{"name": "get_current_weather"}}},
		},
	}}
	params.TopP = openai.Float(1e-7)
	params.User = openai.String("user-1234")
	params.Verbosity = openai.ChatCompletionNewParamsVerbosityLow
	params.WebSearchOptions = openai.ChatCompletionNewParamsWebSearchOptions{SearchContextSize: "low"}
	params.SetExtraFields(map[string]any{"of_a_later_year": map[string]any{"deep": []any{1.50, nil}}})
	if _, err := client.Chat.Completions.New(t.Context(), params); err != nil {
		var refused *openai.Error
		errors.As(err, &refused)
		t.Fatal(err, refused.RawJSON())
	}
	client.checkUpstream(t, up, "")
	if body := up.last(t).body; !bytes.Contains(body, []byte(`"of_a_later_year":{"deep":[1.5,null]}`)) {
		t.Errorf("the upstream received %s", body)
	}
}

// drain reads a stream to its end.
func drain(stream *ssestream.Stream[openai.ChatCompletionChunk]) (acc openai.ChatCompletionAccumulator, chunks []openai.ChatCompletionChunk, err error) {
	defer stream.Close()
	for stream.Next() {
		chunks = append(chunks, stream.Current())
		if !acc.AddChunk(stream.Current()) {
			return acc, chunks, fmt.Errorf("the accumulator refuses %s", stream.Current().RawJSON())
		}
	}
	return acc, chunks, stream.Err()
}

func TestSDKStreams(t *testing.T) {
	for _, includeUsage := range []bool{false, true} {
		t.Run(fmt.Sprintf("usage %v", includeUsage), func(t *testing.T) {
			up := startUpstream(t, plays(t, "completion.sse"))
			p := startProcess(t, up.address(), sdkSite)
			client := newSDK(p.url, testKey)
			params := asking("openai/gpt-4o", greeting...)
			added := `,"stream_options":{"include_usage":true}`
			if includeUsage {
				params.StreamOptions.IncludeUsage = openai.Bool(true)
				added = ""
			}
			acc, chunks, err := drain(client.Chat.Completions.NewStreaming(t.Context(), params))
			if err != nil {
				t.Fatal(err)
			}
			if acc.Choices[0].Message.Content != hello || acc.Choices[0].FinishReason != "stop" {
				t.Errorf("%+v", acc.Choices)
			}
			last := chunks[len(chunks)-1]
			if reported := acc.Usage.TotalTokens == 29; reported != includeUsage || (len(last.Choices) == 0) != includeUsage {
				t.Errorf("usage %d, the last frame is %s", acc.Usage.TotalTokens, last.RawJSON())
			}
			if cost := last.JSON.ExtraFields["cost"]; includeUsage && cost.Raw() != `"0.0001475"` {
				t.Errorf("the last frame is %s", last.RawJSON())
			}
			client.checkUpstream(t, up, added)
		})
	}
}

func TestSDKSendsImages(t *testing.T) {
	up := startUpstream(t, plays(t, "image.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	const pixel = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
	var parts []openai.ChatCompletionContentPartUnionParam
	for _, image := range []openai.ChatCompletionContentPartImageImageURLParam{
		{URL: pixel}, {URL: pixel, Detail: "low"}, {URL: pixel, Detail: "high"},
		{URL: "https://upload.example.com/boardwalk.jpg?a=1&b=<2>", Detail: "auto"},
	} {
		parts = append(parts, openai.ImageContentPart(image))
	}
	parts = append(parts, openai.TextContentPart("What is in these images?"))
	got, err := client.Chat.Completions.New(t.Context(), asking("openai/gpt-4.1", openai.UserMessage(parts)))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(got.Choices[0].Message.Content, "boardwalk") || got.Usage.PromptTokens != 1117 {
		t.Errorf("%s", got.RawJSON())
	}
	client.checkUpstream(t, up, "")
	if body := up.last(t).body; bytes.Count(body, []byte(pixel)) != 3 {
		t.Errorf("the upstream received %s", body)
	}
}

func TestSDKListsModels(t *testing.T) {
	p := startProcess(t, freeAddress(t), sdkSite)
	for key, want := range map[string][]string{testKey: {"openai/gpt-4o", "openai/gpt-4.1"}, otherKey: {"openai/gpt-4o"}} {
		client := newSDK(p.url, key)
		var got []string
		pages := client.Models.ListAutoPaging(t.Context())
		for pages.Next() {
			got = append(got, pages.Current().ID)
		}
		if err := pages.Err(); err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%v, %v", got, err)
		}
	}
	// The client escapes the slash in the path.
	model, err := newSDK(p.url, testKey).Models.Get(t.Context(), "openai/gpt-4.1")
	if err != nil {
		t.Fatal(err)
	}
	if model.ID != "openai/gpt-4.1" || model.OwnedBy != "openai" || model.Object != "model" || model.JSON.ExtraFields["context_length"].Raw() != "1047576" {
		t.Errorf("%s", model.RawJSON())
	}
	_, err = newSDK(p.url, testKey).Models.Get(t.Context(), "acme/none")
	wantError(t, err, openai.Error{StatusCode: 404, Code: "model_not_found", Type: "invalid_request_error", Param: "model", Message: `The model "acme/none" does not exist.`})
}
