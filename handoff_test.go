package mesh

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestCompletionComesBackByteForByte(t *testing.T) {
	body := `{ "id":"x", "choices":[ {"message":{"content":"\u00e9 😀"}, "n":1e-7} ],"usage":{"prompt_tokens":1,"completion_tokens":2} }` + "\n"
	up := startUpstream(t, answers(200, "application/json; charset=utf-8", body))
	g := startGateway(t, up.address(), site(""))
	r := g.post(chatBody)
	if string(r.body) != body || r.StatusCode != 200 || r.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s %q\n%s", r.Status, r.Header, r.body)
	}
	if r.Header.Get("X-Mesh-Routing-Model") != "test/plain" || r.Header.Get("X-Mesh-Routing-Attempts") != "1" ||
		r.Header.Get("X-Mesh-Routing-Fallback") != "false" || r.Header.Get("X-Mesh-Upstream") != "" {
		t.Errorf("routing headers: %q", r.Header)
	}
}

func TestCostIsAddedWhereTheModelHasAPrice(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t\tprice_cached 1.25\n\t}"))
	r := g.post(strings.Replace(chatBody, "plain", "priced", 1))
	// 600 × 2.50 + 400 × 1.25 + 200 × 10.00, per million
	want := strings.TrimSuffix(completion, "}") + `,"cost":"0.004"}`
	if string(r.body) != want {
		t.Errorf("got %s", r.body)
	}
	if fmt.Sprint(len(want)) != r.Header.Get("Content-Length") {
		t.Errorf("Content-Length %s", r.Header.Get("Content-Length"))
	}
}

func TestUpstreamReceivesOnlyWhatIsItsBusiness(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), strings.Replace(site(""), "api_key sk-upstream", "api_key sk-upstream\n\t\theader X-Org acme", 1))
	g.post(`{"session_id":"s","messages":[{"role":"user","content":"Hi"}],"timeout":5,"x":1e-7,"cache":null}`,
		"Cookie", "a=b", "X-Api-Key", "k", "X-MeshAPI-SDK", "go", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		"X-Forwarded-For", "1.2.3.4", "Accept-Encoding", "gzip", "Forwarded", "for=1.2.3.4")
	got := up.last(t)
	if want := `{"messages":[{"role":"user","content":"Hi"}],"x":1e-7,"model":"plain"}`; string(got.body) != want {
		t.Errorf("body %s", got.body)
	}
	if got.URL.String() != "/v1/chat/completions" || got.Host != up.address() || got.ContentLength != int64(len(got.body)) {
		t.Errorf("%s at %s, %d bytes", got.URL, got.Host, got.ContentLength)
	}
	want := map[string]string{
		"Accept-Encoding": "identity", "Authorization": "Bearer sk-upstream", "Content-Length": fmt.Sprint(len(got.body)),
		"Content-Type": "application/json", "User-Agent": "Go-http-client/1.1", "Via": "1.1 Caddy", "X-Org": "acme",
		"Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	for name, values := range got.Header {
		if want[name] != strings.Join(values, ",") {
			t.Errorf("upstream received %s: %q", name, values)
		}
		delete(want, name)
	}
	if len(want) > 0 {
		t.Errorf("upstream did not receive %v", want)
	}
}

func TestUpstreamMayBeCalledByAnotherHost(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), strings.Replace(site(""), "api_key sk-upstream", "header Host models.internal", 1))
	if r := g.post(chatBody); r.StatusCode != 200 || up.last(t).Host != "models.internal" || up.last(t).Header.Get("Authorization") != "" {
		t.Errorf("%s, asked as %s with %q", r.Status, up.last(t).Host, up.last(t).Header)
	}
}

