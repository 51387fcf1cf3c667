package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

var update = flag.Bool("update", false, "write what the golden files in testdata should contain")

const goldenRule = "----------\n"

// readGolden returns a Caddyfile and what stands below the rule in its file.
func readGolden(t *testing.T, path string) (caddyfile, want string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	caddyfile, want, _ = strings.Cut(string(raw), goldenRule)
	return caddyfile, want
}

func compareGolden(t *testing.T, path, caddyfile, want, got string) {
	t.Helper()
	if got == want {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(caddyfile+goldenRule+got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("got:\n%s\nwant:\n%s", got, want)
}

func goldenFiles(t *testing.T, folder string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", folder, "*.caddyfiletest"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files in testdata/%s: %v", folder, err)
	}
	return files
}

func TestCaddyfileAdaptsTo(t *testing.T) {
	t.Setenv("TEAM_A_KEY", testKey[:len(testKey)-1]+"0")
	t.Setenv("OPENAI_API_KEY", "sk-test")
	t.Setenv("SENTINEL_PASSWORD", "secret")
	for _, path := range goldenFiles(t, "caddyfile") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			caddyfile, want := readGolden(t, path)
			cfg, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
			if err != nil || len(warnings) > 0 {
				t.Fatal(err, warnings)
			}
			var pretty bytes.Buffer
			if err := json.Indent(&pretty, cfg, "", "\t"); err != nil {
				t.Fatal(err)
			}
			compareGolden(t, path, caddyfile, want, pretty.String()+"\n")
			if strings.Contains(caddyfile, "/run/secrets") {
				return // which is not there
			}
			var c caddy.Config
			if err := json.Unmarshal(cfg, &c); err != nil {
				t.Fatal(err)
			}
			c.Admin = &caddy.AdminConfig{Disabled: true}
			if err := caddy.Validate(&c); err != nil {
				t.Errorf("adapts but does not load: %v", err)
			}
		})
	}
}

func TestBadCaddyfileIsRefusedWithFileAndLine(t *testing.T) {
	for _, path := range goldenFiles(t, "bad") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			caddyfile, want := readGolden(t, path)
			cfg, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
			if err == nil {
				// What only the environment gets wrong has no line, but the part's name.
				var c caddy.Config
				if err := json.Unmarshal(cfg, &c); err != nil {
					t.Fatal(err)
				}
				err = caddy.Validate(&c)
				if err == nil || !strings.Contains(caddyfile, "{env.") {
					t.Fatalf("adapted to %s, then: %v", cfg, err)
				}
				compareGolden(t, path, caddyfile, want, err.Error()+"\n")
				return
			}
			if !strings.Contains(err.Error(), "Caddyfile:") {
				t.Errorf("no line in: %v", err)
			}
			compareGolden(t, path, caddyfile, want, err.Error()+"\n")
		})
	}
}

// TestCaddyfilesOfTheReadmeAreValid adapts what the README shows, be it a site, what stands in one, or in a mesh block.
func TestCaddyfilesOfTheReadmeAreValid(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	const gateway = "key {env.TEAM_B_KEY}\nupstream given http://localhost:1/v1\nmodel given/* given\n"
	adapted := 0
	for _, block := range regexp.MustCompile("(?s)```caddyfile\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(block[1], "<path>") || strings.Contains(block[1], " exec ") || strings.Contains(block[1], "demo_model") { // all of the syntax; a plugin; cmd/caddy's
			continue
		}
		var errs []error
		for _, around := range []string{
			"%s",
			"(gateway) {\n" + gateway + "}\nhttp://localhost {\n%s}\n",
			"http://localhost {\nmesh {\n" + gateway + "%s}\n}\n",
		} {
			_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(strings.Replace(around, "%s", block[1], 1)), nil)
			errs = append(errs, err)
		}
		if !slices.Contains(errs, nil) {
			t.Errorf("%s%v", block[1], errors.Join(errs...))
		}
		adapted++
	}
	if adapted < 5 {
		t.Errorf("only %d were found", adapted)
	}
}
