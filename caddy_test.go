package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/standard"
	_ "github.com/caddyserver/caddy/v2/modules/caddytls/standardstek"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	_ "github.com/caddyserver/caddy/v2/modules/logging"
)

// Keys of the tests.
const (
	testKey  = "rsk_01ARZ3NDEKTSV4RRFFQ69G5FAV"
	otherKey = "rsk_01BX5ZZKBKACTAV9WEVGEMMVRY"
)

// freeAddress returns a loopback address that nothing listens on.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// gateway is a Caddy in this process. There can be one at a time.
type gateway struct {
	t    testing.TB
	url  string // without a path
	dir  string
	vars *strings.Replacer

	options string // more global options
}

// startGateway runs a Caddy with one site, whose block it is given. $UPSTREAM stands for an upstream's address, $DIR
// for a folder of the test's own.
func startGateway(t testing.TB, upstream, site string) *gateway {
	t.Helper()
	return startGatewayWith(t, "", upstream, site)
}

// startGatewayWith is startGateway with more global options.
func startGatewayWith(t testing.TB, options, upstream, site string) *gateway {
	t.Helper()
	address := freeAddress(t)
	g := &gateway{t: t, url: "http://" + address, dir: t.TempDir(), options: options}
	g.vars = strings.NewReplacer("$UPSTREAM", upstream, "$DIR", g.dir, "$ADDRESS", address)
	g.load("http://$ADDRESS {\n" + site + "\n}\n")
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// load runs a whole Caddyfile, in place of the one before.
func (g *gateway) load(sites string) {
	g.t.Helper()
	global := "{\n\tadmin off\n\tpersist_config off\n\tauto_https off\n\tskip_install_trust\n\tstorage file_system $DIR/caddy\n" +
		"\tlog {\n\t\toutput file $DIR/caddy.log\n\t\tlevel DEBUG\n\t}\n" + g.options + "\n}\n"
	cfg := adaptCaddyfile(g.t, g.vars.Replace(global+sites))
	if err := caddy.Load(cfg, true); err != nil {
		g.t.Fatal(err)
	}
	awaitOneListener(g.t, g.url)
}

// awaitOneListener waits until the server of the configuration before has closed its socket, which Caddy does not wait
// for. Until then the kernel may give that socket a connection, and resets it in the end. It needs Linux to see.
func awaitOneListener(t testing.TB, url string) {
	t.Helper()
	const listening = "0A"
	port, err := strconv.Atoi(url[strings.LastIndexByte(url, ':')+1:])
	if err != nil {
		t.Fatal(err)
	}
	local := fmt.Sprintf(":%04X", port)
	eventually(t, "one server listens", func() bool {
		sockets, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			return true
		}
		both, _ := os.ReadFile("/proc/net/tcp6") // has those that listen on all addresses, of either kind
		sockets = append(sockets, both...)
		count := 0
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			if len(fields) > 3 && strings.HasSuffix(fields[1], local) && fields[3] == listening {
				count++
			}
		}
		return count <= 1
	})
}

func adaptCaddyfile(t testing.TB, text string) []byte {
	t.Helper()
	cfg, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			t.Errorf("adapting: %s", w)
		}
	}
	return cfg
}

// logged waits for the first line of the log with a message, and returns it.
func (g *gateway) logged(message string) (line map[string]any) {
	g.t.Helper()
	eventually(g.t, "the log says "+message, func() bool {
		text, err := os.ReadFile(g.dir + "/caddy.log")
		if err != nil {
			g.t.Fatal(err)
		}
		for raw := range strings.Lines(string(text)) {
			line = nil
			if json.Unmarshal([]byte(raw), &line) == nil && line["msg"] == message {
				return true
			}
		}
		return false
	})
	return line
}

// site is a mesh block with the things most tests need, and what else it is given.
func site(more string) string {
	return "mesh {\n\tstore local $DIR/mesh.db\n\tkey " + testKey + " {\n\t\tname tester\n\t}\n" +
		"\tupstream up http://$UPSTREAM/v1 {\n\t\tapi_key sk-upstream\n\t}\n" +
		"\tmodel test/* up\n\tdefault_model test/plain\n" + more + "\n}"
}

// reply is a whole answer of the gateway.
type reply struct {
	*http.Response
	body []byte
}

func (r *reply) decode(t testing.TB) (v map[string]any) {
	t.Helper()
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatalf("%v in %q", err, r.body)
	}
	return v
}

// errorCode returns the code of the error envelope.
func (r *reply) errorCode(t testing.TB) string {
	t.Helper()
	e, _ := r.decode(t)["error"].(map[string]any)
	code, _ := e["code"].(string)
	return code
}

// post sends body to the chat endpoint and reads the whole answer. Headers come as name, value, ….
func (g *gateway) post(body string, headers ...string) *reply {
	g.t.Helper()
	return g.do(http.MethodPost, "/v1/chat/completions", body, headers...)
}

func (g *gateway) do(method, path, body string, headers ...string) *reply {
	g.t.Helper()
	resp := g.send(method, path, body, headers...)
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatalf("reading answer: %v after %q", err, all)
	}
	return &reply{resp, all}
}

// send sends a request and returns as soon as the answer begins.
func (g *gateway) send(method, path, body string, headers ...string) *http.Response {
	g.t.Helper()
	req, err := http.NewRequest(method, g.url+path, strings.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+testKey)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	return resp
}

// upstream is a provider whose answers the test writes.
type upstream struct {
	*httptest.Server
	mu       sync.Mutex
	requests []received
}

type received struct {
	*http.Request
	body []byte
}

// startUpstream runs a provider that answers with h. The request's body has been read and is there again.
func startUpstream(t testing.TB, h http.HandlerFunc) *upstream {
	t.Helper()
	u := new(upstream)
	u.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		u.mu.Lock()
		u.requests = append(u.requests, received{r, body})
		u.mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(body))
		h(w, r)
	}))
	t.Cleanup(u.Close)
	return u
}

func (u *upstream) address() string { return u.Listener.Addr().String() }

func (u *upstream) received() []received {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]received(nil), u.requests...)
}

// last returns the last request.
func (u *upstream) last(t testing.TB) received {
	t.Helper()
	all := u.received()
	if len(all) == 0 {
		t.Fatal("the upstream received nothing")
	}
	return all[len(all)-1]
}

// answers is a provider's handler that always answers the same.
func answers(status int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// completion is an answer as OpenAI's API reference shows it.
const completion = `{"id":"chatcmpl-1","object":"chat.completion","created":1750000000,"model":"gpt-4o-2024-08-06",` +
	`"choices":[{"index":0,"message":{"role":"assistant","content":"Hello there.","refusal":null},"logprobs":null,"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":1000,"completion_tokens":200,"total_tokens":1200,"prompt_tokens_details":{"cached_tokens":400}}}`

// chatBody is a plain request.
const chatBody = `{"model":"test/plain","messages":[{"role":"user","content":"Hi"}]}`

// streamBody is a plain request for a stream.
const streamBody = `{"model":"test/plain","stream":true,"messages":[{"role":"user","content":"Hi"}]}`
