//go:build linux

package main

import (
	"net"
	"sync"
	"testing"
	"time"
)

// startStalling runs an upstream that, once, lets every connection wait: from the time of a request that comes later
// than after, for as long as stall says.
func startStalling(t *testing.T, after, stall time.Duration) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	started := time.Now()
	var gate sync.Mutex
	stalled := false
	go serve(hooked{listener, func() {
		gate.Lock()
		defer gate.Unlock()
		if !stalled && stall > 0 && time.Since(started) > after {
			stalled = true
			time.Sleep(stall)
		}
	}})
	return listener.Addr().String()
}

// hooked calls a function before each write of each connection.
type hooked struct {
	net.Listener
	before func()
}

type hookedConn struct {
	net.Conn
	before func()
}

func (h hooked) Accept() (net.Conn, error) {
	conn, err := h.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return hookedConn{conn, h.before}, nil
}

func (c hookedConn) Write(p []byte) (int, error) {
	c.before()
	return c.Conn.Write(p)
}

func runLoop(t *testing.T, address string, connections int, rate float64, d time.Duration) *openLoop {
	t.Helper()
	target := &target{server: &server{address: address}}
	loop := newOpenLoop(target.completionRequest(100), rate)
	if err := loop.run(t.Context(), address, connections, d); err != nil {
		t.Fatal(err)
	}
	return loop
}

// TestStallShowsInEveryRequestThatWasDueMeanwhile has a server stall for a third of the time. A client that only looked at
// the requests under way would see four slow ones in a thousand.
func TestStallShowsInEveryRequestThatWasDueMeanwhile(t *testing.T) {
	const stall = 500 * time.Millisecond
	loop := runLoop(t, startStalling(t, 300*time.Millisecond, stall), 4, 1000, 1500*time.Millisecond)
	if n := loop.latencies.TotalCount(); n != 1500 {
		t.Errorf("%d latencies of 1500 requests", n)
	}
	if got := loop.latencies.Max(); got < int64(stall)*9/10 {
		t.Errorf("the longest latency is %s", time.Duration(got))
	}
	for percent, least := range map[float64]time.Duration{99: stall * 8 / 10, 85: stall / 5} {
		if got := time.Duration(loop.latencies.ValueAtPercentile(percent)); got < least {
			t.Errorf("percentile %v is %s, want at least %s", percent, got, least)
		}
	}
}

func TestEveryRequestIsMeasuredWithoutAStall(t *testing.T) {
	loop := runLoop(t, startStalling(t, 0, 0), 4, 500, time.Second)
	if n, late := loop.latencies.TotalCount(), loop.late.TotalCount(); n != 500 || late > n {
		t.Errorf("%d latencies of 500 requests, %d of them sent at once", n, late)
	}
}

func TestRequestThatIsRefusedFailsTheLoop(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		conn.Read(make([]byte, 4096))
		conn.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"))
		conn.Read(make([]byte, 4096))
	}()
	target := &target{server: &server{address: listener.Addr().String()}}
	loop := newOpenLoop(target.completionRequest(100), 100)
	if err := loop.run(t.Context(), target.address, 1, 10*time.Second); err == nil {
		t.Error("no error")
	}
}
