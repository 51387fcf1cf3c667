package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// keyedProcesses runs a test with a Caddy on a local store, and with one on Redis, which is nil for the former.
func keyedProcesses(t *testing.T, test func(t *testing.T, p *process, server *redisServer)) {
	up := startUpstream(t, answers(200, "application/json", completion))
	priced := strings.Replace(site(""), "model test/* up", "model test/* up {\n\t\tprice 2.50 10.00\n\t}", 1)
	t.Run("local", func(t *testing.T) {
		test(t, startManaged(t, up.address(), fmt.Sprintf(inSite, "log\n"+priced)), nil)
	})
	t.Run("redis", func(t *testing.T) {
		server := startRedis(t)
		store := "store redis " + server.address + " {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}"
		test(t, startManaged(t, up.address(), fmt.Sprintf(inSite, "log\n"+strings.Replace(priced, "store local $DIR/mesh.db", store, 1))), server)
	})
}

// startManaged is startProcess for those who ask the admin endpoint: a site listens a moment before its configuration counts
// as the one that runs.
func startManaged(t testing.TB, upstream, caddyfile string) *process {
	t.Helper()
	p := startProcess(t, upstream, caddyfile)
	eventually(t, "the configuration runs", func() bool { status, _ := p.ask("GET", keysPath, ""); return status == 200 })
	return p
}

// ask sends a request to the admin endpoint.
func (p *process) ask(method, path, body string) (status int, answer string) {
	p.t.Helper()
	r, err := http.NewRequest(method, "http://127.0.0.1"+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := p.admin.Do(r)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// askKey is ask where the answer has to be a key.
func (p *process) askKey(method, path, body string, want int) (v keyView) {
	p.t.Helper()
	status, answer := p.ask(method, path, body)
	if status != want {
		p.t.Fatalf("%s %s: %d %s", method, path, status, answer)
	}
	if err := json.Unmarshal([]byte(answer), &v); err != nil {
		p.t.Fatalf("%v in %s", err, answer)
	}
	return v
}

// with sends a chat request with a secret, and returns the status.
func (p *process) with(secret string) int {
	p.t.Helper()
	return p.gateway().post(chatBody, "Authorization", "Bearer "+secret).StatusCode
}

func (p *process) comesTo(what, secret string, status int) {
	p.t.Helper()
	eventually(p.t, what, func() bool { return p.with(secret) == status })
}

func TestKeyLivesThroughTheAdminEndpoint(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		k := p.askKey("POST", "/mesh/keys", `{"name":"team-a","owner":"acme","rpm":60,"tpm":100000,"max_concurrency":5,
			"spend_cap_usd":"25.00","spend_period":"month","models":["test/*","gone/*"],"default_model":"test/plain",
			"default_params":{"temperature":0.5},"metadata":{"cost-center":"4711"},"expires":"2099-01-01T00:00:00Z"}`, 201)
		if !strings.HasPrefix(k.ID, "key_") || k.Secret == "" || k.Source != sourceStore || k.RPM != 60 || k.Created.IsZero() ||
			len(k.Warnings) != 1 || !strings.Contains(k.Warnings[0], "gone/*") {
			t.Errorf("%+v", k)
		}
		p.comesTo("the key works", k.Secret, 200)
		path := "/mesh/keys/" + k.ID
		var shown keyView
		eventually(t, "what was spent is shown", func() bool {
			shown = p.askKey("GET", path, "", 200)
			return shown.Use.Spend > 0
		})
		if u := shown.Use; u.SpendPeriod != u.Spend || u.RequestsDay < 1 || u.TokensMinute == nil || u.UnderWay == nil {
			t.Errorf("%+v", u)
		}
		if shown.Secret != "" || shown.Metadata["cost-center"] != "4711" || string(shown.DefaultParams["temperature"]) != "0.5" {
			t.Errorf("%+v", shown)
		}
		changed := p.askKey("PATCH", path, `{"rpm":null,"rpd":5,"suspended":true}`, 200)
		if changed.RPM != 0 || changed.RPD != 5 || changed.Name != "team-a" || !changed.Suspended {
			t.Errorf("%+v", changed)
		}
		p.comesTo("the key is suspended", k.Secret, 403)
		p.askKey("PATCH", path, `{"suspended":false}`, 200)
		p.comesTo("the key works again", k.Secret, 200)
		if status, answer := p.ask("DELETE", path, ""); status != 204 {
			t.Errorf("%d %s", status, answer)
		}
		p.comesTo("the key is gone", k.Secret, 401)
		if status, answer := p.ask("GET", path, ""); status != 404 {
			t.Errorf("%d %s", status, answer)
		}
	})
}

