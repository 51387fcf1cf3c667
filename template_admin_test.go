package mesh

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"
)

func TestTemplatesOnTheCommandLine(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	for name, store := range map[string]string{
		"local": "store local $DIR/mesh.db",
		"redis": "store redis {\n\t\taddress " + startRedis(t).address + "\n\t\tjournal $DIR/journal.db\n\t\ttimeout 5s\n\t}",
	} {
		t.Run(name, func(t *testing.T) {
			p := startProcess(t, up.address(), templateSite(store))
			g := p.gateway()
			file := p.path("greeter.json")
			if err := os.WriteFile(file, []byte(templateBody), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := p.mustMesh("template", "apply", file); !strings.HasPrefix(got, "created greeter (") {
				t.Errorf("%s", got)
			}
			if got := p.mustMesh("template", "apply", file, "--owner", "acme"); !strings.HasPrefix(got, "created greeter (") {
				t.Errorf("%s", got)
			}
			if got := p.mustMesh("template", "apply", file, "--owner", "acme"); !strings.HasPrefix(got, "changed greeter (") {
				t.Errorf("%s", got)
			}
			list := p.mustMesh("template", "list")
			if lines := strings.Split(strings.TrimSpace(list), "\n"); len(lines) != 4 || !strings.HasPrefix(lines[0], "NAME") ||
				strings.Count(list, "greeter") != 2 || strings.Count(list, "(all)") != 2 || len(strings.Split(list, " acme ")) != 2 {
				t.Errorf("%s", list)
			}
			var all []storedTemplate
			if err := json.Unmarshal([]byte(p.mustMesh("template", "list", "--json", "--owner", "acme")), &all); err != nil || len(all) != 1 || *all[0].Owner != "acme" {
				t.Fatalf("%v %+v", err, all)
			}
			g.use(`"template":"` + all[0].ID + `","variables":{"tone":"kind","company":"Acme","name":"Ann"}`)
			for want, args := range map[string][]string{
				"several owners":      {"template", "show", "greeter"},
				"there is no":         {"template", "delete", "nobody"},
				"no such file":        {"template", "apply", p.path("gone")},
				"use --yes":           {"template", "delete", all[0].ID},
				"part of the config":  {"template", "delete", "--yes", "shared"},
				"name: String should": {"template", "apply", p.write1("bad.json", `{"name":""}`)},
			} {
				if got, code := p.mesh(args...); code == 0 || !strings.Contains(got, want) {
					t.Errorf("%s: %d %s", args, code, got)
				}
			}
			var shown storedTemplate
			if err := json.Unmarshal([]byte(p.mustMesh("template", "show", "greeter", "--owner", "acme")), &shown); err != nil || shown.ID != all[0].ID {
				t.Errorf("%v %+v", err, shown)
			}
			if got := p.mustMesh("template", "delete", "--yes", shown.ID); !strings.HasPrefix(got, "deleted greeter") {
				t.Errorf("%s", got)
			}
			if got, _ := p.run("__complete", "mesh", "--address", "unix/"+p.path("admin"), "template", "show", "gre"); !strings.Contains(got, "greeter\n") {
				t.Errorf("completion: %s", got)
			}
			eventually(t, "everybody's is left", func() bool {
				r := g.do(http.MethodGet, templatesPath, "", "Authorization", "Bearer "+otherKey)
				return strings.Count(string(r.body), `"greeter"`) == 1
			})
		})
	}
}

// write1 writes a file into the process's folder and returns its name.
func (p *process) write1(name, text string) string {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.path(name)
}

func TestTemplateFilesAreReadAtEveryLoad(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), templateSite("store local $DIR/mesh.db"))
	g := p.gateway()
	site := func(header string) string {
		return strings.Replace(templateSite("store local $DIR/mesh.db\n\ttemplates prompts/*.json"), "mesh {", "header X-A "+header+"\nmesh {", 1)
	}
	if err := os.Mkdir(p.path("prompts"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.write1("prompts/a.json", `{"name":"a","system":"First {{x}}."}`)
	p.reload(site("1"))
	g.use(`"template":"a","variables":{"x":"1"}`)
	if got := string(up.last(t).body); !strings.Contains(got, `"First 1."`) {
		t.Errorf("%s", got)
	}
	p.write1("prompts/a.json", `{"name":"a","system":"Second {{x}}."}`)
	p.reload(site("2"))
	g.use(`"template":"a","variables":{"x":"2"}`)
	if got := string(up.last(t).body); !strings.Contains(got, `"Second 2."`) {
		t.Errorf("%s", got)
	}
	for text, why := range map[string]string{
		`{"name":"a","system":7}`: "system", `{"name":"shared"}`: "already", `{`: "it is not valid JSON", `{"system":"x"}`: "name",
		`{"name":"a","model":"nobody/x"}`: "nobody/x", `{"name":"b","sytem":"x","id":"1"}`: "sytem: Extra inputs are not permitted",
	} {
		file := p.write1("prompts/b.json", text)
		p.write(site("3"))
		got, code := p.run("reload", "--config", "Caddyfile", "--address", "unix/"+p.path("admin"))
		if code == 0 || !strings.Contains(got, file) || !strings.Contains(got, why) {
			t.Errorf("%s: %d %s", text, code, got)
		}
	}
	slip := p.write1("slip.json", `{"name":"c","sytem":"x"}`)
	if got, code := p.run("mesh", "template", "apply", slip, "--address", "unix/"+p.path("admin")); code == 0 || !strings.Contains(got, "sytem") {
		t.Errorf("%d %s", code, got)
	}
	g.use(`"template":"a","variables":{"x":"still"}`)
}
