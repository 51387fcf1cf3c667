package mesh

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// bodyServer answers with what readBody says: the body itself, or the refusal.
func bodyServer(t *testing.T, limit int64) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, refused := readBody(w, r, limit)
		if refused != nil {
			refused.write(w, "req_1")
			return
		}
		w.Write(body)
	}))
	t.Cleanup(server.Close)
	return server
}

func post(t *testing.T, url string, header http.Header, body io.Reader) (status int, answer string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(read)
}

func TestBodyMustBePlainJSON(t *testing.T) {
	server := bodyServer(t, 1000)
	cases := []struct {
		contentType, encoding string
		status                int
	}{
		{"application/json", "", 200},
		{"application/json; charset=utf-8", "", 200},
		{"Application/JSON;charset=UTF-8", "", 200},
		{"application/json", "identity", 200},
		{"application/json", "Identity", 200},
		{"", "", 415},
		{"text/plain", "", 415},
		{"text/json", "", 415},
		{"application/jsonx", "", 415},
		{"application/x-www-form-urlencoded", "", 415},
		{"multipart/form-data; boundary=x", "", 415},
		{"application/json, text/plain", "", 415},
		{"json", "", 415},
		{"application/json", "gzip", 415},
		{"application/json", "identity, gzip", 415},
	}
	for _, c := range cases {
		header := http.Header{}
		if c.contentType != "" {
			header.Set("Content-Type", c.contentType)
		}
		if c.encoding != "" {
			header.Set("Content-Encoding", c.encoding)
		}
		status, answer := post(t, server.URL, header, strings.NewReader(`{}`))
		if status != c.status {
			t.Errorf("Content-Type %q, Content-Encoding %q: %d, want %d", c.contentType, c.encoding, status, c.status)
		}
		if status == 415 && !strings.Contains(answer, `"code":"unsupported_media_type"`) {
			t.Error(answer)
		}
		if status == 200 && answer != `{}` {
			t.Errorf("read %q", answer)
		}
	}
}

// TestBodyIsReadUpToTheLimitAndNoFurther sends little more than the limit: a client whose connection is closed while it
// still sends may see that before the answer.
func TestBodyIsReadUpToTheLimitAndNoFurther(t *testing.T) {
	const limit = 3 << 20
	server := bodyServer(t, limit)
	for _, chunked := range []bool{false, true} {
		for _, size := range []int{0, 1, 511, 512, 513, 1 << 20, limit - 1, limit, limit + 1, limit + 1000} {
			sent := bytes.Repeat([]byte("x"), size)
			var body io.Reader = bytes.NewReader(sent)
			if chunked {
				body = io.MultiReader(body) // hides its length
			}
			header := http.Header{"Content-Type": {"application/json"}}
			if size > limit && !chunked {
				header.Set("Expect", "100-continue") // so that none of it is on its way when it is refused
			}
			status, answer := post(t, server.URL, header, body)
			if size <= limit && (status != 200 || answer != string(sent)) {
				t.Errorf("%d bytes, chunked %v: %d, %d bytes read", size, chunked, status, len(answer))
			}
			if size > limit && (status != 413 || !strings.Contains(answer, `"code":"request_too_large","message":"The request body is larger than 3145728 bytes."`)) {
				t.Errorf("%d bytes, chunked %v: %d %.200s", size, chunked, status, answer)
			}
		}
	}
}

func TestBodyDeclaredTooLargeIsRefusedWithoutReadingIt(t *testing.T) {
	r := httptest.NewRequest(http.MethodPost, "/", unreadable{})
	r.Header.Set("Content-Type", "application/json")
	r.ContentLength = 11
	if _, err := readBody(httptest.NewRecorder(), r, 10); err == nil || err.status != 413 {
		t.Errorf("%v", err)
	}
}

type unreadable struct{}

func (unreadable) Read([]byte) (int, error) { panic("the body was read") }

func TestBodyCutMidwayIsABadRequest(t *testing.T) {
	server := bodyServer(t, 1000)
	for _, head := range []string{
		"Content-Length: 100\r\n\r\n{\"a\":",
		"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"a\":\r\n",
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n%s", head)
		conn.(*net.TCPConn).CloseWrite()
		answer, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(answer, []byte("HTTP/1.1 400 ")) || !bytes.Contains(answer, []byte(`"code":"invalid_request"`)) {
			t.Errorf("%q: %s", head, answer)
		}
	}
}

// limitedElsewhere fails as Caddy's request_body does when its own limit is passed.
type limitedElsewhere struct{}

func (limitedElsewhere) Read([]byte) (int, error) {
	return 0, caddyhttp.Error(http.StatusRequestEntityTooLarge, &http.MaxBytesError{Limit: 7})
}

func TestBodyOverALimitInFrontOfTheHandlerNamesThatLimit(t *testing.T) {
	r := httptest.NewRequest(http.MethodPost, "/", limitedElsewhere{})
	r.Header.Set("Content-Type", "application/json")
	_, err := readBody(httptest.NewRecorder(), r, 1000)
	if err == nil || err.status != 413 || err.message != "The request body is larger than 7 bytes." {
		t.Errorf("%v", err)
	}
}
