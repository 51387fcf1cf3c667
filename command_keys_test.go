package mesh

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// fieldsOf reads what `caddy mesh key show` and the like print.
func fieldsOf(output string) map[string]string {
	fields := make(map[string]string)
	for line := range strings.Lines(output) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "  "); ok {
			fields[name] = strings.TrimSpace(value)
		}
	}
	return fields
}

func TestKeyLivesOnTheCommandLine(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		output := p.mustMesh("key", "create", "--name", "team-a", "--owner", "acme", "--rpm", "60", "--rpd", "1000", "--tpm", "100000",
			"--max-concurrency", "8", "--spend-cap-usd", "25.00", "--spend-period", "month", "--spend-cap-hard", "--model", "test/*", "--model", "a/b",
			"--default-model", "test/plain", "--default-param", "temperature=0.5", "--default-param", "stop=END", "--expires", "30d", "--metadata", "cost-center=4711")
		made := fieldsOf(output)
		id, secret := made["id"], made["secret"]
		for name, want := range map[string]string{
			"name": "team-a", "owner": "acme", "rpm": "60", "rpd": "1000", "tpm": "100000", "max_concurrency": "8", "spend_cap_usd": "25",
			"spend_period": "month", "spend_cap_hard": "true", "models": "test/* a/b", "default_model": "test/plain",
			"default_params": `{"stop":"END","temperature":0.5}`, "metadata": `{"cost-center":"4711"}`, "source": "store",
		} {
			if made[name] != want {
				t.Errorf("%s is %q, want %q", name, made[name], want)
			}
		}
		if !strings.Contains(output, "warning: models: the running configuration has no model for a/b") || !strings.Contains(output, "shown this once") {
			t.Error(output)
		}
		if expires, err := time.Parse(time.RFC3339, made["expires"]); err != nil || time.Until(expires) < 29*24*time.Hour || time.Until(expires) > 30*24*time.Hour {
			t.Errorf("expires %q", made["expires"])
		}
		p.mustMesh("key", "update", id, "--reset", "spend-cap-hard") // or each request needs max_tokens
		p.comesTo("the key works", secret, 200)
		if shown := fieldsOf(p.mustMesh("key", "show", id)); shown["secret"] != "" || shown["requests_day"] == "" || shown["under_way"] == "" {
			t.Error(shown)
		}
		updated := fieldsOf(p.mustMesh("key", "update", id, "--rpm", "5", "--reset", "rpd", "--reset", "models", "--suspended"))
		if updated["rpm"] != "5" || updated["rpd"] != "" || updated["models"] != "" || updated["suspended"] != "true" || updated["tpm"] != "100000" {
			t.Error(updated)
		}
		p.comesTo("the key is suspended", secret, 403)
		p.mustMesh("key", "unsuspend", id)
		p.comesTo("the key works", secret, 200)
		p.mustMesh("key", "suspend", id)
		p.comesTo("the key is suspended", secret, 403)
		p.mustMesh("key", "unsuspend", id)
		rotated := fieldsOf(p.mustMesh("key", "rotate", id, "--grace", "1h"))
		p.comesTo("the new secret works", rotated["secret"], 200)
		p.comesTo("the old secret works", secret, 200)
		if rotated["old_secret_until"] == "" {
			t.Error(rotated)
		}
		list := p.mustMesh("key", "list")
		if !strings.HasPrefix(list, "ID ") || !strings.Contains(strings.Join(strings.Fields(list), " "), id+" team-a acme active store 20") || !strings.Contains(list, "config") {
			t.Error(list)
		}
		var listed struct{ Keys []keyView }
		if err := json.Unmarshal([]byte(p.mustMesh("key", "list", "--json", "--owner", "acme")), &listed); err != nil || len(listed.Keys) != 1 || listed.Keys[0].ID != id {
			t.Errorf("%v %+v", err, listed)
		}
		if completed, code := p.run("__complete", "mesh", "key", "show", "--address", "unix/"+p.path("admin"), "key_"); code != 0 || !strings.Contains(completed, id+"\tteam-a\n") {
			t.Errorf("%d %s", code, completed)
		}
		if said := p.mustMesh("key", "revoke", "--yes", id); !strings.Contains(said, id+" is revoked") {
			t.Error(said)
		}
		p.comesTo("the key is gone", rotated["secret"], 401)
		p.comesTo("the key is gone", secret, 401)
	})
}

func TestKeyCommandsSayWhatIsWrong(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", siteNumber(0, ""))
	id := fieldsOf(p.mustMesh("key", "create"))["id"]
	for _, tc := range []struct {
		args string
		want string
	}{
		{"create --rpm many", "invalid argument"},
		{"create --rpm 0", "rpm: 0 would refuse every request"},
		{"create --spend-cap-usd 1e3", "spend_cap_usd:"},
		{"create --default-param temperature", "--default-param: \\\"temperature\\\" is not name=value"},
		{"create --default-param temperature=3", "default_params: temperature: Input should be less than or equal to 2"},
		{"create --expires soon", "--expires: \\\"soon\\\" is neither a time"},
		{"create --metadata a=b --metadata a=c", "--metadata: a is given twice"},
		{"create --from gone", "gone"},
		{"show", "accepts 1 arg(s)"},
		{"show key_none", "there is no such key"},
		{"update " + id, "there is nothing to change"},
		{"update " + id + " --reset rmp", "rmp: a key has no such field"},
		{"rotate " + id + " --grace long", "grace: \\\"long\\\" is not a duration"},
		{"revoke key_none --yes", "there is no such key"},
		{"revoke " + id, "use --yes"},
		{"list --limit 0", "limit: \\\"0\\\" is not a number from 1 to 1000"},
		{"list --limit -1", "limit: \\\"-1\\\" is not a number from 1 to 1000"},
		{"create --spend-period day", "--spend-period needs --spend-cap-usd"},
		{"update " + id + " --rpm 5 --reset rpm", "--rpm and --reset rpm contradict each other"},
		{"update " + id + " --model a/b --reset models", "--model and --reset models contradict each other"},
		{"update " + id + " --default-param stop=END --reset default-params", "--default-param and --reset default-params contradict each other"},
		{"turn", "unknown command"},
	} {
		if output, code := p.mesh(append([]string{"key"}, strings.Fields(tc.args)...)...); code == 0 || !strings.Contains(output, tc.want) {
			t.Errorf("%s: %d %s, want %s", tc.args, code, output, tc.want)
		}
	}
	if shown := fieldsOf(p.mustMesh("key", "show", id)); shown["id"] != id || shown["rpm"] != "" {
		t.Errorf("%v", shown)
	}
}

