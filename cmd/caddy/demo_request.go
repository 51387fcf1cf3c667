package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// demoRequest is what the demo model reads of a chat request. Members it does not name have no effect.
type demoRequest struct {
	Model         string        `json:"model"`
	Messages      []demoMessage `json:"messages"`
	Stream        bool          `json:"stream"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`

	// At most this many words; nil is no limit. The first is OpenAI's newer name for the second, and wins.
	MaxCompletionTokens *int `json:"max_completion_tokens"`
	MaxTokens           *int `json:"max_tokens"`

	Tools      []demoTool     `json:"tools"`
	ToolChoice demoToolChoice `json:"tool_choice"`

	ResponseFormat struct {
		Type       string `json:"type"`
		JSONSchema struct {
			Schema any `json:"schema"`
		} `json:"json_schema"`
	} `json:"response_format"`
}

type demoMessage struct {
	Role    string      `json:"role"`
	Content demoContent `json:"content"`
}

type demoTool struct {
	Function struct {
		Name       string `json:"name"`
		Parameters any    `json:"parameters"`
	} `json:"function"`
}

// demoContent is a message's content: a string, null, or a list of parts.
type demoContent struct {
	text   string // of parts: joined with a space
	images int
}

func (c *demoContent) UnmarshalJSON(raw []byte) error {
	if raw[0] == '"' {
		return json.Unmarshal(raw, &c.text)
	}
	var parts []struct{ Type, Text string }
	if err := json.Unmarshal(raw, &parts); err != nil {
		return fmt.Errorf("content is neither a string nor a list of parts: %w", err)
	}
	var texts []string
	for _, part := range parts {
		switch part.Type {
		case "text":
			texts = append(texts, part.Text)
		case "image_url":
			c.images++
		}
	}
	c.text = strings.Join(texts, " ")
	return nil
}

// demoToolChoice is one of the words auto, none and required, or the name of the tool to call.
type demoToolChoice struct {
	word     string
	function string
}

func (c *demoToolChoice) UnmarshalJSON(raw []byte) error {
	if raw[0] == '"' {
		return json.Unmarshal(raw, &c.word)
	}
	var named struct {
		Function struct{ Name string }
	}
	if err := json.Unmarshal(raw, &named); err != nil {
		return fmt.Errorf("tool_choice is neither a string nor an object: %w", err)
	}
	c.function = named.Function.Name
	return nil
}

// readDemoRequest returns an error that is meant for the client if the body is not a request that can be answered.
func readDemoRequest(body []byte) (*demoRequest, error) {
	req := &demoRequest{}
	if err := json.Unmarshal(body, req); err != nil {
		return nil, fmt.Errorf("the body is not a chat request in JSON: %w", err)
	}
	if len(req.Messages) == 0 {
		return nil, errors.New("messages must have at least one message")
	}
	if limit := req.limit(); limit != nil && *limit < 1 {
		return nil, errors.New("max_tokens and max_completion_tokens must be at least 1")
	}
	if req.tool("") != nil {
		return nil, errors.New("tools must be functions, each with a name")
	}
	if name := req.ToolChoice.function; name != "" && req.tool(name) == nil {
		return nil, fmt.Errorf("tool_choice names the tool %q, which is not in tools", name)
	}
	if req.ToolChoice.word == "required" && len(req.Tools) == 0 {
		return nil, errors.New("tool_choice is required, but there are no tools")
	}
	if req.Model == "" {
		req.Model = "demo"
	}
	return req, nil
}

func (r *demoRequest) limit() *int {
	if r.MaxCompletionTokens != nil {
		return r.MaxCompletionTokens
	}
	return r.MaxTokens
}

func (r *demoRequest) tool(name string) *demoTool {
	i := slices.IndexFunc(r.Tools, func(t demoTool) bool { return t.Function.Name == name })
	if i < 0 {
		return nil
	}
	return &r.Tools[i]
}

// promptTokens is one for each word and each message.
func (r *demoRequest) promptTokens() int {
	n := len(r.Messages)
	for _, m := range r.Messages {
		n += len(strings.Fields(m.Content.text))
	}
	return n
}

func (r *demoRequest) last() demoMessage { return r.Messages[len(r.Messages)-1] }

// said is what the user said last; nothing if the user said nothing.
func (r *demoRequest) said() demoContent {
	for _, m := range slices.Backward(r.Messages) {
		if m.Role == "user" {
			return m.Content
		}
	}
	return demoContent{}
}

// toolToCall returns nil if the answer to r is text.
func (r *demoRequest) toolToCall() *demoTool {
	if len(r.Tools) == 0 || r.ToolChoice.word == "none" || r.last().Role != "user" {
		return nil
	}
	if name := r.ToolChoice.function; name != "" {
		return r.tool(name)
	}
	for i := range r.Tools {
		if mentions(r.last().Content.text, r.Tools[i].Function.Name) {
			return &r.Tools[i]
		}
	}
	if r.ToolChoice.word == "required" {
		return &r.Tools[0]
	}
	return nil
}

// mentions tells whether name is one of the words of text. Case does not matter.
func mentions(text, name string) bool {
	words := strings.FieldsFunc(text, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-'
	})
	return slices.ContainsFunc(words, func(word string) bool { return strings.EqualFold(word, name) })
}
