package mesh

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestGatewayUnderAPathOfItsOwn(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "handle_path /llm/* {\n"+site("\tmodel test/named up")+"\n}\nrespond 404")
	if r := g.do(http.MethodPost, "/llm/v1/chat/completions", chatBody); r.StatusCode != 200 || string(r.body) != completion {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if got := up.last(t).URL.String(); got != "/v1/chat/completions" {
		t.Errorf("the upstream was asked at %s", got)
	}
	if r := g.do(http.MethodGet, "/llm/v1/models/test%2Fnamed", ""); r.StatusCode != 200 || r.decode(t)["id"] != "test/named" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := g.post(chatBody); r.StatusCode != 404 || len(r.body) != 0 {
		t.Errorf("outside of it: %s %s", r.Status, r.body)
	}
}

func TestOtherPathsGoToTheNextHandler(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "route {\n"+site("")+"\nrespond \"next {http.request.method}\"\n}")
	if r := g.post(chatBody); string(r.body) != completion {
		t.Errorf("%s %s", r.Status, r.body)
	}
	for _, tc := range []struct{ method, path string }{
		{"GET", "/"}, {"POST", "/v1/completions"}, {"GET", "/v1/modelsx"}, {"GET", "/v1"}, {"POST", "/v1/chat/completions/"},
		{"OPTIONS", "/v1/chat/completions"}, {"OPTIONS", "/v1/models"},
	} {
		r := g.do(tc.method, tc.path, "", "Authorization", "")
		if string(r.body) != "next "+tc.method || r.Header.Get("X-Request-Id") != "" {
			t.Errorf("%s %s: %s %q %s", tc.method, tc.path, r.Status, r.Header, r.body)
		}
	}
}

func TestGatewayBehindAMatcher(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "@llm header X-Tenant acme\n"+strings.Replace(site(""), "mesh {", "mesh @llm {", 1)+"\nfile_server {\n\troot $DIR\n}")
	if r := g.post(chatBody, "X-Tenant", "acme"); r.StatusCode != 200 {
		t.Errorf("matching: %s %s", r.Status, r.body)
	}
	if r := g.post(chatBody); r.StatusCode != 404 || r.Header.Get("X-Request-Id") != "" { // file_server's, not ours
		t.Errorf("not matching: %s %s", r.Status, r.body)
	}
}

func TestForwardAuthInFrontDecidesFirst(t *testing.T) {
	auth := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Badge") != "valid" {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "no badge")
		}
	})
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "forward_auth "+auth.address()+" {\n\turi /auth\n}\n"+site(""))
	if r := g.post(chatBody); r.StatusCode != 403 || string(r.body) != "no badge" || r.Header.Get("X-Request-Id") != "" || len(up.received()) != 0 {
		t.Errorf("denied: %s %q %s, and the upstream received %d requests", r.Status, r.Header, r.body, len(up.received()))
	}
	if r := g.post(chatBody, "X-Badge", "valid"); r.StatusCode != 200 || string(r.body) != completion {
		t.Errorf("allowed: %s %s", r.Status, r.body)
	}
	if r := g.post(chatBody, "X-Badge", "valid", "Authorization", "Bearer "+otherKey); r.StatusCode != 401 {
		t.Errorf("allowed, but with no key of the gateway's: %s %s", r.Status, r.body)
	}
}

func TestErrorsKeepTheirEnvelopeBesideHandleErrors(t *testing.T) {
	g := startGateway(t, freeAddress(t), site("")+"\nhandle_errors {\n\trespond \"swallowed\" 500\n}")
	for want, r := range map[int]*reply{
		401: g.post(chatBody, "Authorization", "Bearer "+otherKey),
		422: g.post(`{"messages":1}`),
		405: g.do(http.MethodGet, "/v1/chat/completions", ""),
		502: g.post(chatBody),
	} {
		if r.StatusCode != want || r.Header.Get("Content-Type") != "application/json" || r.errorCode(t) == "" {
			t.Errorf("%d: %s %q %s", want, r.Status, r.Header, r.body)
		}
	}
}

