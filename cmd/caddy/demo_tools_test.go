package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/shared"
)

func function(name string) openai.ChatCompletionToolUnionParam {
	return openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{
		Name: name,
		Parameters: shared.FunctionParameters{
			"type":     "object",
			"required": []string{"city", "days"},
			"properties": map[string]any{
				"city": map[string]any{"type": "string"},
				"days": map[string]any{"type": "integer"},
				"unit": map[string]any{"type": "string"},
			},
		},
	})
}

func offering(text string, choice openai.ChatCompletionToolChoiceOptionUnionParam) openai.ChatCompletionNewParams {
	params := says(text)
	params.Tools = []openai.ChatCompletionToolUnionParam{function("get_time"), function("get_weather")}
	params.ToolChoice = choice
	return params
}

func TestToolRoundTrip(t *testing.T) {
	url := startDemo(t, "demo_model 0")
	for name, ask := range map[string]func(*testing.T, string, openai.ChatCompletionNewParams) *openai.ChatCompletion{
		"whole":  complete,
		"stream": streamed,
	} {
		t.Run(name, func(t *testing.T) {
			params := offering("Please use get_weather, for Paris.", openai.ChatCompletionToolChoiceOptionUnionParam{})
			asked := ask(t, url, params).Choices[0]
			if asked.FinishReason != "tool_calls" || len(asked.Message.ToolCalls) != 1 || asked.Message.Content != "" {
				t.Fatalf("got finish reason %q, message %+v", asked.FinishReason, asked.Message)
			}
			call := asked.Message.ToolCalls[0]
			if call.Type != "function" || call.Function.Name != "get_weather" || !strings.HasPrefix(call.ID, "call_") {
				t.Errorf("got call %+v", call)
			}
			if want := `{"city":"Please use get_weather, for Paris.","days":1}`; call.Function.Arguments != want {
				t.Errorf("got arguments %s, want %s", call.Function.Arguments, want)
			}

			params.Messages = append(params.Messages, asked.Message.ToParam(), openai.ToolMessage(`{"get_weather":"blue"}`, call.ID))
			told := ask(t, url, params).Choices[0]
			if told.Message.Content != `The tool answered: {"get_weather":"blue"}` || told.FinishReason != "stop" {
				t.Errorf("got %q, finish reason %q", told.Message.Content, told.FinishReason)
			}
		})
	}
}

func TestWhichToolIsCalled(t *testing.T) {
	url := startDemo(t, "demo_model 0")
	word := func(choice string) openai.ChatCompletionToolChoiceOptionUnionParam {
		return openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String(choice)}
	}
	forced := openai.ToolChoiceOptionFunctionToolChoice(openai.ChatCompletionNamedToolChoiceFunctionParam{Name: "get_weather"})
	for _, tc := range []struct {
		name, text string
		choice     openai.ChatCompletionToolChoiceOptionUnionParam
		want       string // empty: none
	}{
		{name: "named by the user", text: "GET_WEATHER!", choice: word("auto"), want: "get_weather"},
		{name: "part of another word", text: "my_get_weather_2", choice: word("auto")},
		{name: "not named", text: "hi", choice: word("auto")},
		{name: "named but forbidden", text: "get_weather", choice: word("none")},
		{name: "required", text: "hi", choice: word("required"), want: "get_time"},
		{name: "required and named", text: "get_weather", choice: word("required"), want: "get_weather"},
		{name: "forced", text: "get_time", choice: forced, want: "get_weather"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			choice := complete(t, url, offering(tc.text, tc.choice)).Choices[0]
			got := ""
			for _, call := range choice.Message.ToolCalls {
				got += call.Function.Name
			}
			if got != tc.want {
				t.Errorf("got a call of %q, want %q", got, tc.want)
			}
		})
	}
}

func TestStreamedToolCallHasOpenAIsFrames(t *testing.T) {
	url := startDemo(t, "demo_model 0") + "/chat/completions"
	_, stream := post(t, url, `{"model":"m","stream":true,"messages":[{"role":"user","content":"f now"}],"tools":[{"type":"function",
		"function":{"name":"f","parameters":{"type":"object","required":["a"],"properties":{"a":{"type":"string"}}}}}]}`)

	_, id, _ := strings.Cut(stream, `"id":"call_`)
	id, _, _ = strings.Cut(id, `"`)
	const delta = `"choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]`
	wantFrames(t, stream, []string{
		fmt.Sprintf(delta, `{"content":null,"refusal":null,"role":"assistant","tool_calls":[{"function":{"arguments":"","name":"f"},"id":"call_`+
			id+`","index":0,"type":"function"}]}`, `null`),
		fmt.Sprintf(delta, `{"tool_calls":[{"function":{"arguments":"{\"a\":\"f"},"index":0}]}`, `null`),
		fmt.Sprintf(delta, `{"tool_calls":[{"function":{"arguments":" now\"}"},"index":0}]}`, `null`),
		fmt.Sprintf(delta, `{}`, `"tool_calls"`),
	})
}
