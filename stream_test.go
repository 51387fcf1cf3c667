package mesh

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
)

// frames of a stream, as OpenAI's API reference shows them.
const (
	roleFrame   = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}` + "\n\n"
	wordFrame   = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}],"usage":null}` + "\n\n"
	finishFrame = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}` + "\n\n"
	usageFrame  = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":200,"total_tokens":1200}}` + "\n\n"
	costFrame   = `data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":200,"total_tokens":1200},"cost":"0.0045"}` + "\n\n"
	doneFrame   = "data: [DONE]\n\n"

	// the first one of a stream of Azure's
	azureFrame = `data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0}]}` + "\n\n"
)

// cutStream answers with text in pieces that end where they may.
func cutStream(text string, pieces *rand.Rand) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		for rest := text; rest != ""; {
			n := min(len(rest), 1+pieces.IntN(40))
			io.WriteString(w, rest[:n])
			http.NewResponseController(w).Flush()
			rest = rest[n:]
		}
	}
}

const pricedModel = "\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"

func TestStreamComesBackByteForByte(t *testing.T) {
	uncommon := ": ping\n\nevent: x\nid: 1\ndata: {\"choices\":[{\"delta\":\ndata: {\"content\":\"é😀\"}}]}\n\ndata:{\"a\":1}\n\ndata: not json\n\n" +
		"retry: 10\n\n\n\ndata: {\"choices\":[],\"prompt_filter_results\":[]}\n\n"
	whole := roleFrame + wordFrame + uncommon + strings.Repeat(wordFrame, 20) + finishFrame + doneFrame
	for name, text := range map[string]string{
		"lf":   whole,
		"crlf": strings.ReplaceAll(whole, "\n", "\r\n"),
		"cr":   strings.ReplaceAll(whole, "\n", "\r"),
	} {
		t.Run(name, func(t *testing.T) {
			up := startUpstream(t, cutStream(text, rand.New(rand.NewPCG(1, 2))))
			g := startGateway(t, up.address(), site(""))
			for range 5 {
				r := g.post(streamBody)
				if string(r.body) != text {
					t.Fatalf("got %q\nwant %q", r.body, text)
				}
				if r.Header.Get("Content-Type") != "text/event-stream; charset=utf-8" || r.Header.Get("X-Accel-Buffering") != "no" {
					t.Errorf("%q", r.Header)
				}
			}
		})
	}
}

func TestUsageFrameGoesToThoseWhoAskedForIt(t *testing.T) {
	for _, ends := range []string{"\n", "\r\n", "\r"} {
		text := strings.ReplaceAll(roleFrame+wordFrame+finishFrame+usageFrame+doneFrame, "\n", ends)
		hidden := strings.ReplaceAll(roleFrame+wordFrame+finishFrame+doneFrame, "\n", ends)
		priced := strings.ReplaceAll(roleFrame+wordFrame+finishFrame+costFrame+doneFrame, "\n", ends)
		up := startUpstream(t, cutStream(text, rand.New(rand.NewPCG(3, 4))))
		g := startGateway(t, up.address(), site(pricedModel))
		asking := strings.Replace(streamBody, `"stream":true`, `"stream":true,"stream_options":{"include_usage":true}`, 1)
		for _, tc := range []struct{ body, sdk, want string }{
			{streamBody, "", hidden},
			{streamBody, "go/1.0", text},
			{asking, "", text},
			{strings.Replace(streamBody, "plain", "priced", 1), "", hidden},
			{strings.Replace(streamBody, "plain", "priced", 1), "go/1.0", priced},
			{strings.Replace(asking, "plain", "priced", 1), "", priced},
		} {
			r := g.post(tc.body, "X-MeshAPI-SDK", tc.sdk)
			if string(r.body) != tc.want {
				t.Errorf("%s %s\ngot  %q\nwant %q", tc.body, tc.sdk, r.body, tc.want)
			}
			if got := string(up.last(t).body); !strings.Contains(got, `"stream_options":{"include_usage":true}`) {
				t.Errorf("upstream received %s", got)
			}
		}
	}
}

