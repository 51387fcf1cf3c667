package mesh

import (
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
