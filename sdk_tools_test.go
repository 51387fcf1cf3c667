package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/shared"
)

var weatherTool = openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
	Name:        "get_current_weather",
	Description: openai.String("Get the current weather in a given location"),
	Parameters: shared.FunctionParameters{
		"type":       "object",
		"properties": map[string]any{"location": map[string]any{"type": "string"}, "unit": map[string]any{"type": "string", "enum": []string{"celsius", "fahrenheit"}}},
		"required":   []string{"location"},
	},
})

func TestSDKCallsToolsAndBringsTheirResultsBack(t *testing.T) {
	up := startUpstream(t, plays(t, "tool_calls.json", "after_tools.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o-mini", openai.UserMessage("What's the weather like in Boston and in Zürich?"))
	params.Tools = []openai.ChatCompletionToolUnionParam{weatherTool}
	params.ParallelToolCalls = openai.Bool(true)
	params.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("auto")}
	first, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	calls := first.Choices[0].Message.ToolCalls
	if len(calls) != 2 || first.Choices[0].FinishReason != "tool_calls" {
		t.Fatalf("%s", first.RawJSON())
	}
	params.Messages = append(params.Messages, first.Choices[0].Message.ToParam())
	for i, call := range calls {
		var arguments struct{ Location, Unit string }
		if err := json.Unmarshal([]byte(call.Function.Arguments), &arguments); err != nil || arguments.Location == "" {
			t.Errorf("%s: %v", call.Function.Arguments, err)
		}
		params.Messages = append(params.Messages, openai.ToolMessage(fmt.Sprintf(`{"temperature":%d.0}`, 22-5*i), call.ID))
	}
	second, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	if got := second.Choices[0].Message.Content; got != "It is 22 °C in Boston and 17 °C in Zürich." {
		t.Errorf("%q", got)
	}
	client.checkUpstream(t, up, "")
	if body := up.last(t).body; !bytes.Contains(body, []byte(`"tool_call_id":"call_def456"`)) || !bytes.Contains(body, []byte(`{\n\"location\": \"Boston, MA\"\n}`)) {
		t.Errorf("the upstream received %s", body)
	}
}

