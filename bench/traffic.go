//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// traffic is what the clients of one gateway do during a soak: of twenty requests sixteen ask for a completion, three
// for a stream, and one for a stream that its client leaves before the end.
type traffic struct {
	target             *target
	completion, stream []byte
	began              time.Time
	interval           atomic.Int64 // ns between two requests of one client; 0 is as fast as they go
	stop               atomic.Bool
	clients            []*visitor
	ended              sync.WaitGroup
}

var soakFrames = frames{count: 20, gap: 5 * time.Millisecond}

const (
	answerTimeout = 2 * time.Minute
	mostBehind    = time.Second // what a client that was held up makes good for
)

// visitor is one client: a connection at a time, and what it has got.
type visitor struct {
	*traffic
	conn       *client
	answers    atomic.Int64
	receipts   []receipt
	unanswered int            // requests whose connection ended before any answer
	wrong      map[string]int // what must not happen, and how often it did
}

// receipt is an answer that has begun.
type receipt struct {
	id    string
	whole bool
}

func newTraffic(t *target, prompt int) *traffic {
	return &traffic{target: t, completion: t.completionRequest(prompt), stream: t.streamRequest(prompt, soakFrames)}
}

func (t *traffic) start(clients int) {
	t.began = time.Now()
	for range clients {
		v := &visitor{traffic: t, wrong: make(map[string]int)}
		t.clients = append(t.clients, v)
		t.ended.Go(v.run)
	}
}

// halve has the traffic go on at half the pace it had so far.
func (t *traffic) halve() {
	var answers int64
	for _, v := range t.clients {
		answers += v.answers.Load()
	}
	took := time.Since(t.began) * time.Duration(len(t.clients))
	t.interval.Store(int64(2*took) / max(answers, 1))
}

// rate is requests/s, of all clients.
func (t *traffic) rate() float64 {
	return float64(len(t.clients)) / time.Duration(t.interval.Load()).Seconds()
}

// end returns when all clients have.
func (t *traffic) end() {
	t.stop.Store(true)
	t.ended.Wait()
}

func (t *traffic) receipts() (all []receipt) {
	for _, v := range t.clients {
		all = append(all, v.receipts...)
	}
	return all
}

func (t *traffic) unanswered() (n int) {
	for _, v := range t.clients {
		n += v.unanswered
	}
	return n
}

// failures lists what clients must not see. A connection may end under a request when a reload has closed it because it
// was idle; each can do so once in each reload.
func (t *traffic) failures(name string, mayEnd int) (failures []string) {
	wrong := make(map[string]int)
	for _, v := range t.clients {
		for what, n := range v.wrong {
			wrong[what] += n
		}
	}
	for _, what := range slices.Sorted(maps.Keys(wrong)) {
		failures = append(failures, fmt.Sprintf("%s: %d times: %s", name, wrong[what], what))
	}
	if n := t.unanswered(); n > mayEnd {
		failures = append(failures, fmt.Sprintf("%s: %d requests had no answer at all, %d can be explained by reloads", name, n, mayEnd))
	}
	return failures
}

func (v *visitor) run() {
	defer v.leave()
	next := time.Now().Add(rand.N(10 * time.Millisecond))
	for !v.stop.Load() {
		time.Sleep(time.Until(next))
		v.visit()
		next = next.Add(time.Duration(v.interval.Load()))
		if oldest := time.Now().Add(-mostBehind); next.Before(oldest) {
			next = oldest
		}
	}
}

// visit makes one request.
func (v *visitor) visit() {
	if err := v.connect(); err != nil {
		v.blame("connecting", err)
		time.Sleep(100 * time.Millisecond)
		return
	}
	switch rand.IntN(20) {
	case 0:
		v.readStream(1 + rand.IntN(soakFrames.count/2))
	case 1, 2, 3:
		v.readStream(soakFrames.count * 2)
	default:
		v.readCompletion()
	}
	v.answers.Add(1)
}

func (v *visitor) connect() (err error) {
	if v.conn == nil {
		if v.conn, err = dial(v.target.address); err != nil {
			v.conn = nil
			return err
		}
	}
	return v.conn.SetDeadline(time.Now().Add(answerTimeout))
}

func (v *visitor) leave() {
	if v.conn != nil {
		v.conn.Close()
		v.conn = nil
	}
}

func (v *visitor) readCompletion() {
	m, err := v.conn.complete(v.completion, true)
	if m.requestID != "" && m.status == 200 {
		v.receipts = append(v.receipts, receipt{m.requestID, err == nil})
	}
	v.note("a completion", m, err)
}

// readStream reads a stream, and leaves after a number of frames if it has not ended by then.
func (v *visitor) readStream(most int) {
	_, err := v.conn.Write(v.stream)
	if err != nil {
		v.note("a stream", message{}, err)
		return
	}
	s, err := v.conn.readStream(true)
	if err != nil {
		v.note("a stream", message{}, err)
		return
	}
	frames := 0
	for frames < most && s.next() {
		frames++
		if bytes.Contains(s.line, []byte(`"error"`)) {
			v.wrong["an error in a stream: "+string(bytes.TrimSpace(s.line))]++
		}
	}
	v.receipts = append(v.receipts, receipt{s.requestID, s.whole})
	if frames == most {
		v.leave()
		return
	}
	if s.err == nil && !s.whole {
		s.err = errors.New("it ended without [DONE]")
	}
	v.note("a stream", s.message, s.err)
}

// note keeps what was wrong with an answer, if anything, and gives up the connection where it cannot be used any more.
func (v *visitor) note(what string, m message, err error) {
	if err != nil || m.last {
		v.leave()
	}
	if err == nil {
		return
	}
	if _, refused := errors.AsType[*statusError](err); m.status == 0 && !refused && !errors.Is(err, os.ErrDeadlineExceeded) {
		v.unanswered++
		return
	}
	v.blame(what, err)
}

// longestBlame keeps request ids and the like from making every failure another one.
const longestBlame = 150

func (v *visitor) blame(what string, err error) {
	text := what + ": " + err.Error()
	v.wrong[text[:min(len(text), longestBlame)]]++
}
