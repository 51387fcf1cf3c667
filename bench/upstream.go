//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// upstreamCommand is the argument by which this program, executed again, becomes the upstream.
const upstreamCommand = "upstream"

// What the upstream says each answer used, whether it was a stream or not.
const (
	promptTokens     = 1003
	completionTokens = 201
)

var (
	usage = fmt.Sprintf(`"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0}}`,
		promptTokens, completionTokens, promptTokens+completionTokens)

	completion = `{"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":"chat.completion","created":1750000000,"model":"gpt-4o-2024-08-06",` +
		`"choices":[{"index":0,"message":{"role":"assistant","content":"Hello! How can I assist you today? I can answer questions, write and ` +
		`explain code, or talk something through with you.","refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],` +
		usage + `,"service_tier":"default","system_fingerprint":"fp_44709d6fcb"}`

	completionAnswer = fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(completion), completion)
)

const (
	streamHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
	frameStart = `data: {"id":"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT","object":"chat.completion.chunk","created":1750000000,` +
		`"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_44709d6fcb",`
	wordFrame   = frameStart + `"choices":[{"index":0,"delta":{"content":" sent=%d"},"logprobs":null,"finish_reason":null}]}` + "\n\n"
	finishFrame = frameStart + `"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}` + "\n\n"
	doneFrame   = "data: [DONE]\n\n"
)

// sentMark stands in a frame before the time at which it was sent, in nanoseconds since 1970.
var sentMark = []byte("sent=")

// runUpstream answers on a free port of loopback, whose address it prints, for as long as its parent lives.
func runUpstream() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	go func() {
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is what is waited for
		os.Exit(0)
	}()
	return serve(listener)
}

// serve answers what comes through a listener until that is closed.
func serve(listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			s := &session{conn: conn, r: bufio.NewReader(conn)}
			for s.answer() == nil {
			}
		}()
	}
}

// session is one connection to the upstream.
type session struct {
	conn    net.Conn
	r       *bufio.Reader
	request bytes.Buffer
	out     []byte
}

// answer answers one request. An error ends the connection, and is normally that the other side has ended it.
func (s *session) answer() error {
	m, err := readMessage(s.r, false)
	if err != nil {
		return err
	}
	s.request.Reset()
	if _, err := s.request.ReadFrom(m.body(s.r)); err != nil {
		return err
	}
	wanted, ok := streamWanted(s.request.Bytes())
	if ok {
		err = s.stream(wanted)
	} else {
		_, err = s.conn.Write(completionAnswer)
	}
	if m.last {
		return io.EOF
	}
	return err
}

// stream writes frames, the first of them at once.
func (s *session) stream(wanted frames) error {
	s.out = append(s.out[:0], streamHead...)
	for i := range wanted.count {
		if i > 0 && wanted.gap > 0 {
			if err := s.wait(wanted.gap); err != nil {
				return err
			}
		}
		s.chunk(fmt.Sprintf(wordFrame, time.Now().UnixNano()))
		if err := s.send(); err != nil {
			return err
		}
	}
	s.chunk(finishFrame)
	s.chunk(frameStart + `"choices":[],` + usage + "}\n\n")
	s.chunk(doneFrame)
	s.out = append(s.out, "0\r\n\r\n"...)
	return s.send()
}

// wait lets time pass, and ends early, with an error, where the other side leaves.
func (s *session) wait(d time.Duration) error {
	if err := s.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	_, err := s.r.Peek(1)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return io.EOF
	}
	return s.conn.SetReadDeadline(time.Time{})
}

func (s *session) chunk(data string) {
	s.out = strconv.AppendInt(s.out, int64(len(data)), 16)
	s.out = append(s.out, "\r\n"...)
	s.out = append(s.out, data...)
	s.out = append(s.out, "\r\n"...)
}

func (s *session) send() error {
	_, err := s.conn.Write(s.out)
	s.out = s.out[:0]
	return err
}

// frames is what a request for a stream asks of the upstream. It stands in the prompt, because that is what every
// gateway passes on unchanged.
type frames struct {
	count int
	gap   time.Duration
}

func (f frames) prompt() string { return fmt.Sprintf("frames=%d gap=%s; ", f.count, f.gap) }

// streamWanted finds in a request what prompt wrote into it.
func streamWanted(request []byte) (frames, bool) {
	_, rest, ok := bytes.Cut(request, []byte("frames="))
	if !ok {
		return frames{}, false
	}
	count, rest, _ := bytes.Cut(rest, []byte(" gap="))
	gap, _, _ := bytes.Cut(rest, []byte(";"))
	n, err := strconv.Atoi(string(count))
	if err != nil {
		return frames{}, false
	}
	d, err := time.ParseDuration(strings.TrimSpace(string(gap)))
	return frames{n, d}, err == nil
}