// TestHandlerInPlaceOfReverseProxy has the upstream be another route of the same site.
func TestHandlerInPlaceOfReverseProxy(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+"\n\tupstream up {\n\t\tapi_key sk-upstream\n\t\tbase_path /v1?a=b\n\t\thandle {\n"+
		"\t\t\trewrite * /proxied{uri}\n\t\t\treverse_proxy $UPSTREAM\n\t\t}\n\t}\n\tmodel test/* up\n}")
	if r := g.post(chatBody); r.StatusCode != 200 || string(r.body) != completion {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if got := up.last(t); got.URL.String() != "/proxied/v1/chat/completions?a=b" || got.Header.Get("Authorization") != "Bearer sk-upstream" {
		t.Errorf("asked for %s with %q", got.URL, got.Header)
	}
}

func TestHeadersOfTheUpstreamStayBehind(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		for _, name := range []string{"Set-Cookie", "X-Ratelimit-Remaining-Requests", "Openai-Organization", "Openai-Processing-Ms",
			"Cf-Ray", "Server", "X-Openai-Proxy-Wasm", "X-Accel-Redirect", "Cache-Control", "Link", "Etag", "Strict-Transport-Security", "Access-Control-Allow-Origin", "X-Mesh-Upstream"} {
			w.Header().Set(name, "theirs")
		}
		w.Header().Set("X-Request-Id", "abc")
		answers(200, "application/json", completion)(w, nil)
	})
	g := startGateway(t, up.address(), site(""))
	r := g.post(chatBody)
	for name, values := range r.Header {
		if values[0] == "theirs" {
			t.Errorf("client received %s", name)
		}
	}
	if r.Header.Get("X-Upstream-Request-Id") != "abc" || !strings.HasPrefix(r.Header.Get("X-Request-Id"), "req_") {
		t.Errorf("%q", r.Header)
	}
}

