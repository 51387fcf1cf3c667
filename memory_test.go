package mesh

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// memory returns how many bytes the process's heap and stacks take after a garbage collection.
func (p *process) memory() (bytes int64) {
	p.t.Helper()
	for range 2 { // what a finalizer lets go is gone after the second
		profile := p.adminGet("/debug/pprof/heap?gc=1&debug=1")
		bytes = 0
		for _, name := range []string{"HeapAlloc", "Stack"} {
			_, value, _ := strings.Cut(profile, "# "+name+" = ")
			var n int64
			if _, err := fmt.Sscanf(value, "%d", &n); err != nil {
				p.t.Fatalf("%s: %v", name, err)
			}
			bytes += n
		}
	}
	return bytes
}

// TestStreamTakesTheSameMemoryHoweverLongItIs holds streams open through the gateway and through a bare
// reverse_proxy, and looks at the process's memory when they have begun and when 4,000 frames have gone by in each.
func TestStreamTakesTheSameMemoryHoweverLongItIs(t *testing.T) {
	const n, frames = 200, 4000
	var began, flowed atomic.Int32
	more, end := make(chan struct{}), make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, roleFrame)
		http.NewResponseController(w).Flush()
		began.Add(1)
		<-more
		for range frames {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
		}
		flowed.Add(1)
		<-end
	})
	measure := func(site string) (first, last int64) {
		t.Helper()
		more, end = make(chan struct{}), make(chan struct{})
		began.Store(0)
		flowed.Store(0)
		p := startProcess(t, up.address(), fmt.Sprintf(inSite, site))
		g := p.gateway()
		before := p.memory()
		var received atomic.Int64
		ended := make(chan struct{})
		body := strings.Replace(streamBody, "Hi", strings.Repeat("A question of some length. ", 400), 1) // 10 kB
		for range n {
			go func() {
				defer func() { ended <- struct{}{} }()
				resp := g.send(http.MethodPost, "/v1/chat/completions", body)
				defer resp.Body.Close()
				buf := make([]byte, 4096)
				for {
					m, err := resp.Body.Read(buf)
					received.Add(int64(m))
					if err != nil {
						return
					}
				}
			}()
		}
		eventually(t, "all streams have begun", func() bool { return began.Load() == n && received.Load() >= int64(n*len(roleFrame)) })
		first = (p.memory() - before) / n
		close(more)
		eventually(t, "all frames have gone by", func() bool {
			return flowed.Load() == n && received.Load() >= int64(n*(len(roleFrame)+frames*len(wordFrame)))
		})
		last = (p.memory() - before) / n
		close(end)
		for range n {
			<-ended
		}
		p.kill(os.Kill)
		return first, last
	}
	meshFirst, meshLast := measure(site(""))
	bareFirst, bareLast := measure("reverse_proxy $UPSTREAM {\n\ttransport http {\n\t}\n}")
	t.Logf("bytes a stream: mesh %d, then %d; bare reverse_proxy %d, then %d; ratio %.2f", meshFirst, meshLast, bareFirst, bareLast,
		float64(meshLast)/float64(bareLast))
	if grown := (meshLast - meshFirst) - (bareLast - bareFirst); grown > 8<<10 {
		t.Errorf("a stream has grown by %d bytes more than one through a bare reverse_proxy", grown)
	}
}

// TestLargeBodiesTakeTheirOwnSizeAndNoMore holds requests with images of 10 MB open at an upstream that has received them
// and does not answer. README's formula: a body takes its own size, and little else, until its answer begins or fails.
func TestLargeBodiesTakeTheirOwnSizeAndNoMore(t *testing.T) {
	n := 20
	if os.Getenv("MESH_TEST_LONG") != "" {
		n = 100
	}
	const perRequest = 128 << 10 // beside the body
	for _, streamed := range []bool{false, true} {
		var received atomic.Int32
		end := make(chan struct{})
		up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if streamed {
				answers(200, "text/event-stream", roleFrame+wordFrame)(w, r)
				http.NewResponseController(w).Flush()
			}
			received.Add(1)
			<-end
			io.WriteString(w, finishFrame+doneFrame)
		})
		p := startProcess(t, up.address(), fmt.Sprintf(inSite, site("")))
		g := p.gateway()
		body := strings.Replace(string(picture(10<<20)), "openai/gpt-4o", "test/plain", 1)
		if streamed {
			body = strings.Replace(body, "{", `{"stream":true,`, 1)
		}
		before := p.memory()
		ended := make(chan struct{})
		for range n {
			go func() {
				defer func() { ended <- struct{}{} }()
				resp := g.send(http.MethodPost, "/v1/chat/completions", body)
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}()
		}
		eventually(t, "the upstream has all bodies", func() bool { return received.Load() == int32(n) })
		most := int64(n) * int64(len(body)+perRequest)
		if streamed { // what has begun to be answered is not sent again
			most = int64(n) * perRequest
		}
		var held int64
		eventually(t, fmt.Sprintf("%d requests take at most %d bytes", n, most), func() bool {
			held = p.memory() - before
			return held <= most
		})
		t.Logf("%d requests of %d bytes, streams %v: %d bytes each beside the body; the process's peak: %s", n, len(body), streamed,
			(held-int64(n*len(body)))/int64(n), p.peak())
		close(end)
		for range n {
			<-ended
		}
		p.kill(os.Kill)
	}
}

// peak returns the most memory that the process had resident.
func (p *process) peak() string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.child.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	value, _, _ := strings.Cut(after, "\n")
	return strings.TrimSpace(value)
}