// TestEstimateIsToldWhereTheUpstreamCountsNothing: a Mesh client always gets the usage frame, and anyone who asks for it.
func TestEstimateIsToldWhereTheUpstreamCountsNothing(t *testing.T) {
	asking := strings.Replace(streamBody, `"stream":true`, `"stream":true,"stream_options":{"include_usage":true}`, 1)
	nonsense := strings.Replace(usageFrame, ":1000,", ":9007199254740993,", 1)
	for name, sent := range map[string]string{
		"whole":                roleFrame + wordFrame + finishFrame + doneFrame,
		"without done":         roleFrame + wordFrame + finishFrame,
		"after what has no id": azureFrame + roleFrame + wordFrame + finishFrame + doneFrame,
		"nonsense":             roleFrame + wordFrame + finishFrame + nonsense + doneFrame,
	} {
		t.Run(name, func(t *testing.T) {
			up := startUpstream(t, cutStream(sent, rand.New(rand.NewPCG(3, 4))))
			g := startGateway(t, up.address(), site(pricedModel))
			for i, tc := range []struct {
				body, sdk string
				told      bool
			}{
				{streamBody, "", false},
				{strings.Replace(streamBody, "plain", "priced", 1), "go/1.0", true},
				{strings.Replace(asking, "plain", "priced", 1), "", true},
				{asking, "", true},
			} {
				r := g.post(tc.body, "X-MeshAPI-SDK", tc.sdk)
				events := g.ledger(i + 1)
				e := events[i]
				if !e.Estimated || e.PromptTokens == 0 || e.CompletionTokens != 1 || e.Outcome != OutcomeCompleted {
					t.Fatalf("%+v", e)
				}
				usage := fmt.Sprintf(`data: {"id":"c","created":1,"model":"m","object":"chat.completion.chunk","choices":[],`+
					`"usage":{"prompt_tokens":%d,"completion_tokens":1,"total_tokens":%d,"estimated":true}`, e.PromptTokens, e.PromptTokens+1)
				if e.Cost > 0 {
					usage += fmt.Sprintf(`,"cost":"%s"`, e.Cost)
				}
				if usage += "}\n\n"; !tc.told {
					usage = ""
				}
				if want := strings.NewReplacer(doneFrame, "", nonsense, "").Replace(sent) + usage + doneFrame; string(r.body) != want {
					t.Errorf("%s %s\ngot  %q\nwant %q", tc.body, tc.sdk, r.body, want)
				}
			}
			g.spent(g.ledger(4))
		})
	}
}

// TestEstimateIsMadeWhileOthersEnd is for the race detector: a hedge that has lost, and the timer that ends holding back,
// let go of the request's body when its answer is read.
func TestEstimateIsMadeWhileOthersEnd(t *testing.T) {
	slow := func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(time.Second):
		}
	}
	first, up := startUpstream(t, slow), startUpstream(t, streams(false, roleFrame, wordFrame, finishFrame, doneFrame))
	g := startGateway(t, up.address(), twoSites(first.address(), "\t\tfallback test/second\n\t\thedge 5ms"))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				if r := g.post(streamOf("test/first"), "X-MeshAPI-SDK", "go/1.0"); r.StatusCode != 200 || !strings.Contains(string(r.body), "estimated") {
					t.Errorf("%s %s", r.Status, r.body)
				}
			}
		})
	}
	all.Wait()
	for _, e := range g.ledger(160) {
		if e.PromptTokens == 0 {
			t.Fatalf("%+v", e)
		}
	}
}

func TestNoEstimateIsToldOfAStreamThatWasCut(t *testing.T) {
	up := startUpstream(t, cutStream(roleFrame+wordFrame, rand.New(rand.NewPCG(3, 4))))
	g := startGateway(t, up.address(), site(pricedModel))
	if r := g.post(streamBody, "X-MeshAPI-SDK", "go/1.0"); bytes.Contains(r.body, []byte("prompt_tokens")) {
		t.Errorf("got %q", r.body)
	}
	if e := g.ledger(1)[0]; !e.Estimated || e.Outcome != OutcomeCut {
		t.Errorf("%+v", e)
	}
}