func TestWrongRequestsAboutKeysAreRefusedByName(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		k := p.askKey("POST", "/mesh/keys", `{}`, 201)
		var listed struct{ Keys []keyView }
		if err := json.Unmarshal([]byte(p.adminGet("/mesh/keys")), &listed); err != nil || len(listed.Keys) != 2 {
			t.Fatal(err, listed)
		}
		i := slices.IndexFunc(listed.Keys, func(k keyView) bool { return k.Source == sourceConfig })
		configured := listed.Keys[i]
		if configured.Name != "tester" || configured.Key.Secret != "" {
			t.Errorf("%+v", configured)
		}
		for _, tc := range []struct {
			method, path, body string
			status             int
			want               string
		}{
			{"POST", "", `{"rmp":5}`, 400, "rmp: a key has no such field"},
			{"POST", "", `{"key":"rsk_01ARZ3NDEKTSV4RRFFQ69G5FAV"}`, 400, "key: a key has no such field"},
			{"POST", "", `{"rpm":"5"}`, 400, `rpm: \"5\" is not a whole number`},
			{"POST", "", `{"rpm":0}`, 400, "rpm: 0 would refuse every request"},
			{"POST", "", `{"rpm":-1}`, 400, "rpm: -1 is negative"},
			{"POST", "", `{"spend_cap_usd":25}`, 400, "spend_cap_usd: 25 is not an amount of USD as a string"},
			{"POST", "", `{"spend_cap_hard":true}`, 400, "spend_cap_hard needs spend_cap_usd"},
			{"POST", "", `{"spend_period":"year"}`, 400, `spend period \"year\" is none of`},
			{"POST", "", `{"models":[]}`, 400, "models: the list is empty"},
			{"POST", "", `{"default_model":"a b"}`, 400, "default_model:"},
			{"POST", "", `{"expires":"tomorrow"}`, 400, `expires: \"tomorrow\" is not a time`},
			{"POST", "", `{"default_params":{"stream":true}}`, 400, "default_params: stream: stream cannot be a default"},
			{"POST", "", `[{"rpm":1},{"rpm":0}]`, 400, "key 2: rpm: 0"},
			{"POST", "", `"a"`, 400, "neither an object nor a list"},
			{"POST", "", `{`, 400, "the body is not what it should be"},
			{"POST", "", ``, 400, "the body is not what it should be"},
			{"POST", "", `null`, 400, "null is no key"},
			{"POST", "", `[{},null]`, 400, "null is no key"},
			{"PATCH", "/" + k.ID, `[]`, 400, "the body is not what it should be"},
			{"PUT", "", `{}`, 405, "method not allowed"},
			{"GET", "?limit=0", "", 400, "limit:"},
			{"GET", "/key_none", "", 404, "there is no such key"},
			{"PATCH", "/key_none", `{}`, 404, "there is no such key"},
			{"DELETE", "/key_none", "", 404, "there is no such key"},
			{"POST", "/key_none/rotate", "", 404, "there is no such key"},
			{"POST", "/" + k.ID + "/turn", "", 404, "there is nothing at"},
			{"PATCH", "/" + k.ID, `{"rpm":1.5}`, 400, "rpm: 1.5 is not a whole number"},
			{"POST", "/" + k.ID + "/rotate", `{"grace":"long"}`, 400, `grace: \"long\" is not a duration`},
			{"POST", "/" + k.ID + "/rotate", `{"after":"1h"}`, 400, "after: a rotation has no such field"},
			{"PATCH", "/" + configured.ID, `{"rpm":1}`, 409, "is in the configuration"},
			{"DELETE", "/" + configured.ID, "", 409, "is in the configuration"},
			{"POST", "/" + configured.ID + "/rotate", "", 409, "is in the configuration"},
			{"GET", "/" + configured.ID, "", 200, `"source":"config"`},
		} {
			if status, answer := p.ask(tc.method, "/mesh/keys"+tc.path, tc.body); status != tc.status || !strings.Contains(answer, tc.want) {
				t.Errorf("%s %s %s: %d %s, want %d %s", tc.method, tc.path, tc.body, status, answer, tc.status, tc.want)
			}
		}
		if json.Unmarshal([]byte(p.adminGet("/mesh/keys")), &listed); len(listed.Keys) != 2 {
			t.Errorf("%d keys are listed", len(listed.Keys))
		}
	})
}