// TestRequestBodyInFrontLimitsToo has request_body's limit below that of the gateway. Of a body that announces its
// length, request_body itself disposes before the gateway sees it; what it then answers is handle_errors' business.
func TestRequestBodyInFrontLimitsToo(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "request_body {\n\tmax_size 1KB\n}\n"+site(""))
	long := strings.Replace(chatBody, "Hi", strings.Repeat("Hi", 1000), 1)
	req, err := http.NewRequest(http.MethodPost, g.url+"/v1/chat/completions", io.MultiReader(strings.NewReader(long))) // of unknown length
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+testKey)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	r := &reply{resp, body}
	if r.StatusCode != 413 || r.errorCode(t) != "request_too_large" || !bytes.Contains(body, []byte("1000 bytes")) {
		t.Errorf("of unknown length: %s %s", r.Status, body)
	}
	if r := g.post(long); r.StatusCode != 413 {
		t.Errorf("of known length: %s %s", r.Status, r.body)
	}
	if r := g.post(chatBody); r.StatusCode != 200 {
		t.Errorf("a short one: %s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("the upstream received %d requests", n)
	}
}

// accessLog returns the access log's entries as soon as there are n. They come behind the answers.
func accessLog(t *testing.T, text func() string, n int) (entries []map[string]any) {
	t.Helper()
	eventually(t, "the access log is complete", func() bool {
		entries = entries[:0]
		for line := range strings.Lines(text()) {
			var entry map[string]any
			if json.Unmarshal([]byte(line), &entry) == nil && entry["msg"] == "handled request" {
				entries = append(entries, entry)
			}
		}
		return len(entries) >= n
	})
	return entries
}

// TestAccessLogTellsWhatARequestCost also shows which directives may use the placeholders: log_append all of them,
// because it looks when the answer has gone out; a deferred header only those that are known when it begins: usage
// and cost are not.
func TestAccessLogTellsWhatARequestCost(t *testing.T) {
	stream := startUpstream(t, answers(200, "text/event-stream", roleFrame+wordFrame+finishFrame+usageFrame+doneFrame))
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), `log
log_append by {http.mesh.key.name}
log_append with {http.mesh.model}
log_append at {http.mesh.upstream}
log_append took {http.mesh.usage.total_tokens}
log_append paid {http.mesh.cost}
header {
	X-Key {http.mesh.key.name}
	X-Model {http.mesh.model}
	X-Served-By {http.mesh.upstream}
	defer
}
`+site(pricedModel+"\n\tupstream streams http://"+stream.address()+"/v1\n\tmodel test/stream streams {\n\t\tprice 2.50 10.00\n\t}"))
	r := g.post(strings.Replace(chatBody, "plain", "priced", 1))
	for name, want := range map[string]string{"X-Key": "tester", "X-Model": "test/priced", "X-Served-By": "up"} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s %q, want %q", name, got, want)
		}
	}
	log := func() string {
		text, _ := os.ReadFile(filepath.Join(g.dir, "caddy.log"))
		return string(text)
	}
	accessLog(t, log, 1) // else the next one's entry may come before it
	g.post(strings.Replace(streamBody, "plain", "stream", 1))
	accessLog(t, log, 2)
	g.post(chatBody, "Authorization", "Bearer "+otherKey)
	entries := accessLog(t, log, 3)
	for i, want := range []map[string]any{
		{"by": "tester", "with": "test/priced", "at": "up", "took": 1200.0, "paid": "0.0045",
			"mesh": map[string]any{"key": "tester", "model": "test/priced", "upstream": "up", "prompt_tokens": 1000.0, "cached_tokens": 400.0,
				"completion_tokens": 200.0, "cost_usd": "0.0045", "outcome": "completed", "stream": false, "estimated": false}},
		{"by": "tester", "with": "test/stream", "at": "streams", "took": 1200.0, "paid": "0.0045",
			"mesh": map[string]any{"key": "tester", "model": "test/stream", "upstream": "streams", "prompt_tokens": 1000.0,
				"completion_tokens": 200.0, "cost_usd": "0.0045", "outcome": "completed", "stream": true}},
		{"by": "", "with": "", "at": "", "took": 0.0, "mesh": map[string]any{"outcome": "refused", "key": nil, "cost_usd": nil}},
	} {
		wantFields(t, entries[i], want)
	}
}

