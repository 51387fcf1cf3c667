package mesh

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// lockstep is an upstream that sends a frame only when the client has the one before it.
type lockstep struct {
	*upstream
	next chan struct{}
}

const lockstepFrames = 50

func startLockstep(t *testing.T) *lockstep {
	l := &lockstep{next: make(chan struct{})}
	l.upstream = startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for range lockstepFrames {
			io.WriteString(w, wordFrame)
			http.NewResponseController(w).Flush()
			select {
			case <-l.next:
			case <-r.Context().Done():
				return
			}
		}
		io.WriteString(w, finishFrame+doneFrame)
	})
	return l
}

// read reads a whole stream through a gateway, and fails if a frame is held back.
func (l *lockstep) read(t *testing.T, client *http.Client, url, encoding, proto string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/chat/completions", strings.NewReader(streamBody))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+testKey)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept-Encoding", encoding)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Proto != proto || resp.Header.Get("Content-Encoding") != strings.TrimSuffix(encoding, "identity") {
		t.Fatalf("%s with %q, want %s with %s", resp.Proto, resp.Header, proto, encoding)
	}
	body := decoded(t, resp.Body, encoding)
	frame := make([]byte, len(wordFrame))
	for i := range lockstepFrames {
		if _, err := io.ReadFull(body, frame); err != nil || string(frame) != wordFrame {
			t.Fatalf("frame %d: %v %q", i, err, frame)
		}
		l.next <- struct{}{}
	}
	if rest, err := io.ReadAll(body); err != nil || string(rest) != finishFrame+doneFrame {
		t.Errorf("%v %q", err, rest)
	}
}

func decoded(t *testing.T, body io.Reader, encoding string) io.Reader {
	t.Helper()
	switch encoding {
	case "zstd":
		r, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1)) // reads no further than it is asked to
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Close)
		return r
	case "gzip":
		r, err := gzip.NewReader(body)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	return body
}

const encodings = "encode zstd gzip\n"

func TestFramesAreNotHeldBackByCompression(t *testing.T) {
	up := startLockstep(t)
	g := startGateway(t, up.address(), encodings+site(""))
	for _, encoding := range []string{"zstd", "gzip", "identity"} {
		up.read(t, http.DefaultClient, g.url, encoding, "HTTP/1.1")
	}
}

func TestFramesAreNotHeldBackByHTTP2WithoutTLS(t *testing.T) {
	up := startLockstep(t)
	p := startProcess(t, up.address(), "{\n\t$OPTIONS\n\tservers {\n\t\tprotocols h1 h2c\n\t}\n}\n"+fmt.Sprintf(inSite, encodings+site("")))
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	for _, encoding := range []string{"identity", "gzip", "zstd"} {
		up.read(t, &http.Client{Transport: transport}, p.url, encoding, "HTTP/2.0")
	}
	up.read(t, http.DefaultClient, p.url, "identity", "HTTP/1.1")
}

// TestGatewayWithACertificateOfItsOwn has Caddy's own authority sign one; its root is in the data folder.
func TestGatewayWithACertificateOfItsOwn(t *testing.T) {
	up := startLockstep(t)
	p := startProcess(t, up.address(), "https://$ADDRESS {\n\ttls internal\n"+encodings+site("")+"\n}\n")
	roots := x509.NewCertPool()
	eventually(t, "there is a root certificate", func() bool {
		pem, err := os.ReadFile(p.path("data/caddy/pki/authorities/local/root.crt"))
		return err == nil && roots.AppendCertsFromPEM(pem)
	})
	url := strings.Replace(p.url, "http:", "https:", 1)
	for proto, versions := range map[string][]string{"HTTP/1.1": {"http/1.1"}, "HTTP/2.0": {"h2"}} {
		transport := &http.Transport{ForceAttemptHTTP2: proto == "HTTP/2.0", TLSClientConfig: &tls.Config{RootCAs: roots, NextProtos: versions}}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport}
		eventually(t, "there is a certificate", func() bool {
			resp, err := client.Get(url + "/v1/models")
			if err != nil {
				return false
			}
			resp.Body.Close()
			return true
		})
		for _, encoding := range []string{"identity", "gzip", "zstd"} {
			up.read(t, client, url, encoding, proto)
		}
	}
}