func TestKeysAreListedInPagesAndByOwner(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		var all []string
		for i := range 7 {
			all = append(all, fmt.Sprintf(`{"name":"k%d","owner":"owner %d"}`, i, i%2))
		}
		if status, answer := p.ask("POST", "/mesh/keys", "["+strings.Join(all, ",")+"]"); status != 201 {
			t.Fatalf("%d %s", status, answer)
		}
		pages := func(query string) (names []string) {
			for after := ""; ; {
				var page struct {
					Keys []keyView
					Next string
				}
				if err := json.Unmarshal([]byte(p.adminGet("/mesh/keys?limit=2"+query+"&after="+after)), &page); err != nil {
					t.Fatal(err)
				}
				for _, k := range page.Keys {
					names = append(names, k.Name)
				}
				if after = page.Next; after == "" {
					return names
				}
			}
		}
		if got := fmt.Sprint(pages("")); got != "[tester k0 k1 k2 k3 k4 k5 k6]" {
			t.Error(got)
		}
		if got := fmt.Sprint(pages("&owner=owner+1")); got != "[k1 k3 k5]" {
			t.Error(got)
		}
	})
}

func TestOldSecretWorksInItsGraceAndNotASecondAfter(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		k := p.askKey("POST", "/mesh/keys", `{}`, 201)
		p.comesTo("the key works", k.Secret, 200)
		path := "/mesh/keys/" + k.ID
		const grace = 4 * time.Second
		rotated := p.askKey("POST", path+"/rotate", `{"grace":"4s"}`, 200)
		if !rotated.OldUntil.Equal(rotated.OldUntil.Truncate(time.Millisecond)) {
			t.Errorf("%s is more exact than when the key was made, %s", rotated.OldUntil, rotated.Created)
		}
		if rotated.ID != k.ID || rotated.Secret == k.Secret || rotated.OldUntil.IsZero() {
			t.Fatalf("%+v", rotated)
		}
		p.comesTo("the new secret works", rotated.Secret, 200)
		for over := false; !over; {
			began := time.Now()
			status := p.with(k.Secret)
			ended := time.Now()
			switch {
			case status == 401 && ended.Before(rotated.OldUntil):
				t.Fatalf("the old secret was refused %s before its end", rotated.OldUntil.Sub(ended))
			case status == 200 && began.After(rotated.OldUntil.Add(time.Second)):
				t.Fatalf("the old secret worked %s after its end", began.Sub(rotated.OldUntil))
			case status == 401:
				t.Logf("the old secret ended by %s after %s", ended.Sub(rotated.OldUntil), grace)
				over = true
			}
		}
		if status := p.with(rotated.Secret); status != 200 {
			t.Errorf("the new secret: %d", status)
		}
		// another rotation during a grace ends the oldest
		second := p.askKey("POST", path+"/rotate", `{"grace":"1h"}`, 200)
		third := p.askKey("POST", path+"/rotate", `{"grace":"1h"}`, 200)
		p.comesTo("the oldest", rotated.Secret, 401)
		p.comesTo("the one before", second.Secret, 200)
		p.comesTo("the newest", third.Secret, 200)
		last := p.askKey("POST", path+"/rotate", ``, 200)
		p.comesTo("without a grace", third.Secret, 401)
		p.comesTo("the last", last.Secret, 200)
	})
}

