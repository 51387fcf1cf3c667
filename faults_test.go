package mesh

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

// faults are the ways in which an upstream fails, by their name in testdata/faults.md. Each returns its address.
var faults = map[string]func(t *testing.T) string{
	"connection refused":     func(t *testing.T) string { return freeAddress(t) },
	"reset before headers":   func(t *testing.T) string { return rawUpstream(t, "") },
	"reset mid-body":         func(t *testing.T) string { return rawUpstream(t, head("application/json", 500)+completion[:50]) },
	"reset mid-stream":       func(t *testing.T) string { return rawUpstream(t, head("text/event-stream", 5000)+roleFrame+wordFrame) },
	"TLS failure":            func(t *testing.T) string { return "https://" + rawUpstream(t, "no TLS here") },
	"TLS not trusted":        untrusted,
	"DNS failure":            func(*testing.T) string { return "no-such-host.invalid:80" },
	"400":                    refuses(400, ""),
	"401":                    refuses(401, ""),
	"403":                    refuses(403, ""),
	"404":                    refuses(404, ""),
	"408":                    refuses(408, ""),
	"413":                    refuses(413, ""),
	"422":                    refuses(422, ""),
	"429":                    refuses(429, ""),
	"429 with Retry-After":   refuses(429, "7"),
	"500":                    refuses(500, ""),
	"502":                    refuses(502, ""),
	"503":                    refuses(503, ""),
	"504":                    refuses(504, ""),
	"529":                    refuses(529, ""),
	"HTML with 200":          does(answers(200, "text/html", "<html>")),
	"JSON error with 200":    does(answers(200, "application/json", `{"error":{"message":"overloaded"}}`)),
	"SSE first frame error":  does(sends(errorEvent)),
	"SSE second frame error": does(sends(roleFrame + errorEvent)),
	"hang before headers":    does(hangs("")),
	"hang mid-stream":        does(hangs(roleFrame + wordFrame)),
}

func does(h http.HandlerFunc) func(*testing.T) string {
	return func(t *testing.T) string { return startUpstream(t, h).address() }
}

func refuses(status int, retryAfter string) func(*testing.T) string {
	return does(func(w http.ResponseWriter, r *http.Request) {
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		answers(status, "application/json", `{"error":{"message":"no","type":"some_error"}}`)(w, r)
	})
}

func head(contentType string, length int) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", contentType, length)
}

// rawUpstream reads a request, says something and closes the connection; with a reset if it says nothing.
func rawUpstream(t *testing.T, says string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if req, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					io.Copy(io.Discard, req.Body)
				}
				io.WriteString(conn, says)
				if says == "" {
					conn.(*net.TCPConn).SetLinger(0)
				}
			}()
		}
	}()
	return l.Addr().String()
}

func untrusted(t *testing.T) string {
	s := httptest.NewTLSServer(answers(200, "application/json", completion))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(s.Close)
	return s.URL
}

// faultRow is a row of testdata/faults.md.
type faultRow struct {
	name                                                     string
	alone, charged, withAnother, attempts, served, inCircuit string
}

func readFaults(t *testing.T) (rows []faultRow) {
	text, err := os.ReadFile("testdata/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 9 || strings.Contains(line, "---") || strings.Contains(line, "| fault |") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rows = append(rows, faultRow{cells[1], cells[2], cells[3], cells[4], cells[5], cells[6], cells[7]})
	}
	return rows
}