func TestUsageBesideContentPassesWithItsCost(t *testing.T) {
	last := `data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":4,"completion_tokens":1},"cost":0.1}` + "\n\n"
	several := "data: {\"choices\":[],\ndata: \"usage\":{\"prompt_tokens\":4,\"completion_tokens\":1}}\n\n"
	up := startUpstream(t, cutStream(last+several+doneFrame, rand.New(rand.NewPCG(3, 4))))
	g := startGateway(t, up.address(), site(pricedModel))
	r := g.post(strings.Replace(streamBody, "plain", "priced", 1), "X-MeshAPI-SDK", "x")
	want := strings.Replace(last, "0.1", `"0.00002"`, 1) +
		`data: {"choices":[], "usage":{"prompt_tokens":4,"completion_tokens":1},"cost":"0.00002"}` + "\n\n" + doneFrame
	if string(r.body) != want {
		t.Errorf("got  %q\nwant %q", r.body, want)
	}
}

// errorFrame is what a client gets in place of the rest of a stream.
func errorFrame(code, message, requestID string) string {
	return fmt.Sprintf("data: {\"error\":{\"code\":%q,\"message\":%q},\"request_id\":%q}\n\ndata: [DONE]\n\n", code, message, requestID)
}

func TestStreamNeverEndsInSilence(t *testing.T) {
	const cutMessage = "The upstream broke off in the middle of its answer."
	for _, tc := range []struct {
		name    string
		sent    string
		abort   bool
		passes  string
		code    string
		message string
	}{
		{"cut between frames", roleFrame + wordFrame, true, roleFrame + wordFrame, "upstream_error", cutMessage},
		{"cut inside a frame", roleFrame + wordFrame[:30], true, roleFrame, "upstream_error", cutMessage},
		{"cut before the first frame", "", true, "", "upstream_error", cutMessage},
		{"ended without a reason", roleFrame + wordFrame, false, roleFrame + wordFrame, "upstream_error", cutMessage},
		{"cut between finish and done", roleFrame + finishFrame, true, roleFrame + finishFrame, "upstream_error", cutMessage},
		{"cut by an upstream that only closes", roleFrame + wordFrame[:30], false, roleFrame, "upstream_error", cutMessage},
		{"an error as a frame", roleFrame + "data: {\"error\":{\"message\":\"org-1 is overloaded\",\"code\":\"busy\"}}\n\n" + wordFrame, false, roleFrame, "upstream_error", "The upstream reported an error."},
		{"an error in words only", roleFrame + "data: {\"error\":\"overloaded\"}\n\n", true, roleFrame, "upstream_error", "The upstream reported an error."},
		{"the request's own fault as a frame", roleFrame + "data: {\"error\":{\"message\":\"too long\",\"type\":\"invalid_request_error\",\"code\":\"context_length_exceeded\"}}\n\n", false, roleFrame,
			"context_length_exceeded", "too long"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				http.NewResponseController(w).Flush()
				io.WriteString(w, tc.sent)
				http.NewResponseController(w).Flush()
				if tc.abort {
					panic(http.ErrAbortHandler)
				}
			})
			g := startGateway(t, up.address(), site(""))
			r := g.post(streamBody)
			want := tc.passes + errorFrame(tc.code, tc.message, r.Header.Get("X-Request-Id"))
			if string(r.body) != want {
				t.Errorf("got  %q\nwant %q", r.body, want)
			}
			if n := len(up.received()); n != 1 {
				t.Errorf("the upstream was asked %d times", n)
			}
		})
	}
}

func TestStreamWithoutDoneGetsOne(t *testing.T) {
	for _, sent := range []string{roleFrame + finishFrame, roleFrame + strings.TrimSuffix(finishFrame, "\n"), roleFrame + strings.TrimSuffix(finishFrame, "\n\n"),
		roleFrame + finishFrame + "data: [DONE]"} {
		up := startUpstream(t, answers(200, "text/event-stream", sent))
		g := startGateway(t, up.address(), site(""))
		if r := g.post(streamBody); string(r.body) != roleFrame+finishFrame+doneFrame {
			t.Errorf("got %q", r.body)
		}
	}
}

