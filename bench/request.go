//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// sentence is what the requests ask, without what they ask of the upstream.
const sentence = "Please read this carefully and tell me in a few words what you make of it. "

// completionRequest is a whole request for an answer in one piece, with a prompt of about that many bytes.
func (t *target) completionRequest(promptSize int) []byte { return t.request(filler(promptSize), "") }

// streamRequest is a whole request for a stream.
func (t *target) streamRequest(promptSize int, wanted frames) []byte {
	return t.request(wanted.prompt()+filler(promptSize), `"stream":true,"stream_options":{"include_usage":true},`)
}

func filler(size int) string { return strings.Repeat(sentence, 1+size/len(sentence))[:max(size, 1)] }

// request has the header that OpenAI's SDKs send.
func (t *target) request(prompt, more string) []byte {
	model := t.model
	if model == "" {
		model = "bench/model"
	}
	said, err := json.Marshal(prompt)
	if err != nil {
		panic(err) // it is a string
	}
	body := fmt.Sprintf(`{"model":%q,%s"temperature":0.7,"max_tokens":500,"messages":[{"role":"system","content":"You are a helpful assistant."},`+
		`{"role":"user","content":%s}]}`, model, more, said)
	header := fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nAccept: application/json\r\nContent-Type: application/json\r\n"+
		"User-Agent: OpenAI/Python 2.0.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Runtime: CPython\r\nContent-Length: %d\r\n", t.address, len(body))
	for _, line := range t.header {
		header += line + "\r\n"
	}
	return []byte(header + "\r\n" + body)
}