// wantFields checks the members that are wanted, and no others.
func wantFields(t *testing.T, got, want map[string]any) {
	t.Helper()
	for name, value := range want {
		if inner, ok := value.(map[string]any); ok {
			object, _ := got[name].(map[string]any)
			wantFields(t, object, inner)
			continue
		}
		if got[name] != value {
			t.Errorf("%s is %v, want %v, in %v", name, got[name], value, got)
		}
	}
}

// TestSecretsStayWhereTheyWere looks for both secrets in everything that the process writes, at debug level, and
// that the admin endpoint tells.
func TestSecretsStayWhereTheyWere(t *testing.T) {
	const clientSecret, literal, upstreamSecret = testKey, otherKey, "sk-upstream-01ARZ3"
	t.Setenv("MESH_TEST_KEY", clientSecret)
	t.Setenv("MESH_TEST_UPSTREAM", upstreamSecret)
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		switch body, _ := io.ReadAll(r.Body); {
		case r.Header.Get("Authorization") != "Bearer "+upstreamSecret || r.Header.Get("Api-Key") != upstreamSecret:
			t.Errorf("the upstream received %q", r.Header)
		case bytes.Contains(body, []byte(`"stream":true`)):
			answers(200, "text/event-stream", roleFrame+"data: {\"error\":{\"message\":\"overloaded\"}}\n\n")(w, r)
		case bytes.Contains(body, []byte(`"model":"broken"`)):
			answers(500, "application/json", `{"error":{"message":"no quota for `+upstreamSecret+`"}}`)(w, r)
		case bytes.Contains(body, []byte(`"model":"refused"`)):
			answers(401, "application/json", `{"error":{"message":"Incorrect API key provided: `+upstreamSecret+`"}}`)(w, r)
		default:
			answers(200, "application/json", completion)(w, r)
		}
	})
	const head = "http://$ADDRESS {\n\tlog\n\tmesh {\n\t\tstore local $DIR/mesh.db\n\t\tkey {env.MESH_TEST_KEY}\n\t\tkey " + literal + "\n"
	p := startProcess(t, up.address(), head+`		upstream up http://$UPSTREAM/v1 {
			api_key {env.MESH_TEST_UPSTREAM}
			header Api-Key {env.MESH_TEST_UPSTREAM}
		}
		upstream gone http://`+freeAddress(t)+`/v1 {
			api_key {env.MESH_TEST_UPSTREAM}
		}
		model test/* up
		model test/gone gone
		default_model test/plain
	}
}
`)
	g := p.gateway()
	requests := 0
	for _, model := range []string{"plain", "broken", "refused", "gone"} {
		for _, key := range []string{clientSecret, literal} {
			g.post(strings.Replace(chatBody, "plain", model, 1), "Authorization", "Bearer "+key)
			requests++
		}
	}
	g.post(streamBody)
	g.post(chatBody, "Authorization", "Bearer "+strings.Replace(clientSecret, "V", "0", 1))
	g.do(http.MethodGet, "/v1/models", "")
	accessLog(t, p.log, requests+3)

	adapted, code := p.run("adapt", "--config", "Caddyfile")
	running := p.adminGet("/config/")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(literal)))
	for name, config := range map[string]string{"caddy adapt": adapted, "/config/": running} {
		if code != 0 || !strings.Contains(config, "{env.MESH_TEST_KEY}") || !strings.Contains(config, "{env.MESH_TEST_UPSTREAM}") || !strings.Contains(config, digest) {
			t.Errorf("%s shows %s", name, config)
		}
		wantNone(t, name, config, clientSecret, literal, upstreamSecret)
	}
	if log := p.log(); !strings.Contains(log, "upstream roundtrip") || !strings.Contains(log, "request refused") || !strings.Contains(log, "upstream attempt failed") {
		t.Errorf("the log is not that of these requests:\n%s", log)
	}
	p.kill(os.Interrupt)
	err := fs.WalkDir(os.DirFS(p.dir), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || path == "Caddyfile" || path == "admin" {
			return err
		}
		text, err := os.ReadFile(p.path(path))
		wantNone(t, path, string(text), clientSecret, literal, upstreamSecret)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func wantNone(t *testing.T, name, text string, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("%s has a secret in it: %s", name, text[max(0, i-300):i+len(secret)])
		}
	}
}
