package mesh

import (
	"bytes"
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
)

// maxTraceContent is how many bytes of text of the prompt, and of the answer, a span may have.
const maxTraceContent = 16 << 10

// maxTraceChoices is how many choices of an answer a span tells apart.
const maxTraceChoices = 16

// answerContent is what a span says of an answer.
type answerContent struct {
	id, model string
	choices   []choiceContent
	used      int // bytes of text, of all choices
}

type choiceContent struct {
	text   []byte
	finish string
}

// read takes in a chat.completion, or a chat.completion.chunk. It is for traced requests only, whose frames are read
// twice.
func (a *answerContent) read(payload []byte, text bool) {
	c := cursor{data: payload, maxDepth: maxAnswerDepth}
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "id":
			c.textOnce(&a.id)
		case "model":
			c.textOnce(&a.model)
		case "choices":
			c.eachOf(func() { a.choice(&c, text) })
		default:
			c.skip()
		}
	})
}

// textOnce keeps the first string that is not empty. It is the upstream's: what it says at length is not kept whole.
func (c *cursor) textOnce(to *string) {
	const enough = 256
	if c.peek() != '"' || *to != "" {
		c.skip()
		return
	}
	raw, _ := c.str()
	*to = string(clip(raw, enough))
}

// choice reads one of the choices.
func (a *answerContent) choice(c *cursor, text bool) {
	index, one := int64(0), choiceContent{}
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "index":
			index, _ = c.natural()
		case "finish_reason":
			c.textOnce(&one.finish)
		case "delta", "message":
			if !text || a.used >= maxTraceContent {
				c.skip()
				return
			}
			c.eachMember(func(name []byte) {
				if string(name) != "content" {
					c.skip()
					return
				}
				c.eachText(func(raw []byte) { one.text = append(one.text, clip(raw, maxTraceContent-a.used-len(one.text))...) })
			})
		default:
			c.skip()
		}
	})
	a.add(index, one)
}

// add joins a choice, or a part of one, to those there are.
func (a *answerContent) add(index int64, one choiceContent) {
	if index >= maxTraceChoices || one.finish == "" && len(one.text) == 0 {
		return
	}
	for int64(len(a.choices)) <= index {
		a.choices = append(a.choices, choiceContent{})
	}
	to := &a.choices[index]
	if one.finish != "" {
		to.finish = one.finish
	}
	to.text = append(to.text, one.text...)
	a.used += len(one.text)
}

func (a *answerContent) attributes(text bool) (list []attribute.KeyValue) {
	if a.id != "" {
		list = append(list, attrResponseID.String(a.id))
	}
	if a.model != "" {
		list = append(list, attrResponseModel.String(a.model))
	}
	var reasons []string
	messages := make([]contentMessage, 0, len(a.choices))
	for _, c := range a.choices {
		if c.finish != "" {
			reasons = append(reasons, c.finish)
		}
		messages = append(messages, contentMessage{Role: "assistant", Parts: textPart(c.text), Finish: c.finish})
	}
	if len(reasons) > 0 {
		list = append(list, attrFinishReasons.StringSlice(reasons))
	}
	if text && len(messages) > 0 {
		encoded, _ := encodeJSON(messages) // strings only: cannot fail
		list = append(list, attrOutputMessages.String(string(encoded)))
	}
	return list
}

// contentMessage is a message in the conventions' form.
type contentMessage struct {
	Role   string        `json:"role"`
	Parts  []contentPart `json:"parts"`
	Finish string        `json:"finish_reason,omitempty"`
}

type contentPart struct {
	Type    string `json:"type"`
	Content string `json:"content"`
}

func textPart(text []byte) []contentPart {
	if len(text) == 0 {
		return []contentPart{}
	}
	return []contentPart{{Type: "text", Content: string(text)}}
}

// inputMessages returns the text of a request's messages, up to maxTraceContent.
func inputMessages(body []byte) string {
	messages, room := []contentMessage{}, maxTraceContent
	c := cursor{data: body, maxDepth: maxRequestDepth}
	c.eachMember(func(name []byte) {
		if string(name) != "messages" {
			c.skip()
			return
		}
		c.eachOf(func() {
			if room <= 0 {
				c.skip()
				return
			}
			messages = append(messages, c.inputMessage(&room))
		})
	})
	encoded, _ := encodeJSON(messages) // strings only: cannot fail
	return string(encoded)
}

// inputMessage reads a message. What it has around its text takes room as well, so that many short ones find an end.
func (c *cursor) inputMessage(room *int) contentMessage {
	const around = 32
	m := contentMessage{Parts: []contentPart{}}
	*room -= around
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "role":
			c.textOnce(&m.Role)
		case "content":
			c.eachText(func(raw []byte) {
				text := clip(raw, *room)
				*room -= len(text) + around
				m.Parts = append(m.Parts, textPart(text)...)
			})
		default:
			c.skip()
		}
	})
	return m
}

// clip returns the text of a JSON string, or its first n bytes. It does not unescape more than that needs.
func clip(raw []byte, n int) []byte {
	if n <= 0 {
		return nil
	}
	const longestEscape = 6
	if most := longestEscape * n; len(raw) > most {
		raw = raw[:most]
		tail := max(0, most-longestEscape)
		if i := bytes.LastIndexByte(raw[tail:], '\\'); i >= 0 { // an escape that may be cut
			raw = raw[:tail+i]
		}
		if len(raw)-len(bytes.TrimRight(raw, "\\"))&1 == 1 { // it was the second half of one
			raw = raw[:len(raw)-1]
		}
	}
	return cut(unescape(raw), n)
}

// cut returns the first n bytes of a text, or a few less, so that no character is cut.
func cut(text []byte, n int) []byte {
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}
