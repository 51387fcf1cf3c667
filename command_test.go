package mesh

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// mesh runs `caddy mesh` against the process.
func (p *process) mesh(args ...string) (output string, code int) {
	p.t.Helper()
	return p.run(append([]string{"mesh", "--address", "unix/" + p.path("admin")}, args...)...)
}

// mustMesh is mesh where that has to succeed.
func (p *process) mustMesh(args ...string) string {
	p.t.Helper()
	output, code := p.mesh(args...)
	if code != 0 {
		p.t.Fatalf("caddy mesh %s: %d %s", strings.Join(args, " "), code, output)
	}
	return output
}

// mustMeshJSON is mustMesh for a program, which reads what it prints.
func (p *process) mustMeshJSON(v any, args ...string) {
	p.t.Helper()
	output := p.mustMesh(append(args, "--json")...)
	if err := json.Unmarshal([]byte(output), v); err != nil {
		p.t.Fatalf("%v in %s", err, output)
	}
}

func TestHealthOnTheCommandLine(t *testing.T) {
	server := startRedis(t)
	p := startProcess(t, "127.0.0.1:1", "http://$ADDRESS {\nmesh {\n\tstore redis {\n\t\taddress "+server.address+"\n\t\tjournal $DIR/journal.db\n\t}\n"+
		"\tkey "+testKey+"\n\tupstream up http://$UPSTREAM/v1\n\tmodel test/* up\n}\n}\n")
	name := "redis:" + server.address + "/0/mesh"
	eventually(t, "the store is reached", func() bool { _, code := p.mesh("health"); return code == 0 })
	want := "STORE                        STATUS  WAITING\n" + name + "  ok      0\n"
	if got := p.mustMesh("health"); strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("%q, want %q", got, want)
	}
	var health struct{ Stores []storeStatus }
	if err := json.Unmarshal([]byte(p.mustMesh("health", "--json")), &health); err != nil || len(health.Stores) != 1 || health.Stores[0].Name != name {
		t.Errorf("%v %+v", err, health)
	}
	server.kill()
	eventually(t, "the outage shows", func() bool {
		output, code := p.mesh("health")
		return code == 1 && strings.Contains(output, name+"  degraded") && strings.Contains(output, "a store cannot be reached")
	})
}

func TestCommandsSayWhatIsWrong(t *testing.T) {
	p := startProcess(t, "127.0.0.1:1", siteNumber(0, ""))
	p.kill(os.Kill)
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"health"}, "is Caddy running?"},
		{[]string{"helth"}, "unknown command"},
		{[]string{"health", "--adress", "x"}, "unknown flag: --adress"},
		{[]string{"health", "more"}, "unknown command"},
		{[]string{"health", "--config", "gone"}, "gone"},
	} {
		output, code := p.mesh(tc.args...)
		if tc.args[0] == "health" && len(tc.args) > 2 {
			output, code = p.run(append([]string{"mesh"}, tc.args...)...)
		}
		if code == 0 || !strings.Contains(output, tc.want) {
			t.Errorf("%s: %d %s", tc.args, code, output)
		}
	}
}

func TestOutageOfTheStoreIsToldOnce(t *testing.T) {
	server := startRedis(t)
	p := startManaged(t, "127.0.0.1:1", strings.Replace(siteNumber(0, ""), "store local $DIR/mesh.db", "store redis {\n\t\taddress "+server.address+"\n\t\tjournal $DIR/journal.db\n\t}", 1))
	server.kill()
	for _, args := range [][]string{{"usage"}, {"template", "list"}, {"key", "list"}} {
		eventually(t, "the outage shows", func() bool { _, code := p.mesh(args...); return code != 0 })
		output, _ := p.mesh(args...)
		if strings.Count(output, "the store cannot be") != 1 || !strings.Contains(output, "the store cannot be asked at present: ") {
			t.Errorf("%s: %s", args, output)
		}
	}
}