func TestTimeoutInTheMiddleOfAStreamIsSaid(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, roleFrame)
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	g := startGateway(t, up.address(), site("\ttimeout 200ms"))
	r := g.post(streamBody)
	want := roleFrame + errorFrame("gateway_timeout", errUnfinished.message, r.Header.Get("X-Request-Id"))
	if string(r.body) != want {
		t.Errorf("got  %q\nwant %q", r.body, want)
	}
}

func TestClientThatLeavesInTheMiddleCancelsTheUpstream(t *testing.T) {
	cancelled := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for r.Context().Err() == nil {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
			time.Sleep(time.Millisecond)
		}
		close(cancelled)
	})
	g := startGateway(t, up.address(), site(""))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
	io.ReadFull(resp.Body, make([]byte, 1000))
	resp.Body.Close()
	select {
	case <-cancelled:
	case <-time.After(10 * time.Second):
		t.Fatal("the upstream was not cancelled")
	}
}

// TestLongStream has 10,000 frames with a millisecond between them. Each carries the time it was sent, so that the
// client can tell how long it was on its way.
func TestLongStream(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds and more")
	}
	const n = 10_000
	var sent bytes.Buffer
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		out := io.MultiWriter(w, &sent)
		io.WriteString(out, roleFrame)
		for i := range n {
			fmt.Fprintf(out, "data: {\"i\":%d,\"at\":%d,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"w\"}}]}\n\n", i, time.Now().UnixNano())
			http.NewResponseController(w).Flush()
			time.Sleep(time.Millisecond)
		}
		io.WriteString(out, finishFrame+doneFrame)
	})
	g := startGateway(t, up.address(), site(""))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
	defer resp.Body.Close()
	var received bytes.Buffer
	var worst, sum time.Duration
	count := 0
	for lines := bufio.NewReader(io.TeeReader(resp.Body, &received)); ; {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var i int
		var at int64
		if m, _ := fmt.Sscanf(line, `data: {"i":%d,"at":%d,`, &i, &at); m == 2 {
			delay := time.Since(time.Unix(0, at))
			worst, sum, count = max(worst, delay), sum+delay, count+1
		}
	}
	if !bytes.Equal(received.Bytes(), sent.Bytes()) {
		t.Errorf("received %d bytes of %d, or others", received.Len(), sent.Len())
	}
	if count != n {
		t.Errorf("%d frames", count)
	}
	t.Logf("on their way: mean %v, worst %v", sum/time.Duration(max(count, 1)), worst)
}

// TestFramesAreNotHeldBack has an upstream that sends a frame only when the client has the one before it.
func TestFramesAreNotHeldBack(t *testing.T) {
	next := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for range 100 {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
		io.WriteString(w, finishFrame+doneFrame)
	})
	for _, encode := range []string{"", "encode zstd gzip\n"} {
		g := startGateway(t, up.address(), encode+site(""))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/v1/chat/completions", strings.NewReader(streamBody))
		req.Header.Set("Authorization", "Bearer "+testKey)
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req) // asks for gzip and decodes it
		if err != nil {
			t.Fatal(err)
		}
		if resp.Uncompressed != (encode != "") {
			t.Errorf("compressed: %v", resp.Uncompressed)
		}
		frame := make([]byte, len(wordFrame))
		for i := range 100 {
			if _, err := io.ReadFull(resp.Body, frame); err != nil || string(frame) != wordFrame {
				t.Fatalf("frame %d: %v %q", i, err, frame)
			}
			next <- struct{}{}
		}
		rest, err := io.ReadAll(resp.Body)
		if err != nil || string(rest) != finishFrame+doneFrame {
			t.Errorf("%v %q", err, rest)
		}
		resp.Body.Close()
	}
}

