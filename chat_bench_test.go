package mesh

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// conversation is a request of about 2 KB, as a chat window sends it.
func conversation() []byte {
	question := `{"role":"user","content":"How do I return an item that I bought a fortnight ago? It came in the wrong colour.\n"}`
	answer := `{"role":"assistant","content":"That is easily done: open \"My orders\", choose the item, and print the label we offer you there."}`
	turns := strings.Repeat(","+question+","+answer, 8)
	return []byte(`{"model":"openai/gpt-4o","stream":true,"temperature":0.5,"max_tokens":512,"session_id":"s-1",` +
		`"messages":[{"role":"system","content":"You are a support agent."}` + turns + `]}`)
}

// picture is a request of size bytes, nearly all of them one image.
func picture(size int) []byte {
	return []byte(`{"model":"openai/gpt-4o","messages":[{"role":"user","content":[{"type":"text","text":"What is this?"},` +
		`{"type":"image_url","image_url":{"url":"data:image/png;base64,` + strings.Repeat("iVBORw0KGgoAAAANSUhEUgAA", size/24) + `"}}]}]}`)
}

func benchmarkParse(b *testing.B, body []byte) {
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseChat(body); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseChat(b *testing.B) {
	b.Run("conversation of 2 KB", func(b *testing.B) { benchmarkParse(b, conversation()) })
	b.Run("image of 10 MB", func(b *testing.B) { benchmarkParse(b, picture(10<<20)) })
	b.Run("text of 10 MB with escapes", func(b *testing.B) {
		benchmarkParse(b, []byte(`{"messages":[{"role":"user","content":"`+strings.Repeat(`line \"one\" is here\n`, 10<<20/21)+`"}]}`))
	})
}

// BenchmarkLargeBody takes in a request with an image of 20 MB: what reading costs alone, and what reading and checking it
// and cutting it for the upstream costs.
func BenchmarkLargeBody(b *testing.B) {
	body := picture(20 << 20)
	request := func(declared bool) *http.Request {
		r := httptest.NewRequest(http.MethodPost, chatPath, bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		if !declared {
			r.ContentLength = -1
		}
		return r
	}
	by := &candidate{as: "gpt-4o", upstream: new(Upstream)}
	measure := func(b *testing.B, declared, checked bool) {
		b.SetBytes(int64(len(body)))
		b.ReportAllocs()
		for b.Loop() {
			read, refusal := readBody(httptest.NewRecorder(), request(declared), 32<<20)
			if refusal != nil {
				b.Fatal(refusal)
			}
			if !checked {
				continue
			}
			req, refusal := parseChat(read)
			if refusal != nil {
				b.Fatal(refusal)
			}
			if _, size := req.segmentsFor(by); size != int64(len(body)-len("openai/")) {
				b.Fatal(size)
			}
		}
	}
	b.Run("read", func(b *testing.B) { measure(b, true, false) })
	b.Run("read and checked", func(b *testing.B) { measure(b, true, true) })
	b.Run("read, of unknown length", func(b *testing.B) { measure(b, false, false) })
}
