package mesh

import (
	"net/http"
	"sync"
	"time"
)

// pingInterval is for how long a stream's client hears nothing before it is told that its request is alive. Proxies on
// the way, and clients, give up after 30 to 60 s of silence.
var pingInterval = 15 * time.Second

// keepAliveInterval is that for a client that waits for images, of which nothing comes before all are made.
var keepAliveInterval = 10 * time.Second

var (
	pingFrame      = []byte(": ping\n\n")
	keepAliveFrame = []byte(": keep-alive\n\n")
)

// gate keeps a stream's client company until an answer begins, or the request has failed. Other candidates can still be
// asked after that; but the status is 200 then, and an error comes as a frame.
type gate struct {
	x     *exchange
	every time.Duration
	frame []byte

	mu    sync.Mutex // of what pings read and write: the client's side, and the event that its header may be made of
	timer *time.Timer
	begun bool // status line and header have gone out
	over  bool // no more pings
}

func (x *exchange) openGate(req *chatRequest) *gate {
	if x.h.pingEvery == 0 || x.silent {
		return nil
	}
	g := &gate{x: x}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.suit(req)
	g.timer = time.AfterFunc(g.every, g.ping)
	return g
}

// suit has pings be what clients of a stream, or those that wait for images, know. The caller holds the lock.
func (g *gate) suit(req *chatRequest) {
	switch {
	case g == nil:
	case req.images != nil:
		g.every, g.frame = g.x.h.keepAliveEvery, keepAliveFrame
	default:
		g.every, g.frame = g.x.h.pingEvery, pingFrame
	}
}

func (g *gate) lock() {
	if g != nil {
		g.mu.Lock()
	}
}

func (g *gate) unlock() {
	if g != nil {
		g.mu.Unlock()
	}
}

func (g *gate) ping() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over {
		return
	}
	if !g.begun {
		g.begun = true
		header := g.x.w.Header()
		header.Set("Content-Type", "text/event-stream")
		streamHeader(header)
		g.x.w.WriteHeader(http.StatusOK)
	}
	_, err := g.x.w.Write(g.frame)
	if err == nil {
		err = http.NewResponseController(g.x.w).Flush()
	}
	if err != nil {
		return // the request's context will say so
	}
	g.timer.Reset(g.every)
}

// close ends the pings, and reports whether there were any.
func (g *gate) close() (begun bool) {
	if g == nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over = true
	g.timer.Stop()
	return g.begun
}

// streamHeader says to whatever is in front that nothing of a stream is to be kept.
func streamHeader(header http.Header) {
	if header.Get("Cache-Control") == "" {
		header.Set("Cache-Control", "no-cache")
	}
	header.Set("X-Accel-Buffering", "no") // for an nginx in front
}

// tellInStream has a refusal be the last of a stream that has begun with pings.
func (x *exchange) tellInStream(s *served) {
	if s.refusal == nil || !x.gate.close() {
		return
	}
	e := s.refusal
	s.status, s.errorCode, s.refusal = http.StatusOK, e.code, nil
	if _, err := x.w.Write(e.frame(x.event.RequestID)); err == nil {
		http.NewResponseController(x.w).Flush() //nolint:errcheck // the client is gone, then
	}
}
