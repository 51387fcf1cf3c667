package mesh

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// dial opens a connection to the gateway.
func (g *gateway) dial() net.Conn {
	g.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

const unreadHead = "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n%s\r\n\r\n"

// Some clients send all of a body before they read the answer: it must be there then.
func TestRefusalReachesAClientThatSendsALargeBodyFirst(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmax_body_size 1MB\n"))
	body := bytes.Repeat([]byte("x"), 20<<20)
	chunk := fmt.Appendf(nil, "%x\r\n%s\r\n0\r\n\r\n", len(body), body)
	for _, tc := range []struct {
		name, key, length string
		body              []byte
		status            int
	}{
		{"wrong key", otherKey[:len(otherKey)-1] + "Z", fmt.Sprint("Content-Length: ", len(body)), body, 401},
		{"wrong key, chunked", otherKey[:len(otherKey)-1] + "Z", "Transfer-Encoding: chunked", chunk, 401},
		{"too large", testKey, fmt.Sprint("Content-Length: ", len(body)), body, 413},
		{"too large, chunked", testKey, "Transfer-Encoding: chunked", chunk, 413},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn := g.dial()
			fmt.Fprintf(conn, unreadHead, conn.RemoteAddr(), tc.key, tc.length)
			if _, err := conn.Write(tc.body); err != nil {
				t.Fatal(err)
			}
			time.Sleep(700 * time.Millisecond) // net/http gives a client half a second
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			if resp.StatusCode != tc.status || err != nil || !strings.Contains(string(text), `"request_id"`) {
				t.Errorf("%s %s %v", resp.Status, text, err)
			}
		})
	}
}

func TestRefusalDoesNotWaitForABodyThatIsShort(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site(""))
	for _, length := range []string{"Content-Length: 100", "Transfer-Encoding: chunked", "Content-Length: 100\r\nExpect: 100-continue"} {
		conn := g.dial()
		fmt.Fprintf(conn, unreadHead, conn.RemoteAddr(), "nonsense", length)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil) // nothing of the body has been sent
		if err != nil || resp.StatusCode != 401 || !resp.Close {
			t.Errorf("%q: %v %v", length, resp, err)
		}
	}
}