func TestUpstreamErrorsAreMapped(t *testing.T) {
	const openAI = `{"error":{"message":"too long","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`
	for _, tc := range []struct {
		name        string
		status      int
		contentType string
		body        string
		header      string
		wantStatus  int
		want        string // of the error object
	}{
		{"context too long is relayed", 400, "application/json", openAI, "", 400,
			`{"code":"context_length_exceeded","message":"too long","type":"invalid_request_error","param":"messages","provider_code":"context_length_exceeded",` +
				`"provider_error":{"message":"too long","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`},
		{"an error without a code gets ours", 422, "application/json", `{"object":"error","message":"no","code":422}`, "", 422,
			`{"code":"unprocessable_entity","message":"no","type":"invalid_request_error","param":null,"provider_error":{"object":"error","message":"no","code":422}}`},
		{"an error that is only a string", 404, "application/json", `{"error":"model not found"}`, "", 404,
			`{"code":"not_found","message":"model not found","type":"invalid_request_error","param":null,"provider_error":"model not found"}`},
		{"a page at a wrong address is not a model that is missing", 404, "text/html", `<h1>404</h1>`, "", 502,
			`{"code":"upstream_error","message":"The upstream failed (status 404).","type":"api_error","param":null}`},
		{"a proxy's 413", 413, "text/html", `<h1>413</h1>`, "", 413,
			`{"code":"request_too_large","message":"The upstream refused the request (status 413).","type":"invalid_request_error","param":null}`},
		{"the gateway's own key refused", 401, "application/json", `{"error":{"message":"Incorrect API key provided: sk-ups***am","code":"invalid_api_key"}}`, "", 502,
			`{"code":"upstream_error","message":"The upstream refused the gateway's credentials.","type":"api_error","param":null}`},
		{"forbidden to the gateway", 403, "application/json", openAI, "", 502,
			`{"code":"upstream_error","message":"The upstream refused the gateway's credentials.","type":"api_error","param":null}`},
		{"busy", 429, "application/json", `{"error":{"message":"slow down","code":"rate_limit_exceeded"}}`, "7", 429,
			`{"code":"upstream_rate_limit_error","message":"The upstream is at its own rate limit.","type":"rate_limit_error","param":null,"retry_after_seconds":7}`},
		{"broken", 500, "application/json", `{"error":{"message":"boom","type":"server_error"}}`, "", 502,
			`{"code":"upstream_error","message":"The upstream failed (status 500).","type":"api_error","param":null}`},
		{"broken in HTML", 503, "text/html", `<html>`, "", 502,
			`{"code":"upstream_error","message":"The upstream failed (status 503).","type":"api_error","param":null}`},
		{"not JSON", 200, "text/html", `<html>`, "", 502,
			`{"code":"upstream_error","message":"The upstream's answer could not be read.","type":"api_error","param":null}`},
		{"an error with status 200", 200, "application/json", `{"error":{"message":"boom"}}`, "", 502,
			`{"code":"upstream_error","message":"The upstream reported an error.","type":"api_error","param":null}`},
		{"the request's own fault with status 200", 200, "application/json", openAI, "", 400,
			`{"code":"context_length_exceeded","message":"too long","type":"invalid_request_error","param":"messages","provider_code":"context_length_exceeded",` +
				`"provider_error":{"message":"too long","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}`},
		{"the gateway's own key refused with status 200", 200, "application/json",
			`{"error":{"message":"Incorrect API key provided: sk-ups***am","type":"invalid_request_error","code":"invalid_api_key"}}`, "", 502,
			`{"code":"upstream_error","message":"The upstream reported an error.","type":"api_error","param":null}`},
		{"the gateway's own key refused with status 400", 400, "application/json",
			`{"error":{"message":"Incorrect API key provided: sk-ups***am","type":"invalid_request_error","code":"invalid_api_key"}}`, "", 502,
			`{"code":"upstream_error","message":"The upstream refused the gateway's credentials.","type":"api_error","param":null}`},
		{"half a JSON", 200, "application/json", completion[:100], "", 502,
			`{"code":"upstream_error","message":"The upstream's answer could not be read.","type":"api_error","param":null}`},
		{"a redirect", 302, "text/html", ``, "", 502,
			`{"code":"upstream_error","message":"The upstream failed (status 302).","type":"api_error","param":null}`},
		{"a stream nobody asked for", 200, "text/event-stream", "data: {}\n\n", "", 502,
			`{"code":"upstream_error","message":"The upstream's answer could not be read.","type":"api_error","param":null}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				if tc.header != "" {
					w.Header().Set("Retry-After", tc.header)
				}
				w.Header().Set("X-Request-Id", "theirs")
				answers(tc.status, tc.contentType, tc.body)(w, r)
			})
			g := startGateway(t, up.address(), site(""))
			for _, body := range []string{chatBody, streamBody} {
				if body == streamBody && tc.contentType == "text/event-stream" {
					continue
				}
				r := g.post(body)
				if got := r.Header.Get("X-Upstream-Request-Id"); got != "theirs" && r.Header.Get("X-Mesh-Routing-Attempts") == "1" {
					t.Errorf("the upstream's id of the request is %q", got)
				}
				var envelope struct {
					Error     json.RawMessage
					RequestID string `json:"request_id"`
				}
				if err := json.Unmarshal(r.body, &envelope); err != nil {
					t.Fatalf("%v: %s", err, r.body)
				}
				if r.StatusCode != tc.wantStatus || string(envelope.Error) != tc.want {
					t.Errorf("got %d %s\nwant %d %s", r.StatusCode, envelope.Error, tc.wantStatus, tc.want)
				}
				if envelope.RequestID != r.Header.Get("X-Request-Id") || envelope.RequestID == "" {
					t.Errorf("request id %q, header %q", envelope.RequestID, r.Header.Get("X-Request-Id"))
				}
				if r.Header.Get("Retry-After") != tc.header {
					t.Errorf("Retry-After %q", r.Header.Get("Retry-After"))
				}
			}
		})
	}
}

func TestUnreachableUpstreamIs502(t *testing.T) {
	g := startGateway(t, freeAddress(t), site(""))
	r := g.post(chatBody)
	if r.StatusCode != 502 || r.errorCode(t) != "upstream_error" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestAnswerThatBreaksOffBeforeItIsWholeIs502(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", fmt.Sprint(len(completion)))
		io.WriteString(w, completion[:50])
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	g := startGateway(t, up.address(), site(""))
	r := g.post(chatBody)
	if r.StatusCode != 502 || r.errorCode(t) != "upstream_error" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestTimeoutIs504(t *testing.T) {
	up := startUpstream(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	g := startGateway(t, up.address(), site("\ttimeout 100ms"))
	r := g.post(chatBody)
	if r.StatusCode != 504 || r.errorCode(t) != "gateway_timeout" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	g.load("http://$ADDRESS {\n" + site("") + "\n}\n")
	r = g.post(`{"timeout":0.1,"messages":[{"role":"user","content":"Hi"}]}`)
	if r.StatusCode != 504 || r.errorCode(t) != "gateway_timeout" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestNextUpstreamOfTheModelAnswersWhereTheFirstCannot(t *testing.T) {
	var tried atomic.Int32
	bad := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		tried.Add(1)
		w.Header().Set("Set-Cookie", "leak=1")
		answers(503, "application/json", `{"error":{"message":"down"}}`)(w, nil)
	})
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site(fmt.Sprintf("\tupstream bad http://%s/base\n\tmodel test/two {\n\t\tupstream bad as other\n\t\tupstream up\n\t}\n\texpose_upstream", bad.address())))
	big := strings.Repeat("a", 1<<20)
	r := g.post(`{"model":"test/two","messages":[{"role":"user","content":"` + big + `"}]}`)
	if r.StatusCode != 200 || string(r.body) != completion || r.Header.Get("Set-Cookie") != "" {
		t.Errorf("%s %q %s", r.Status, r.Header, r.body)
	}
	if r.Header.Get("X-Mesh-Routing-Attempts") != "2" || r.Header.Get("X-Mesh-Routing-Fallback") != "true" || r.Header.Get("X-Mesh-Upstream") != "up" {
		t.Errorf("%q", r.Header)
	}
	if got := bad.last(t); tried.Load() != 1 || got.URL.Path != "/base/chat/completions" || string(got.body) != `{"model":"other","messages":[{"role":"user","content":"`+big+`"}]}` {
		t.Errorf("first upstream was asked %d times, at %s with %d bytes", tried.Load(), got.URL, len(got.body))
	}
	if got := up.last(t); string(got.body) != `{"model":"two","messages":[{"role":"user","content":"`+big+`"}]}` {
		t.Errorf("second upstream received %d bytes", len(got.body))
	}
}

func TestClientThatLeavesCancelsTheUpstream(t *testing.T) {
	for _, body := range []string{chatBody, streamBody} {
		cancelled := make(chan struct{})
		arrived := make(chan struct{})
		up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			close(arrived)
			<-r.Context().Done()
			close(cancelled)
		})
		g := startGateway(t, up.address(), site(""))
		ctx, cancel := context.WithCancel(t.Context())
		req, _ := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/v1/chat/completions", strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer "+testKey)
		req.Header.Set("Content-Type", "application/json")
		go http.DefaultClient.Do(req)
		<-arrived
		cancel()
		select {
		case <-cancelled:
		case <-time.After(10 * time.Second):
			t.Fatal("the upstream was not cancelled")
		}
		if n := len(up.received()); n != 1 {
			t.Errorf("the upstream was asked %d times", n)
		}
	}
}

// TestConnectionThatTheUpstreamClosesIsNotAFailure has an upstream that closes each kept-alive connection the moment
// the next request arrives on it, without an answer: as it looks when its idle time has just run out.
func TestConnectionThatTheUpstreamClosesIsNotAFailure(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var dropped atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for i := 0; ; i++ {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					io.Copy(io.Discard, req.Body)
					if i == 1 {
						dropped.Add(1)
						return
					}
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(completion), completion)
				}
			}()
		}
	}()
	g := startGateway(t, l.Addr().String(), site(""))
	for range 50 {
		if r := g.post(chatBody); r.StatusCode != 200 {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
	if dropped.Load() == 0 {
		t.Error("no connection was reused: the test shows nothing")
	}
}