func TestSDKStreamsToolCalls(t *testing.T) {
	up := startUpstream(t, plays(t, "tool_calls.sse"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o-mini", openai.UserMessage("What's the weather like in Boston and in Zürich?"))
	params.Tools = []openai.ChatCompletionToolUnionParam{weatherTool}
	acc, _, err := drain(client.Chat.Completions.NewStreaming(t.Context(), params))
	if err != nil {
		t.Fatal(err)
	}
	choice := acc.Choices[0]
	if choice.FinishReason != "tool_calls" || len(choice.Message.ToolCalls) != 2 {
		t.Fatalf("%+v", choice)
	}
	for i, want := range []struct{ id, arguments string }{
		{"call_abc123", `{"location":"Boston, MA"}`},
		{"call_def456", `{"location":"Zürich","unit":"celsius"}`},
	} {
		got := choice.Message.ToolCalls[i]
		if got.ID != want.id || got.Function.Name != "get_current_weather" || got.Function.Arguments != want.arguments {
			t.Errorf("call %d: %+v", i, got)
		}
	}
	client.checkUpstream(t, up, `,"stream_options":{"include_usage":true}`)
}

func TestSDKReadsStructuredOutput(t *testing.T) {
	up := startUpstream(t, plays(t, "structured.json"))
	p := startProcess(t, up.address(), sdkSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o", openai.SystemMessage("You are a helpful math tutor."), openai.UserMessage("solve 8x + 7 = -23"))
	params.ResponseFormat = structured("math_reasoning", map[string]any{
		"type": "object",
		"properties": map[string]any{
			"steps": map[string]any{"type": "array", "items": map[string]any{
				"type":       "object",
				"properties": map[string]any{"explanation": map[string]any{"type": "string"}, "output": map[string]any{"type": "string"}},
				"required":   []string{"explanation", "output"}, "additionalProperties": false,
			}},
			"final_answer": map[string]any{"type": "string"},
		},
		"required": []string{"steps", "final_answer"}, "additionalProperties": false,
	})
	got, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	var reasoning struct {
		Steps       []struct{ Explanation, Output string }
		FinalAnswer string `json:"final_answer"`
	}
	if err := json.Unmarshal([]byte(got.Choices[0].Message.Content), &reasoning); err != nil || len(reasoning.Steps) != 2 || reasoning.FinalAnswer != "x = -3.75" {
		t.Errorf("%v, %+v", err, reasoning)
	}
	client.checkUpstream(t, up, "")
}

func structured(name string, schema any) openai.ChatCompletionNewParamsResponseFormatUnion {
	return openai.ChatCompletionNewParamsResponseFormatUnion{OfJSONSchema: &shared.ResponseFormatJSONSchemaParam{
		JSONSchema: shared.ResponseFormatJSONSchemaJSONSchemaParam{Name: name, Strict: openai.Bool(true), Schema: schema},
	}}
}

// demoSite has no upstream but the model that comes with cmd/caddy.
const demoSite = `http://$ADDRESS {
	mesh {
		store local $DIR/mesh.db
		key ` + testKey + `
		upstream demo {
			handle {
				demo_model 0
			}
		}
		model demo/* demo
	}
}
`

// TestSDKTalksToTheDemoModel has no upstream but the model that comes with cmd/caddy.
func TestSDKTalksToTheDemoModel(t *testing.T) {
	p := startProcess(t, "", demoSite)
	client := newSDK(p.url, testKey)
	params := asking("demo/parrot", openai.UserMessage("Guten Tag"))
	whole, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	text := whole.Choices[0].Message.Content
	if !strings.HasSuffix(text, "You said: Guten Tag") || whole.Model != "parrot" || whole.Usage.TotalTokens == 0 {
		t.Errorf("%s", whole.RawJSON())
	}

	params.StreamOptions.IncludeUsage = openai.Bool(true)
	acc, chunks, err := drain(client.Chat.Completions.NewStreaming(t.Context(), params))
	if err != nil {
		t.Fatal(err)
	}
	if acc.Choices[0].Message.Content != text || acc.Usage.TotalTokens != whole.Usage.TotalTokens || len(chunks) < 10 {
		t.Errorf("%d chunks: %q, %d tokens", len(chunks), acc.Choices[0].Message.Content, acc.Usage.TotalTokens)
	}

	params = asking("demo/parrot", openai.UserMessage("Please use get_current_weather for me"))
	params.Tools = []openai.ChatCompletionToolUnionParam{weatherTool}
	calls, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	message := calls.Choices[0].Message
	if len(message.ToolCalls) != 1 || message.ToolCalls[0].Function.Name != "get_current_weather" {
		t.Fatalf("%s", calls.RawJSON())
	}
	params.Messages = append(params.Messages, message.ToParam(), openai.ToolMessage("sunny", message.ToolCalls[0].ID))
	after, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil || after.Choices[0].Message.Content != "The tool answered: sunny" {
		t.Errorf("%v, %+v", err, after)
	}

	params = asking("demo/parrot", openai.UserMessage("Anything"))
	params.ResponseFormat = structured("city", map[string]any{
		"type": "object", "additionalProperties": false, "required": []string{"name", "inhabitants"},
		"properties": map[string]any{"name": map[string]any{"type": "string"}, "inhabitants": map[string]any{"type": "integer"}},
	})
	formatted, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	var city struct {
		Name        *string
		Inhabitants *int
	}
	if err := json.Unmarshal([]byte(formatted.Choices[0].Message.Content), &city); err != nil || city.Name == nil || city.Inhabitants == nil {
		t.Errorf("%v in %s", err, formatted.RawJSON())
	}
}
