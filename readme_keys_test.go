package mesh

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// readmeCommand is a command that the README shows, and what it prints.
type readmeCommand struct{ line, prints string }

// readmeCommands returns the commands in a section of the README.
func readmeCommands(t *testing.T, section string) (all []readmeCommand) {
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
	for _, block := range regexp.MustCompile("(?s)\n```\n(.*?)```").FindAllStringSubmatch(within, -1) {
		for line := range strings.Lines(block[1]) {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				all = append(all, readmeCommand{line: strings.TrimSpace(command)})
				continue
			}
			all[len(all)-1].prints += line
		}
	}
	return all
}

var (
	madeUp = regexp.MustCompile(`(key|rsk)_[0-9A-Z]{26}`)
	moment = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
)

// likeAnyOther returns output without what differs each time.
func likeAnyOther(output string) string {
	output = moment.ReplaceAllString(madeUp.ReplaceAllString(output, "${1}_"), "then")
	return regexp.MustCompile(`(?m) +$`).ReplaceAllString(output, "")
}

// TestCommandsOfTheReadmeAboutKeysPrintWhatItShows runs them one after another.
func TestCommandsOfTheReadmeAboutKeysPrintWhatItShows(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", strings.ReplaceAll("http://$ADDRESS {\n"+site("")+"\n}\n", "test/", "demo/"))
	ids := make(map[string]string) // as the README has them → as they are
	ran := 0
	for _, command := range readmeCommands(t, "Managing keys") {
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
			_, body, _ := strings.Cut(line, " -d ")
			_, output = p.ask("POST", strings.TrimPrefix(words[1], "localhost:2019"), body)
			output = strings.TrimSpace(output) + "\n"
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
	if ran < 7 {
		t.Errorf("only %d were found", ran)
	}
}
