package mesh

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// leave sends a request, reads n bytes of its answer and leaves.
func (g *gateway) leave(body string, n int, arrived <-chan struct{}) {
	g.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+testKey)
	req.Header.Set("Content-Type", "application/json")
	read := make(chan struct{})
	go func() {
		defer close(read)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			io.ReadFull(resp.Body, make([]byte, n))
		}
	}()
	<-arrived
	if n > 0 {
		<-read
	}
	cancel()
	<-read
}

func pricedSite(upstream string) string {
	return strings.Replace(site(pricedModel), "api_key sk-upstream", upstream, 1)
}

// TestDrainedAnswerIsChargedExactly has an upstream that reports usage only when its client is long gone.
func TestDrainedAnswerIsChargedExactly(t *testing.T) {
	for _, tc := range []struct {
		name, request, contentType, first, rest string
	}{
		{"stream", streamBody, "text/event-stream", roleFrame, strings.Repeat(wordFrame, 2000) + finishFrame + usageFrame + doneFrame},
		{"stream that has not begun", streamBody, "", "", ""},
		{"whole", chatBody, "application/json", "", completion},
	} {
		t.Run(tc.name, func(t *testing.T) {
			arrived, left := make(chan struct{}), make(chan struct{})
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				if tc.first != "" {
					answers(200, tc.contentType, tc.first)(w, r)
					http.NewResponseController(w).Flush()
				}
				close(arrived)
				<-left
				time.Sleep(50 * time.Millisecond) // until the gateway knows
				if tc.contentType == "" {
					answers(200, "text/event-stream", roleFrame+usageFrame+doneFrame)(w, r)
					return
				}
				if tc.first == "" {
					answers(200, tc.contentType, tc.rest)(w, r)
					return
				}
				io.WriteString(w, tc.rest)
			})
			g := startGateway(t, up.address(), pricedSite("on_hangup drain"))
			g.leave(strings.Replace(tc.request, "plain", "priced", 1), len(tc.first), arrived)
			close(left)
			e := g.ledger(1)[0]
			want := 2_500*1000 + 10_000*200
			if e.Estimated || e.PromptTokens != 1000 || e.CompletionTokens != 200 || e.Cost != Money(want) {
				t.Errorf("%+v", e)
			}
			if e.Outcome != OutcomeClientGone && e.Outcome != OutcomeCompleted || e.Outcome == OutcomeCompleted && tc.name == "whole" {
				t.Errorf("outcome %s", e.Outcome)
			}
		})
	}
}

func TestDrainIsBounded(t *testing.T) {
	for name, upstream := range map[string]string{
		"in time":   "on_hangup drain 100ms",
		"in number": "on_hangup drain 1h 1",
	} {
		t.Run(name, func(t *testing.T) {
			arrived := make(chan struct{})
			var open, cancelled atomic.Int32
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				open.Add(1)
				arrived <- struct{}{}
				<-r.Context().Done()
				cancelled.Add(1)
			})
			g := startGateway(t, up.address(), pricedSite(upstream))
			for range 3 {
				g.leave(chatBody, 0, arrived)
			}
			want := int32(3)
			if name == "in number" {
				want = 2
			}
			eventually(t, "the upstream is cancelled", func() bool { return cancelled.Load() >= want })
			time.Sleep(50 * time.Millisecond)
			if got := cancelled.Load(); got != want {
				t.Errorf("%d cancelled, want %d", got, want)
			}
			up.CloseClientConnections() // ends what still drains
		})
	}
}

func TestFreeHangupCostsNothing(t *testing.T) {
	arrived := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(200, "text/event-stream", wordFrame)(w, r)
		http.NewResponseController(w).Flush()
		close(arrived)
		<-r.Context().Done()
	})
	g := startGateway(t, up.address(), pricedSite("on_hangup free"))
	g.leave(strings.Replace(streamBody, "plain", "priced", 1), len(wordFrame), arrived)
	if e := g.ledger(1)[0]; e.Outcome != OutcomeClientGone || e.Cost != 0 || e.PromptTokens == 0 {
		t.Errorf("%+v", e)
	}
}

// TestFailureDuringADrainCostsNothing has the upstream fail when the client has left: there is nothing to charge.
func TestFailureDuringADrainCostsNothing(t *testing.T) {
	arrived, left := make(chan struct{}), make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-left
		time.Sleep(50 * time.Millisecond)
		answers(500, "text/plain", "no")(w, r)
	})
	g := startGateway(t, up.address(), pricedSite("on_hangup drain"))
	g.leave(strings.Replace(chatBody, "plain", "priced", 1), 0, arrived)
	close(left)
	if e := g.ledger(1)[0]; e.Cost != 0 || e.Outcome != OutcomeClientGone {
		t.Errorf("%+v", e)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}
