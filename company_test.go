package mesh

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestUpstreamThatThinksInItsStreamHasTheClientPinged pauses where real upstreams do, and in the middle of events, where none
// should: pings come between events only, and without them the stream is what the upstream has sent.
func TestUpstreamThatThinksInItsStreamHasTheClientPinged(t *testing.T) {
	pingEvery(t, 50*time.Millisecond)
	long := `data: {"choices":[{"delta":{"content":"` + strings.Repeat("x", maxEvent+100_000) + `"}}]}` + "\n\n"
	for name, pieces := range map[string][]string{
		"after the header":            {"", roleFrame + wordFrame + finishFrame + doneFrame},
		"after the role":              {roleFrame, wordFrame + finishFrame + doneFrame},
		"before the end":              {roleFrame + wordFrame, finishFrame, doneFrame},
		"within an event":             {roleFrame + wordFrame[:40], wordFrame[40:] + finishFrame + doneFrame},
		"within an event's last line": {roleFrame + wordFrame[:len(wordFrame)-1], "\n" + finishFrame + doneFrame},
	} {
		t.Run(name, func(t *testing.T) {
			testPings(t, pieces, true)
		})
	}
	t.Run("within an event that is too long to be held", func(t *testing.T) { // until it has begun to go out there may be pings
		testPings(t, []string{roleFrame + long[:len(long)-10], long[len(long)-10:] + finishFrame + doneFrame}, false)
	})
}

// testPings has an upstream send pieces. It goes on when the client has been pinged twice, or, where that must not be
// any more, after a while.
func testPings(t *testing.T, pieces []string, pinged bool) {
	t.Helper()
	next := make(chan struct{})
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		for i, piece := range pieces {
			if i > 0 {
				select {
				case <-next:
				case <-r.Context().Done():
				}
			}
			io.WriteString(w, piece)
			http.NewResponseController(w).Flush()
		}
	})
	g := startGateway(t, up.address(), site(""))
	resp := g.send(http.MethodPost, "/v1/chat/completions", streamBody)
	defer resp.Body.Close()
	if resp.Header.Get("X-Mesh-Routing-Model") != "test/plain" {
		t.Errorf("%v", resp.Header)
	}
	if !pinged {
		time.AfterFunc(500*time.Millisecond, func() { close(next) })
	}
	var got strings.Builder
	pings, paused := 0, 0
	lines := bufio.NewReader(resp.Body)
	for { // a ping inside an event is no line of its own
		line, err := lines.ReadString('\n')
		if err != nil {
			break
		}
		if line != ": ping\n" {
			got.WriteString(line)
			continue
		}
		if empty, _ := lines.ReadString('\n'); empty != "\n" {
			t.Errorf("%q follows a ping", empty)
		}
		if pings++; pinged && pings%2 == 0 && paused < len(pieces)-1 {
			paused++
			next <- struct{}{}
		}
	}
	if want := strings.Join(pieces, ""); got.String() != want {
		t.Errorf("%d bytes: %.300q", got.Len(), got.String())
	}
	if pinged && pings == 0 {
		t.Error("no pings")
	}
	if e := g.ledger(1)[0]; e.Outcome != OutcomeCompleted {
		t.Errorf("%+v", e)
	}
}
