package main

import (
	"fmt"
	"regexp"
	"strings"
)

// demoAnswer is what the demo model says to a request.
type demoAnswer struct {
	tool   string   // the tool it calls; empty if it answers with text
	callID string   // of that call
	words  []string // of the text, or of the call's arguments: each with the white space before it
	finish string   // OpenAI's finish_reason: stop, length or tool_calls
}

// answer decides what to say. A tool call, if it comes to one, gets the id callID.
func (r *demoRequest) answer(callID string) demoAnswer {
	tool := r.toolToCall()
	if tool == nil {
		return r.cut(demoAnswer{words: words(r.text()), finish: "stop"})
	}
	return r.cut(demoAnswer{
		tool:   tool.Function.Name,
		callID: callID,
		words:  words(arguments(tool.Function.Parameters, r.said().text)),
		finish: "tool_calls",
	})
}

// cut holds the answer to the limit that the request sets. Like OpenAI's, it cuts a call's arguments too.
func (r *demoRequest) cut(a demoAnswer) demoAnswer {
	if limit := r.limit(); limit != nil && len(a.words) > *limit {
		a.words, a.finish = a.words[:*limit], "length"
	}
	return a
}

// anyAnswer is the schema of an answer that must be JSON, whatever JSON.
var anyAnswer = object{
	"type":       "object",
	"properties": object{"answer": object{"type": "string"}},
	"required":   []any{"answer"},
}

func (r *demoRequest) text() string {
	said := r.said()
	switch r.ResponseFormat.Type {
	case "json_schema":
		return filled(r.ResponseFormat.JSONSchema.Schema, said.text)
	case "json_object":
		return filled(anyAnswer, said.text)
	}
	if r.last().Role == "tool" {
		return "The tool answered: " + strings.TrimSpace(r.last().Content.text)
	}
	return greeting(said)
}

func greeting(said demoContent) string {
	text := "Hello from the demo model! I need no account and understand nothing, but your request arrived."
	switch said.images {
	case 0:
	case 1:
		text += " I see 1 image."
	default:
		text += fmt.Sprintf(" I see %d images.", said.images)
	}
	if said := strings.TrimSpace(said.text); said != "" {
		text += " You said: " + said
	}
	return text
}

var word = regexp.MustCompile(`\s*\S+`)

func words(text string) []string { return word.FindAllString(text, -1) }

// message is the answer as a whole.
func (a demoAnswer) message() object {
	said := strings.Join(a.words, "")
	if a.tool == "" {
		return object{"role": "assistant", "content": said, "refusal": nil}
	}
	return object{"role": "assistant", "content": nil, "refusal": nil, "tool_calls": []object{a.call(said)}}
}

func (a demoAnswer) call(arguments string) object {
	return object{"id": a.callID, "type": "function", "function": object{"name": a.tool, "arguments": arguments}}
}

// opening is the first delta of a stream: the role, and which tool is called.
func (a demoAnswer) opening() *object {
	if a.tool == "" {
		return &object{"role": "assistant", "content": "", "refusal": nil}
	}
	call := a.call("")
	call["index"] = 0
	return &object{"role": "assistant", "content": nil, "refusal": nil, "tool_calls": []object{call}}
}

// delta carries one word.
func (a demoAnswer) delta(word string) *object {
	if a.tool == "" {
		return &object{"content": word}
	}
	return &object{"tool_calls": []object{{"index": 0, "function": object{"arguments": word}}}}
}
