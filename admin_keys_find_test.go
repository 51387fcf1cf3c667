package mesh

import (
	"strings"
	"testing"
)

func TestKeysAreShownByName(t *testing.T) {
	keyedProcesses(t, func(t *testing.T, p *process, _ *redisServer) {
		id := fieldsOf(p.mustMesh("key", "create", "--name", "acme/team a"))["id"]
		if shown := fieldsOf(p.mustMesh("key", "show", "acme/team a")); shown["id"] != id || shown["source"] != sourceStore {
			t.Errorf("%v", shown)
		}
		if shown := fieldsOf(p.mustMesh("key", "show", "tester")); shown["source"] != sourceConfig || shown["spend_usd"] == "" {
			t.Errorf("%v", shown)
		}
		for _, name := range []string{"acme/team a", "tester"} {
			p.mustMesh("key", "create", "--name", name)
			if output, code := p.mesh("key", "show", name); code == 0 || !strings.Contains(output, "several keys are called") {
				t.Errorf("%s: %d %s", name, code, output)
			}
		}
		if shown := fieldsOf(p.mustMesh("key", "show", id)); shown["id"] != id {
			t.Errorf("%v", shown)
		}
	})
}
