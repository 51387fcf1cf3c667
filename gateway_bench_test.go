package mesh

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// sides are what is compared: the gateway, and what it cannot be faster than.
var sides = []struct{ name, site string }{
	{"bare", "reverse_proxy $UPSTREAM"},
	{"mesh", site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}")},
}

// benchmark sends body through each side as fast as it goes, 16 requests at a time.
func benchmark(b *testing.B, up *upstream, body string) {
	transport := http.DefaultTransport.(*http.Transport)
	transport.MaxIdleConnsPerHost, transport.DisableKeepAlives = 100, false
	for _, side := range sides {
		b.Run(side.name, func(b *testing.B) {
			g := startGateway(b, up.address(), side.site)
			b.SetParallelism(8)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					resp := g.send(http.MethodPost, "/v1/chat/completions", body)
					if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
						b.Error(resp.Status, err)
					}
					resp.Body.Close()
				}
			})
		})
	}
}

// quiet runs a provider that does not keep what it receives.
func quiet(b *testing.B, h http.HandlerFunc) *upstream {
	return startUpstream(b, func(w http.ResponseWriter, r *http.Request) { h(w, r) })
}

func BenchmarkCompletion(b *testing.B) {
	benchmark(b, quiet(b, answers(200, "application/json", completion)), strings.Replace(chatBody, "plain", "priced", 1))
}

func BenchmarkStreamOf100Frames(b *testing.B) {
	up := quiet(b, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for range 100 {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
		}
		io.WriteString(w, finishFrame+usageFrame+doneFrame)
	})
	benchmark(b, up, strings.Replace(streamBody, "plain", "priced", 1))
}

// BenchmarkStreamEvent is what one frame costs between reverse_proxy's write and the client's.
func BenchmarkStreamEvent(b *testing.B) {
	x := &exchange{w: &recorder{header: make(http.Header)}, r: new(http.Request), h: new(Handler)}
	a := newAnswer(x, &chatRequest{stream: true}, &candidate{})
	a.last = true
	a.header.Set("Content-Type", "text/event-stream")
	a.WriteHeader(http.StatusOK)
	a.x.w = nowhere{}
	frame := []byte(wordFrame)
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		a.Write(frame)
	}
}

// nowhere is a client's side that keeps nothing.
type nowhere struct{}

func (nowhere) Header() http.Header         { return nil }
func (nowhere) WriteHeader(int)             {}
func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