// file makes a file in the process's folder.
func (p *process) file(name, content string) string {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.path(name)
}

func TestWrongLineOfAFileCreatesNoKey(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", siteNumber(0, ""))
	before := p.adminGet(keysPath)
	for _, tc := range []struct{ content, want string }{
		{"", "keys: there is no key in it; no key was created"},
		{"name,rpm\n", "keys: there is no key in it; no key was created"},
		{"{\"name\":\"a\"}\n\n{\"rpm\":-1}\n", "keys: line 3: rpm: -1 is negative; no key was created"},
		{"{\"name\":\"a\"}\n{\"rpm\":\n", "line 2: it is not a JSON object"},
		{"{\"expires\":\"soon\"}\n", "line 1: expires: \\\"soon\\\" is neither"},
		{"name,rpm\na,5\nb,many\n", "line 3: rpm: \\\"many\\\" is not a whole number; no key was created"},
		{"name,rmp\na,5\n", "keys: line 1: rmp: a key has no such field; no key was created"},
		{"\nname,rpm.more\na,5\n", "keys: line 2: rpm.more: a key has no such field; no key was created"},
		{"name,name\na,5\n", "line 1: the column name is there twice"},
		{"name,rpm\na\n", "line 2"},
	} {
		if output, code := p.mesh("key", "create", "--from", p.file("keys", tc.content)); code == 0 || !strings.Contains(output, tc.want) {
			t.Errorf("%q: %d %s, want %s", tc.content, code, output, tc.want)
		}
	}
	if after := p.adminGet(keysPath); after != before {
		t.Error(after)
	}
}

func TestKeysOfATableAreCreated(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", siteNumber(0, ""))
	table := "\ufeffname,rpm,models,expires,suspended,metadata.team,default_params.temperature,spend_cap_usd,\n" +
		"\"a, the first\",5,test/* a/b,30d,,red,0.5,1.50,\n" +
		"b,,,,true,,,,\n"
	cmd := p.command("mesh", "--address", "unix/"+p.path("admin"), "key", "create", "--json", "--owner", "acme", "--from", "-")
	cmd.Stdin = strings.NewReader(table)
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v %s", err, output)
	}
	var made []keyView
	for lines := bufio.NewScanner(strings.NewReader(string(output))); lines.Scan(); {
		var v keyView
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Fatal(err)
		}
		made = append(made, v)
	}
	if len(made) != 2 || made[0].Name != "a, the first" || made[0].RPM != 5 || len(made[0].Models) != 2 || made[0].Expires.IsZero() ||
		made[0].Metadata["team"] != "red" || string(made[0].DefaultParams["temperature"]) != "0.5" || made[0].SpendCap.String() != "1.5" ||
		!made[1].Suspended || made[1].Owner != "acme" || made[1].Secret == "" {
		t.Errorf("%s", output)
	}
}

// TestManyKeysOfAFileAreCreated creates 10,000 where MESH_TEST_LONG is set.
func TestManyKeysOfAFileAreCreated(t *testing.T) {
	n := 1200
	if os.Getenv("MESH_TEST_LONG") != "" {
		n = 10_000
	}
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		var file strings.Builder
		for i := range n {
			fmt.Fprintf(&file, "{\"name\":\"key %d\",\"rpm\":60}\n", i)
		}
		began := time.Now()
		output := p.mustMesh("key", "create", "--from", p.file("keys", file.String()))
		took := time.Since(began)
		t.Logf("%d keys in %s", n, took)
		if took > time.Minute {
			t.Errorf("it took %s", took)
		}
		lines := strings.Split(strings.TrimSpace(output), "\n")
		var last []string
		for _, line := range lines {
			if strings.HasPrefix(line, "key_") {
				last = strings.Fields(line)
			}
		}
		if len(lines) < n+1 || len(last) != 4 {
			t.Fatalf("%d lines, the last is %q", len(lines), last)
		}
		p.comesTo("a secret works", last[1], 200)
		began = time.Now()
		if listed := strings.Count(p.mustMesh("key", "list", "--limit", "100000"), "\n"); listed < n+2 {
			t.Errorf("%d lines in the list", listed)
		}
		t.Logf("listed in %s", time.Since(began))
	})
}

func TestNobodyAnswersFromAPipeOrNothing(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	defer writer.Close()
	if isTerminal(null) || isTerminal(reader) {
		t.Error("taken for a terminal")
	}
}