func TestCutInsideALongEventIsSaid(t *testing.T) {
	long := `data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", maxEvent+100_000)
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, long)
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	g := startGateway(t, up.address(), site(""))
	r := g.post(streamBody)
	want := "\n\n" + errorFrame("upstream_error", errCut.message, r.Header.Get("X-Request-Id"))
	if !strings.HasSuffix(string(r.body), want) {
		t.Errorf("ends in %q", r.body[max(0, len(r.body)-300):])
	}
}

func TestStreamIsCompleteAtDoneThoughTheClientLeavesThen(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(200, "text/event-stream", roleFrame+finishFrame+doneFrame)(w, r)
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	g := startGateway(t, up.address(), site(""))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
	io.ReadFull(resp.Body, make([]byte, len(roleFrame+finishFrame+doneFrame)))
	resp.Body.Close()
	if e := g.ledger(1)[0]; e.Outcome != OutcomeCompleted {
		t.Errorf("%+v", e)
	}
}

func TestNothingFollowsTheEndOfAStream(t *testing.T) {
	up := startUpstream(t, answers(200, "text/event-stream", wordFrame+finishFrame+doneFrame+": bye\n\n"+wordFrame+usageFrame+doneFrame))
	g := startGateway(t, up.address(), site(""))
	if r := g.post(streamBody); string(r.body) != wordFrame+finishFrame+doneFrame {
		t.Errorf("%s", r.body)
	}
	if e := g.ledger(1)[0]; e.PromptTokens != 1000 || e.Estimated || e.Outcome != OutcomeCompleted {
		t.Errorf("%+v", e)
	}
}

func TestEventTooLongToBeReadPasses(t *testing.T) {
	long := `data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", maxEvent+100_000) + `"}}]}` + "\n\n"
	for _, ends := range []string{"\n", "\r\n"} {
		text := strings.ReplaceAll(wordFrame+long+wordFrame+finishFrame+usageFrame+doneFrame, "\n", ends)
		up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) { answers(200, "text/event-stream", text)(w, nil) })
		g := startGateway(t, up.address(), site(""))
		r := g.post(streamBody)
		want := strings.ReplaceAll(wordFrame+long+wordFrame+finishFrame+doneFrame, "\n", ends)
		if string(r.body) != want {
			t.Errorf("%d bytes, want %d", len(r.body), len(want))
		}
	}
}

// FuzzStreamSplitting cuts a stream at any two places: what the client gets must not depend on them.
func FuzzStreamSplitting(f *testing.F) {
	f.Add([]byte(roleFrame+wordFrame+usageFrame+doneFrame), 10, 20)
	f.Add([]byte(strings.ReplaceAll(wordFrame+usageFrame+doneFrame, "\n", "\r\n")), 300, 301)
	f.Add([]byte("data: a\r\rdata: b\n\r\ndata: {\r\n\r\n"), 8, 9)
	f.Fuzz(func(t *testing.T, text []byte, a, b int) {
		whole := passThrough(text)
		if len(text) == 0 {
			return
		}
		a, b = int(uint(a)%uint(len(text))), int(uint(b)%uint(len(text)))
		a, b = min(a, b), max(a, b)
		if got := passThrough(text[:a], text[a:b], text[b:]); !bytes.Equal(got, whole) {
			t.Errorf("cut at %d and %d: %q, whole: %q", a, b, got, whole)
		}
	})
}

// passThrough returns what a client that did not ask for usage gets of a stream that comes in these pieces.
func passThrough(pieces ...[]byte) []byte {
	w := &recorder{header: make(http.Header)}
	x := &exchange{w: w, r: new(http.Request), h: &Handler{logger: zap.NewNop()}}
	a := newAnswer(x, &chatRequest{stream: true}, &candidate{upstream: new(Upstream), price: &Price{Input: usd}})
	a.last = true // nothing is held back, so no timer is left behind that would let it go
	a.header.Set("Content-Type", "text/event-stream")
	a.WriteHeader(http.StatusOK)
	for _, p := range pieces {
		if len(p) > 0 {
			if _, err := a.Write(p); err != nil {
				break
			}
		}
	}
	a.stream.end()
	return w.body.Bytes()
}

// recorder is a client's side that keeps everything.
type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(int)             {}
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
func (r *recorder) Flush()                      {}