func TestFaultsAreAsTheTableSays(t *testing.T) {
	rows := readFaults(t)
	tested := make(map[string]bool)
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept"), "event-stream") {
			sends(roleFrame+wordFrame+finishFrame+doneFrame)(w, r)
			return
		}
		answers(200, "application/json", completion)(w, r)
	})
	for _, want := range rows {
		tested[want.name] = true
		name, stream := strings.CutSuffix(want.name, " +s")
		if faults[name] == nil {
			t.Fatalf("there is no fault %q", name)
		}
		t.Run(want.name, func(t *testing.T) {
			if got := observe(t, up, name, stream); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
	for name := range faults {
		if onlyStreams := strings.HasPrefix(name, "SSE") || strings.HasSuffix(name, "mid-stream"); !tested[name+" +s"] || !onlyStreams && !tested[name] {
			t.Errorf("the table lacks %s", name)
		}
	}
}

func (r faultRow) String() string {
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s |", r.name, r.alone, r.charged, r.withAnother, r.attempts, r.served, r.inCircuit)
}

func observe(t *testing.T, up *upstream, name string, stream bool) faultRow {
	address := faults[name](t)
	if !strings.Contains(address, "://") {
		address = "http://" + address
	}
	patience, limit := "30s", "60s"
	if strings.HasPrefix(name, "hang") {
		patience, limit = "500ms", "3s"
	}
	text := func(name, fallback string) string { // the name is part of what a circuit is remembered by
		return site(fmt.Sprintf("\ttimeout %s\n\tupstream %s %s/v1 {\n\t\tcircuit {\n\t\t\tfailures 1\n\t\t}\n\t}\n\tmodel test/first %s {\n\t\tprice 1 2\n%s\n\t}\n"+
			"\tmodel test/second up {\n\t\tprice 2.50 10.00\n\t}\n", limit, name, address, name, fallback))
	}
	body, accept := ask("test/first", ""), ""
	row := faultRow{name: name}
	if stream {
		body, accept, row.name = streamOf("test/first"), "text/event-stream", name+" +s"
	}
	first := "\t\tfirst_byte_timeout " + patience
	g := startGateway(t, up.address(), text("bad", first))
	r := g.post(body, "Accept", accept)
	row.alone = howItEnded(r)
	e := g.ledger(1)[0]
	row.charged = map[bool]string{true: "yes", false: "no"}[e.Cost > 0]
	again := g.post(body, "Accept", accept)
	row.inCircuit = map[bool]string{true: "failure", false: "no"}[again.StatusCode == 503 && again.Header.Get("X-Mesh-Routing-Attempts") == "0"]
	if again.StatusCode == 429 && again.Header.Get("X-Mesh-Routing-Attempts") == "0" {
		row.inCircuit = "rests"
	}

	g.load("http://$ADDRESS {\n" + text("worse", first+"\n\t\tfallback test/second") + "\n}\n")
	r = g.post(body, "Accept", accept)
	row.withAnother, row.attempts = howItEnded(r), r.Header.Get("X-Mesh-Routing-Attempts")
	row.served = cmp.Or(r.Header.Get("X-Mesh-Routing-Model"), "nobody")
	return row
}

// howItEnded is a status and the code of an error, or of a stream its end.
func howItEnded(r *reply) string {
	text := string(r.body)
	if i := strings.Index(text, `"error":{"code":"`); i >= 0 {
		code, _, _ := strings.Cut(text[i+len(`"error":{"code":"`):], `"`)
		if r.Header.Get("Content-Type") == "application/json" {
			return fmt.Sprintf("%d %s", r.StatusCode, code)
		}
		return fmt.Sprintf("%d, frame %s", r.StatusCode, code)
	}
	return fmt.Sprintf("%d whole", r.StatusCode)
}

func TestEachCandidateReceivesTheSameButForTheModel(t *testing.T) {
	first := startUpstream(t, answers(503, "application/json", bad))
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), twoSites(first.address(), ""))
	g.post(`{"models":["test/second"], "messages":[{"role":"user","content":"\u00e9 ` + strings.Repeat("x", 1<<20) + `"}],"model" : "test/first","x":1e-7,"timeout":30}`)
	a, b := string(first.last(t).body), string(up.last(t).body)
	if b != strings.Replace(a, `"model" : "first"`, `"model" : "second"`, 1) || a == b || first.last(t).ContentLength != int64(len(a)) {
		t.Errorf("first received %.200s…\nsecond received %.200s…", a, b)
	}
}
