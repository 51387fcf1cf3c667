package mesh

import (
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
)

// readmeCommand is a command that the README shows, and what it prints.
type readmeCommand struct{ line, prints string }

// readmeCommands returns the commands in a section of the README.
func readmeCommands(t testing.TB, section string) (all []readmeCommand) {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(text), "\n### "+section+"\n")
	if !found {
		t.Fatalf("README.md has no section %s", section)
	}
	within, _, _ := strings.Cut(after, "\n### ")
	fence := "" // of the block that a line is in
	for line := range strings.Lines(within) {
		command, isCommand := strings.CutPrefix(line, "$ ")
		switch {
		case fence != "" && line == "```\n":
			fence = ""
		case strings.HasPrefix(line, "```"):
			fence = line
		case fence == "```\n" && isCommand:
			all = append(all, readmeCommand{line: strings.TrimSpace(command)})
		case fence == "```\n" && len(all) > 0:
			all[len(all)-1].prints += line
		}
	}
	return all
}

var (
	madeUp = regexp.MustCompile(`(key|rsk)_[0-9A-Z]{26}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	uuids  = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	day    = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\d,`)
	moment = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
)

// likeAnyOther returns output without what differs each time.
func likeAnyOther(output string) string {
	output = moment.ReplaceAllString(madeUp.ReplaceAllString(output, "${1}_"), "then")
	output = day.ReplaceAllString(uuids.ReplaceAllString(output, "id"), "today,")
	return regexp.MustCompile(`(?m) +$`).ReplaceAllString(output, "")
}

// TestCommandsOfTheReadmePrintWhatItShows runs them one after another.
func TestCommandsOfTheReadmePrintWhatItShows(t *testing.T) {
	t.Run("keys", func(t *testing.T) {
		p := startManaged(t, "127.0.0.1:1", strings.NewReplacer("test/* up", "demo/* up {\n\t\tprice 0.10 0.40\n\t}", "test/", "demo/").Replace("http://$ADDRESS {\n"+site("")+"\n}\n"))
		p.runReadme("Managing keys", 7)
	})
	t.Run("templates", func(t *testing.T) {
		startManaged(t, "127.0.0.1:1", "http://$ADDRESS {\n"+site("\ttemplate support-agent {\n\t\tsystem x\n\t}\n")+"\n}\n").runReadme("Templates", 4)
	})
	t.Run("usage", func(t *testing.T) {
		p := startManaged(t, "127.0.0.1:1", "http://$ADDRESS {\nmesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\tname quickstart\n\t\towner acme\n\t}\n"+
			"\tupstream demo {\n\t\thandle {\n\t\t\tdemo_model\n\t\t}\n\t}\n\tmodel demo/* demo {\n\t\tprice 0.10 0.40\n\t}\n\tdefault_model demo/words\n}\n}\n")
		for _, body := range []string{
			`{"session_id":"a","messages":[{"role":"user","content":"It does not start."}]}`,
			`{"session_id":"b","messages":[{"role":"user","content":"It does not start."}]}`,
			`{"model":"demo/echo","messages":[{"role":"user","content":"Hi"}]}`,
		} {
			if r := p.gateway().post(body); r.StatusCode != 200 {
				t.Fatalf("%s %s", r.Status, r.body)
			}
		}
		p.runReadme("Usage reports", 3)
	})
}

// curl asks the admin endpoint as a command line of curl would, and returns what that prints.
func (p *process) curl(words []string, line string) (output string) {
	p.t.Helper()
	method := http.MethodGet
	_, body, sends := strings.Cut(line, " -d ")
	if sends {
		method = http.MethodPost
	}
	if words[1] == "-X" {
		method, words = words[2], words[2:]
	}
	_, output = p.ask(method, strings.TrimPrefix(words[1], "localhost:2019"), body)
	if output = strings.TrimSpace(output); output != "" {
		output += "\n"
	}
	return output
}

// runReadme runs the commands of a section, of which there are at least so many.
func (p *process) runReadme(section string, atLeast int) {
	t := p.t
	t.Helper()
	ids := make(map[string]string) // as the README has them → as they are
	ran := 0
	for _, command := range readmeCommands(t, section) {
		line := strings.ReplaceAll(command.line, "'", "")
		for shown, real := range ids {
			line = strings.ReplaceAll(line, shown, real)
		}
		var output string
		switch words := strings.Fields(line); {
		case words[0] == "cat":
			p.file(words[1], command.prints)
			continue
		case words[0] == "curl":
			output = p.curl(words, line)
		default:
			output = p.mustMesh(words[2:]...)
		}
		ran++
		if got, want := likeAnyOther(output), likeAnyOther(command.prints); got != want {
			t.Errorf("%s\n%s\nand the README has\n%s", command.line, got, want)
		}
		real := madeUp.FindAllString(output, -1)
		for i, shown := range madeUp.FindAllString(command.prints, -1) {
			if i < len(real) {
				ids[shown] = real[i]
			}
		}
	}
	if ran < atLeast {
		t.Errorf("only %d were found", ran)
	}
}

// TestFirstCaddyfilesServeNothingElse runs the Caddyfile of the repository, and the first of the README.
func TestFirstCaddyfilesServeNothingElse(t *testing.T) {
	t.Setenv("TEAM_A_KEY", testKey)
	t.Setenv("OPENAI_API_KEY", "sk-test")
	for _, file := range []struct{ name, site, options string }{
		{"Caddyfile", ":8080 {\n\tbind 127.0.0.1", "admin localhost:2019"},
		{"README.md", "api.example.com {", ""},
	} {
		t.Run(file.name, func(t *testing.T) {
			text, err := os.ReadFile(file.name)
			if err != nil {
				t.Fatal(err)
			}
			caddyfile := string(text)
			if _, block, found := strings.Cut(caddyfile, "```caddyfile\n"); found {
				caddyfile, _, _ = strings.Cut(block, "```")
			}
			caddyfile = strings.Replace(caddyfile, file.site, "http://$ADDRESS {", 1)
			if file.options != "" {
				caddyfile = strings.Replace(caddyfile, file.options, "$OPTIONS", 1)
			}
			g := startProcess(t, "127.0.0.1:1", caddyfile).gateway()
			for _, path := range []string{"/chat/completions", "/v1/embeddings", "/"} {
				if r := g.do(http.MethodPost, path, chatBody); r.StatusCode != http.StatusNotFound {
					t.Errorf("%s: %s", path, r.Status)
				}
			}
			if r := g.do(http.MethodGet, "/v1/models", ""); r.StatusCode != http.StatusOK {
				t.Errorf("%s %s", r.Status, r.body)
			}
		})
	}
}
