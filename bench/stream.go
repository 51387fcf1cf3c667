//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// streamTimes is how long what belongs to streams took.
type streamTimes struct {
	first  *hdrhistogram.Histogram // ns from the request to the first frame
	frames *hdrhistogram.Histogram // ns from the upstream's write of a frame to the client's read
}

func newStreamTimes() *streamTimes { return &streamTimes{newHistogram(), newHistogram()} }

func (s *streamTimes) merge(other *streamTimes) {
	s.first.Merge(other.first)
	s.frames.Merge(other.frames)
}

// timeStreams has a number of clients ask for one stream after another.
func timeStreams(ctx context.Context, t *target, request []byte, o streamOptions, d time.Duration) (*streamTimes, error) {
	end := time.Now().Add(d)
	clients, err := dialAll(t.address, o.atOnce, end.Add(stuck))
	if err != nil {
		return nil, err
	}
	defer closeAll(clients)
	times := make([]*streamTimes, len(clients))
	err = together(len(clients), func(i int) error {
		times[i] = newStreamTimes()
		for ctx.Err() == nil && time.Now().Before(end) {
			if err := clients[i].timeStream(request, o.frames.count, times[i]); err != nil {
				return err
			}
		}
		return context.Cause(ctx)
	})
	if err != nil {
		return nil, fmt.Errorf("%s, streams: %w", t.name, err)
	}
	for _, other := range times[1:] {
		times[0].merge(other)
	}
	return times[0], nil
}

// timeStream asks for a stream and reads it to its end.
func (c *client) timeStream(request []byte, count int, times *streamTimes) error {
	began := time.Now()
	if _, err := c.Write(request); err != nil {
		return err
	}
	s, err := c.readStream(false)
	if err != nil {
		return err
	}
	frames := 0
	for s.next() {
		now := time.Now()
		if sent, ok := s.sent(); ok {
			if frames++; frames == 1 {
				record(times.first, now.Sub(began))
			}
			record(times.frames, now.Sub(sent))
		}
	}
	if s.err == nil && (frames != count || !s.done) {
		s.err = fmt.Errorf("a stream with %d frames of %d, [DONE]: %t", frames, count, s.done)
	}
	return s.err
}

// stream is an answer in frames.
type stream struct {
	message
	lines *bufio.Reader
	line  []byte // the last one that was read
	done  bool   // its end has been announced
	whole bool   // and it has ended
	err   error
}

var errNoStream = errors.New("the answer is no stream")

// readStream reads the head of a stream.
func (c *client) readStream(wantID bool) (*stream, error) {
	m, err := readMessage(c.r, wantID)
	if err != nil {
		return nil, err
	}
	if m.status != 200 {
		return nil, refusal(m, c.r)
	}
	if m.length >= 0 {
		return nil, errNoStream
	}
	return &stream{message: m, lines: bufio.NewReader(m.body(c.r))}, nil
}

// next reads up to the next line with data. It returns false at the stream's end.
func (s *stream) next() bool {
	for {
		s.line, s.err = s.lines.ReadSlice('\n')
		if s.err != nil {
			break
		}
		if data, ok := bytes.CutPrefix(s.line, []byte("data:")); ok {
			s.done = s.done || bytes.Equal(bytes.TrimSpace(data), []byte("[DONE]"))
			return true
		}
	}
	if len(s.line) == 0 && s.err == io.EOF {
		s.err, s.whole = nil, s.done
	}
	return false
}

// sent returns when the upstream sent the frame, if it is one with a word.
func (s *stream) sent() (time.Time, bool) {
	_, rest, ok := bytes.Cut(s.line, sentMark)
	if !ok {
		return time.Time{}, false
	}
	return time.Unix(0, decimal(rest)), true
}
