//go:build linux

package main

import (
	"testing"
	"time"
)

func TestStreamIsTimedFromTheUpstreamsOwnClock(t *testing.T) {
	address := startStalling(t, 0, 0)
	tgt := &target{name: "upstream", server: &server{address: address}}
	o := streamOptions{atOnce: 3, frames: frames{count: 5, gap: 2 * time.Millisecond}}
	times, err := timeStreams(t.Context(), tgt, tgt.streamRequest(100, o.frames), o, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	first, all := times.first.TotalCount(), times.frames.TotalCount()
	if first < 3 || all != 5*first {
		t.Errorf("%d first frames, %d frames", first, all)
	}
	if longest := time.Duration(times.frames.Max()); longest > 30*time.Second {
		t.Errorf("a frame was on its way for %s", longest)
	}
}

func TestStalledFrameShowsInItsDelay(t *testing.T) {
	const stall = 300 * time.Millisecond
	address := startStalling(t, 20*time.Millisecond, stall)
	tgt := &target{name: "upstream", server: &server{address: address}}
	o := streamOptions{atOnce: 1, frames: frames{count: 50, gap: 2 * time.Millisecond}}
	times, err := timeStreams(t.Context(), tgt, tgt.streamRequest(100, o.frames), o, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if longest := time.Duration(times.frames.Max()); longest < stall*9/10 {
		t.Errorf("the longest delay is %s", longest)
	}
}

func TestRequestSaysWhatTheUpstreamIsToDo(t *testing.T) {
	tgt := &target{server: &server{address: "127.0.0.1:1"}}
	want := frames{count: 12, gap: 1500 * time.Microsecond}
	if got, ok := streamWanted(tgt.streamRequest(500, want)); !ok || got != want {
		t.Errorf("got %+v, %t", got, ok)
	}
	if got, ok := streamWanted(tgt.completionRequest(500)); ok {
		t.Errorf("a completion was understood as %+v", got)
	}
}
