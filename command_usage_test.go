package mesh

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// requestsOf returns how many requests the report of a key has.
func (p *process) requestsOf(key string) int64 {
	p.t.Helper()
	var table usageTable
	p.mustMeshJSON(&table, "usage", "--key", key)
	return table.Total.TotalRequests
}

func TestUsageIsReportedOfAKeyByIDOrName(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		var used, idle, gone keyView
		p.mustMeshJSON(&used, "key", "create", "--name", "team-a")
		p.mustMeshJSON(&idle, "key", "create", "--name", "team-b")
		p.mustMeshJSON(&gone, "key", "create", "--name", "team-c")
		p.comesTo("the key works", used.Secret, 200)
		p.comesTo("the key works", gone.Secret, 200)
		if r := p.gateway().post(chatBody); r.StatusCode != 200 {
			t.Fatalf("%s %s", r.Status, r.body)
		}
		p.mustMesh("key", "revoke", "--yes", gone.ID)
		for key, want := range map[string]bool{used.ID: true, "team-a": true, idle.ID: false, "team-b": false, gone.ID: true, "team-c": true, "tester": true} {
			if n := p.requestsOf(key); n > 0 != want {
				t.Errorf("%s: %d requests", key, n)
			}
		}
		if output, code := p.mesh("usage", "--key", "nope"); code == 0 || !strings.Contains(output, "key nope: there is no such key") {
			t.Errorf("%d %s", code, output)
		}
		if status, answer := p.ask("GET", "/mesh/usage?key=nope", ""); status != 404 {
			t.Errorf("%d %s", status, answer)
		}
		p.mustMesh("key", "create", "--name", "team-a")
		if output, code := p.mesh("usage", "--key", "team-a"); code == 0 || !strings.Contains(output, "several keys are called") || !strings.Contains(output, used.ID) {
			t.Errorf("%d %s", code, output)
		}
		if n := p.requestsOf(used.ID); n == 0 {
			t.Error("its id is not enough any more")
		}
	})
}

func TestUsageCommandSaysWhatIsWrong(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", siteNumber(0, ""))
	tomorrow := time.Now().UTC().AddDate(0, 0, 2).Format(time.DateOnly)
	for want, args := range map[string][]string{
		"from: 2026-02-02 is after to: 2026-02-01":                     {"--from", "2026-02-02", "--to", "2026-02-01"},
		"from: 2026-02-01T10:30:00Z is after to: 2026-02-01T10:10:00Z": {"--from", "2026-02-01T10:30:00Z", "--to", "2026-02-01T10:10:00Z"},
		"from: " + tomorrow + " is after to: 20":                       {"--from", tomorrow},
		"is after to: 2024-01-01":                                      {"--to", "2024-01-01"},
		"--csv and --json exclude each other":                          {"--csv", "--json"},
	} {
		if output, code := p.mesh(slices.Insert(args, 0, "usage")...); code == 0 || !strings.Contains(output, want) {
			t.Errorf("%s: %d %s, want %s", args, code, output, want)
		}
	}
	p.mustMesh("usage", "--from", "2026-02-01", "--to", "2026-02-01")
	p.mustMesh("usage", "--from", "2026-02-01T12:00:00Z", "--to", "2026-02-01")
	p.mustMesh("usage", "--from", "2026-02-01T12:10:00Z", "--to", "2026-02-01T12:10:00Z") // the hour
	p.mustMesh("usage", "--csv", "--json=false")
	if status, answer := p.ask("GET", "/mesh/usage?from=2026-02-02&to=2026-02-01", ""); status != 400 {
		t.Errorf("%d %s", status, answer)
	}
}