// TestSuspensionHoldsOnEveryInstanceWithinASecond measures it, and is content with a few seconds of a busy machine.
func TestSuspensionHoldsOnEveryInstanceWithinASecond(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	config := fmt.Sprintf(inSite, keyedSite(startRedis(t), ""))
	caddys := []*process{startManaged(t, up.address(), config), startManaged(t, up.address(), config)}
	k := caddys[0].askKey("POST", "/mesh/keys", `{"name":"shared"}`, 201)
	for round := range 3 {
		for _, p := range caddys {
			p.comesTo("the key works everywhere", k.Secret, 200)
		}
		began := time.Now()
		caddys[round%2].askKey("PATCH", "/mesh/keys/"+k.ID, `{"suspended":true}`, 200)
		for _, p := range caddys {
			p.comesTo("the key is suspended everywhere", k.Secret, 403)
		}
		took := time.Since(began)
		t.Logf("suspended everywhere %s after the request began", took)
		if took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
		caddys[0].askKey("PATCH", "/mesh/keys/"+k.ID, `{"suspended":null}`, 200)
	}
}

func TestKeysOfARedisThatIsAwayAre503(t *testing.T) {
	server := startRedis(t)
	p := startManaged(t, "127.0.0.1:1", fmt.Sprintf(inSite, keyedSite(server, "")))
	k := p.askKey("POST", "/mesh/keys", `{}`, 201)
	server.kill()
	for _, path := range []string{"", "/" + k.ID} {
		if status, answer := p.ask("GET", "/mesh/keys"+path, ""); status != 503 || !strings.Contains(answer, "cannot be asked at present") {
			t.Errorf("%s: %d %s", path, status, answer)
		}
	}
	server.start()
	eventually(t, "it can be asked again", func() bool { status, _ := p.ask("GET", "/mesh/keys/"+k.ID, ""); return status == 200 })
}

// TestSecretsOfStoredKeysAreShownOnce looks for them in everything that the process writes, and tells.
func TestSecretsOfStoredKeysAreShownOnce(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, server *redisServer) {
		first := p.askKey("POST", "/mesh/keys", `{"name":"a"}`, 201)
		second := p.askKey("POST", "/mesh/keys/"+first.ID+"/rotate", `{"grace":"1h"}`, 200)
		var made keyView
		if err := json.Unmarshal([]byte(p.mustMesh("key", "create", "--json", "--name", "b")), &made); err != nil {
			t.Fatal(err)
		}
		secrets := []string{first.Secret, second.Secret, made.Secret}
		for _, secret := range secrets {
			p.comesTo("the secret works", secret, 200)
		}
		adapted, _ := p.run("adapt", "--config", "Caddyfile")
		for name, text := range map[string]string{
			"the list":    p.adminGet("/mesh/keys"),
			"a key":       p.adminGet("/mesh/keys/" + first.ID),
			"metrics":     p.adminGet("/metrics"),
			"/config/":    p.adminGet("/config/"),
			"caddy adapt": adapted,
			"CLI":         p.mustMesh("key", "list") + p.mustMesh("key", "show", first.ID) + p.mustMesh("key", "update", made.ID, "--rpm", "5"),
		} {
			if text == "" {
				t.Errorf("%s says nothing", name)
			}
			wantNone(t, name, text, secrets...)
		}
		if server != nil {
			client := server.client()
			for _, name := range client.Keys(t.Context(), "*").Val() {
				wantNone(t, "the names in Redis", name, secrets...)
				wantNone(t, name, client.Dump(t.Context(), name).Val()+fmt.Sprint(client.HGetAll(t.Context(), name).Val()), secrets...)
			}
			wantNoneIn(t, server.dir, secrets)
		}
		p.kill(os.Interrupt)
		wantNoneIn(t, p.dir, secrets)
	})
}

// wantNoneIn looks through the files of a folder.
func wantNoneIn(t *testing.T, dir string, secrets []string) {
	t.Helper()
	read := 0
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(filepath.Join(dir, path))
		wantNone(t, path, string(text), secrets...)
		read++
		return err
	})
	if err != nil || read < 2 {
		t.Errorf("%v, %d files", err, read)
	}
}
