package mesh

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// madeImages is the answer of an upstream's images API. Strings are as they stand in its JSON.
type madeImages struct {
	created int64
	format  string // of those that are in the answer itself, such as png
	prompt  []byte // what the upstream has made of the prompt; nil where it does not say
	images  []madeImage

	input, output, total int64 // tokens
}

type madeImage struct {
	url    []byte
	inline []byte // Base64, where there is no URL
}

// readImages reads the answer, and reports whether it is one, with an image at least.
func readImages(body []byte) (m madeImages, ok bool) {
	c := cursor{data: body, maxDepth: maxAnswerDepth}
	failed := false
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "created":
			m.created, _ = c.natural()
		case "output_format":
			c.textOnce(&m.format)
		case "data":
			c.eachOf(func() { m.image(&c) })
		case "usage":
			m.usage(&c)
		case "error":
			failed = c.peek() != 'n'
			c.skip()
		default:
			c.skip()
		}
	})
	c.end()
	return m, c.err == nil && !failed && len(m.images) > 0
}

func (m *madeImages) image(c *cursor) {
	var one madeImage
	c.eachMember(func(name []byte) {
		switch {
		case c.peek() != '"':
			c.skip()
		case string(name) == "url":
			one.url, _ = c.str()
		case string(name) == "b64_json":
			one.inline, _ = c.str()
		case string(name) == "revised_prompt" && m.prompt == nil:
			m.prompt, _ = c.str()
		default:
			c.skip()
		}
	})
	if len(one.url)+len(one.inline) > 0 {
		m.images = append(m.images, one)
	}
}

func (m *madeImages) usage(c *cursor) {
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "input_tokens":
			m.input, _ = c.count()
		case "output_tokens":
			m.output, _ = c.count()
		case "total_tokens":
			m.total, _ = c.count()
		default:
			c.skip()
		}
	})
}

// mediaType is the type of an image that is in the answer itself: what its first bytes say, or else the answer.
func (m *madeImages) mediaType(inline []byte) string {
	const enough = 32                                                                        // characters, of which each four are three bytes; WebP shows in the fifteenth
	head := bytes.ReplaceAll(inline[:min(2*enough, len(inline))], []byte(`\/`), []byte("/")) // as some write JSON
	var decoded [enough * 3 / 4]byte
	n, _ := base64.StdEncoding.Decode(decoded[:], head[:min(enough, len(head))]) // what is no Base64 begins like no image
	if found := http.DetectContentType(decoded[:n]); strings.HasPrefix(found, "image/") {
		return found
	}
	notToken := func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') }
	if m.format == "" || strings.ContainsFunc(m.format, notToken) {
		return "image/png"
	}
	return "image/" + m.format
}

// head returns the beginning of a completion, or of a chunk of one.
func (m *madeImages) head(object, id, model string) []byte {
	o := objectWriter{buf: make([]byte, 0, 256)}
	o.text("id", id)
	o.text("object", object)
	o.number("created", cmp.Or(m.created, time.Now().Unix()))
	o.text("model", model)
	o.name("choices")
	return o.buf
}

// appendMessage appends the message, whole or as the delta of one.
func (m *madeImages) appendMessage(b []byte) []byte {
	b = append(b, `{"role":"assistant","content":`...)
	if m.prompt == nil {
		b = append(b, `null`...)
	} else {
		b = append(append(append(b, '"'), m.prompt...), '"')
	}
	b = append(b, `,"images":[`...)
	for i, one := range m.images {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"type":"image_url","image_url":{"url":"`...)
		if len(one.url) > 0 {
			b = append(b, one.url...)
		} else {
			b = append(append(append(append(b, "data:"...), m.mediaType(one.inline)...), ";base64,"...), one.inline...)
		}
		b = append(b, `"}}`...)
	}
	return append(b, "]}"...)
}

// appendUsage appends the usage. One that the upstream does not report is none: tokens of images are not estimated.
func (m *madeImages) appendUsage(b []byte) []byte {
	b = strconv.AppendInt(append(b, `,"usage":{"prompt_tokens":`...), m.input, 10)
	b = strconv.AppendInt(append(b, `,"completion_tokens":`...), m.output, 10)
	b = strconv.AppendInt(append(b, `,"total_tokens":`...), cmp.Or(m.total, m.input+m.output), 10)
	return append(b, '}')
}

// completion returns the answer as a chat.completion. size is about how long it will be.
func (m *madeImages) completion(id, model string, size int) []byte {
	b := append(make([]byte, 0, size), m.head("chat.completion", id, model)...)
	b = m.appendMessage(append(b, `[{"index":0,"message":`...))
	b = append(b, `,"finish_reason":"stop"}]`...)
	return append(m.appendUsage(b), '}')
}

// chunks returns the answer as all events of a stream.
func (m *madeImages) chunks(id, model string, size int) []byte {
	head := append([]byte("data: "), m.head("chat.completion.chunk", id, model)...)
	b := append(make([]byte, 0, size), head...)
	b = m.appendMessage(append(b, `[{"index":0,"delta":`...))
	b = append(append(b, `,"finish_reason":null}]}`+"\n\n"...), head...)
	b = append(append(b, `[{"index":0,"delta":{},"finish_reason":"stop"}]}`+"\n\n"...), head...)
	b = m.appendUsage(append(b, "[]"...))
	return append(b, "}\n\ndata: [DONE]\n\n"...)
}

// imagesBody returns the upstream's images as a completion, or as the events of one for a client that wants a stream. It
// returns nil where the upstream has made none.
func (a *answer) imagesBody() []byte {
	made, ok := readImages(a.whole.Bytes())
	if !ok {
		return nil
	}
	a.images = int64(len(made.images))
	size := a.whole.Len() + 1<<10
	a.whole = bytes.Buffer{} // images are large: once is enough
	id := "chatcmpl-" + strings.TrimPrefix(a.x.event.RequestID, "req_")
	if a.req.stream {
		return made.chunks(id, a.by.model, size)
	}
	return made.completion(id, a.by.model, size)
}

// streamImages has the events of images go out as an upstream's stream would, with the cost, and with usage for those who
// want it.
func (a *answer) streamImages(events []byte) {
	if events == nil {
		a.fault = errUnreadable
		return
	}
	if !a.claim() {
		return
	}
	a.clientGone = a.x.r.Context().Err() != nil // while the answer was drained
	a.header.Set("Content-Type", "text/event-stream")
	a.stream = newStream(a)
	a.commit()
	a.firstByte()
	a.stream.Write(events) //nolint:errcheck // a client that is gone is seen by toClient
	a.FlushError()         //nolint:errcheck // the same
}
