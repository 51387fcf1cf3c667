//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
)

// message is the head of an HTTP/1.1 request or response: what of it a client and an upstream that do nothing else
// than measure have to know. What is not needed is not even read into a string.
type message struct {
	status    int    // of a response
	length    int64  // of the body; -1 where it is chunked
	requestID string // X-Request-Id, where it was asked for
	last      bool   // the connection ends with it
}

var errHead = errors.New("this is no HTTP/1.1")

// readMessage reads up to the blank line. The id allocates, so that it is read only where somebody wants it.
func readMessage(r *bufio.Reader, wantID bool) (m message, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return m, err
	}
	if rest, ok := bytes.CutPrefix(line, []byte("HTTP/1.1 ")); ok {
		m.status = int(decimal(rest))
	} else if !bytes.HasSuffix(line, []byte(" HTTP/1.1\r\n")) {
		return m, fmt.Errorf("%w: %q", errHead, line)
	}
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return m, unexpected(err)
		}
		if len(line) <= 2 {
			return m, nil
		}
		m.header(line, wantID)
	}
}

func (m *message) header(line []byte, wantID bool) {
	name, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimSpace(value)
	switch {
	case named(name, "Content-Length"):
		m.length = decimal(value)
	case named(name, "Transfer-Encoding"):
		m.length = -1
	case named(name, "Connection"):
		m.last = bytes.EqualFold(value, []byte("close"))
	case wantID && named(name, "X-Request-Id"):
		m.requestID = string(value)
	}
}

func named(name []byte, want string) bool {
	return len(name) == len(want) && bytes.EqualFold(name, []byte(want))
}

// decimal returns the number that b begins with.
func decimal(b []byte) (n int64) {
	for _, c := range b {
		if c < '0' || c > '9' {
			break
		}
		n = n*10 + int64(c-'0')
	}
	return n
}

// unexpected is for an end where more has to come.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// body is what comes after a message, as it comes: a Read returns no more than one chunk has.
type body struct {
	r       *bufio.Reader
	chunked bool
	left    int64 // of the chunk, or of the whole
	err     error
}

func (m message) body(r *bufio.Reader) *body {
	if m.length < 0 {
		return &body{r: r, chunked: true}
	}
	return &body{r: r, left: m.length}
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 && b.err == nil {
		b.err = b.next()
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	if err == nil && b.chunked && b.left == 0 {
		_, err = b.r.Discard(2)
	}
	b.err = unexpected(err)
	return n, b.err
}

// next begins the next chunk. After the last one it returns io.EOF.
func (b *body) next() error {
	if !b.chunked {
		return io.EOF
	}
	line, err := b.r.ReadSlice('\n')
	if err != nil {
		return unexpected(err)
	}
	size, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(";"))
	if b.left, err = strconv.ParseInt(string(size), 16, 64); err != nil || b.left < 0 {
		return fmt.Errorf("this is no size of a chunk: %q", line)
	}
	if b.left > 0 {
		return nil
	}
	for { // trailers
		line, err := b.r.ReadSlice('\n')
		if err != nil {
			return unexpected(err)
		}
		if len(line) <= 2 {
			return io.EOF
		}
	}
}

// discard reads the rest.
func (b *body) discard() error {
	if !b.chunked {
		_, err := b.r.Discard(int(b.left))
		b.left = 0
		return unexpected(err)
	}
	_, err := io.Copy(io.Discard, b)
	return err
}

// client is one kept-alive connection. Its requests are sent as they were built.
type client struct {
	net.Conn
	r *bufio.Reader
}

func dial(address string) (*client, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &client{Conn: conn, r: bufio.NewReader(conn)}, nil
}

// complete sends a request and reads the whole answer.
func (c *client) complete(request []byte, wantID bool) (message, error) {
	if _, err := c.Write(request); err != nil {
		return message{}, err
	}
	return c.answer(wantID)
}

// answer reads a whole answer, which has to be a 200.
func (c *client) answer(wantID bool) (message, error) {
	m, err := readMessage(c.r, wantID)
	if err != nil {
		return m, err
	}
	if m.status != 200 {
		return m, refusal(m, c.r)
	}
	return m, m.body(c.r).discard()
}

// statusError is an answer that is not a 200.
type statusError struct {
	status int
	body   string
}

func (e *statusError) Error() string { return fmt.Sprintf("answered %d: %s", e.status, e.body) }

// refusal reads the answer's body, up to a length that can be shown.
func refusal(m message, r *bufio.Reader) error {
	said, err := io.ReadAll(io.LimitReader(m.body(r), 1000))
	if err != nil {
		return err
	}
	return &statusError{m.status, string(said)}
}
