package mesh

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

func TestOnlyKnownKeysGetIn(t *testing.T) {
	t.Setenv("MESH_TEST_KEY", "rsk_01BX5ZZKBKACTAV9WEVGEMMVS0\n")
	hashed := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("rsk_01BX5ZZKBKACTAV9WEVGEMMVS1")))
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tkey "+otherKey+" {\n\t\tsuspended\n\t}\n\tkey {env.MESH_TEST_KEY}\n\tkey "+hashed+"\n"+
		"\tkey rsk_01BX5ZZKBKACTAV9WEVGEMMVS2 {\n\t\texpires "+time.Now().Add(-time.Second).Format(time.RFC3339)+"\n\t}\n"+
		"\tkey rsk_01BX5ZZKBKACTAV9WEVGEMMVS3 {\n\t\texpires "+time.Now().Add(time.Hour).Format(time.RFC3339)+"\n\t}\n"))
	for _, tc := range []struct {
		name, authorization string
		status              int
		code                string
	}{
		{"a known key", "Bearer " + testKey, 200, ""},
		{"in small letters", "bearer " + "rsk_" + strings.ToLower(testKey[4:]), 200, ""},
		{"all in small letters", "bearer " + strings.ToLower(testKey), 200, ""},
		{"all in capitals", "BEARER " + strings.ToUpper(testKey), 200, ""},
		{"with more spaces", "Bearer   " + testKey, 200, ""},
		{"from the environment", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS0", 200, ""},
		{"known by its digest", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS1", 200, ""},
		{"not yet expired", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS3", 200, ""},
		{"none", "", 401, "unauthorized"},
		{"another scheme", "Basic " + testKey, 401, "unauthorized"},
		{"no scheme", testKey, 401, "unauthorized"},
		{"no token", "Bearer ", 401, "unauthorized"},
		{"unknown", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVRZ", 401, "unauthorized"},
		{"expired", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS2", 401, "unauthorized"},
		{"a prefix of a key", "Bearer " + testKey[:29], 401, "unauthorized"},
		{"a key and more", "Bearer " + testKey + "0", 401, "unauthorized"},
		{"the digest itself", "Bearer " + hashed, 401, "unauthorized"},
		{"SQL", "Bearer rsk_' OR 1=1 --0000000000000000", 401, "unauthorized"},
		{"suspended", "Bearer " + otherKey, 403, "forbidden"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, r := range []*reply{
				g.post(chatBody, "Authorization", tc.authorization),
				g.do(http.MethodGet, "/v1/models", "", "Authorization", tc.authorization),
			} {
				if r.StatusCode != tc.status || r.errorCode(t) != tc.code {
					t.Errorf("%s %s", r.Status, r.body)
				}
				if (r.Header.Get("WWW-Authenticate") != "") != (tc.status == 401) {
					t.Errorf("WWW-Authenticate: %q", r.Header.Get("WWW-Authenticate"))
				}
			}
		})
	}
}

// TestKeyIsCheckedBeforeTheBodyIsRead announces a body and waits to be asked for it: whoever has no key shall not
// make the gateway take in anything.
func TestKeyIsCheckedBeforeTheBodyIsRead(t *testing.T) {
	g := startGateway(t, freeAddress(t), site(""))
	for key, want := range map[string]string{testKey: "HTTP/1.1 100 Continue", otherKey: "HTTP/1.1 401 Unauthorized"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n"+
			"Content-Type: application/json\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n", conn.RemoteAddr(), key)
		if line, _, err := bufio.NewReader(conn).ReadLine(); string(line) != want {
			t.Errorf("%s: %q, %v", key, line, err)
		}
	}
}

func TestKeyMayUseOnlyItsModels(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmodel a/b up\n\tmodel a/c up\n\tkey "+otherKey+" {\n\t\tmodels a/b d/*\n\t\tdefault_model a/b\n\t}"))
	for model, want := range map[string]string{
		`"a/b"`: "", `null`: "", `"a/c"`: "forbidden", `"test/plain"`: "forbidden", `"d/e"`: "model_not_found", `"a/bc"`: "model_not_found",
	} {
		r := g.post(`{"messages":[{"role":"user","content":"Hi"}],"model":`+model+`}`, "Authorization", "Bearer "+otherKey)
		if r.errorCode(t) != want {
			t.Errorf("%s: %s", model, r.body)
		}
	}
	if n := len(up.received()); n != 2 {
		t.Errorf("the upstream received %d requests", n)
	}
}

// TestLongModelNameGoesNowhere has a client fill the log and the answer with a name.
func TestLongModelNameGoesNowhere(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", "log\n"+site(""))
	long := "test/" + strings.Repeat("x", 1<<20)
	r := g.post(`{"model":"` + long + `","messages":[{"role":"user","content":"Hi"}]}`)
	if r.StatusCode != 404 || r.errorCode(t) != "model_not_found" || len(r.body) > 1000 {
		t.Errorf("%s, %d bytes", r.Status, len(r.body))
	}
	log, err := os.ReadFile(g.dir + "/caddy.log")
	if err != nil || len(log) > 100_000 {
		t.Errorf("%d bytes in the log, %v", len(log), err)
	}
}

func TestNamesThatBeginSoMayLeadToAModel(t *testing.T) {
	all := []*Model{{Name: "a/b"}, {Name: "a/*"}, {Name: "a/b*"}, {Name: "c"}}
	table := newModelTable(all, nil)
	for prefix, want := range map[string]string{
		"": "a/b a/* a/b* c", "a": "a/b a/* a/b*", "a/": "a/b a/* a/b*", "a/b": "a/b a/b*", "a/bc": "a/b*", "a/c": "a/*", "c": "c", "cc": "", "b/": "",
	} {
		var got []string
		for _, m := range all {
			if table.mayLead(prefix, m) {
				got = append(got, m.Name)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %v, want %s", prefix, got, want)
		}
	}
}

func TestModelOfARequestThatNamesNone(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tkey "+otherKey+" {\n\t\tdefault_model test/of-key\n\t}"))
	for _, tc := range []struct{ key, model, want string }{
		{testKey, "", "plain"}, {otherKey, "", "of-key"}, {otherKey, `"model":"test/x",`, "x"}, {otherKey, `"model":null,`, "of-key"},
	} {
		r := g.post("{"+tc.model+`"messages":[{"role":"user","content":"Hi"}]}`, "Authorization", "Bearer "+tc.key)
		if got := string(up.last(t).body); r.StatusCode != 200 || !strings.Contains(got, `"model":"`+tc.want+`"`) {
			t.Errorf("%s %s", r.Status, got)
		}
	}
	g.load("http://$ADDRESS {\n" + strings.Replace(site(""), "default_model test/plain", "", 1) + "\n}\n")
	for model, want := range map[string]string{
		"":                         `"message":"The request names no model, and the default one, \"openai/gpt-4o\", is not configured."`,
		`"model":"openai/gpt-4o",`: `"message":"The model \"openai/gpt-4o\" does not exist."`,
	} {
		r := g.post("{" + model + `"messages":[{"role":"user","content":"Hi"}]}`)
		if body := string(r.body); r.StatusCode != 404 || r.errorCode(t) != "model_not_found" || !strings.Contains(body, want) || !strings.Contains(body, `"param":"model"`) {
			t.Errorf("%q: %s %s", model, r.Status, r.body)
		}
	}
}
