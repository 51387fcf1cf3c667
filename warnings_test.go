package mesh

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// warnings returns what a log says at the level WARN, each with its fields.
func warnings(t *testing.T, log string) (all []string) {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(log))
	for lines.Scan() {
		var line map[string]any
		if json.Unmarshal(lines.Bytes(), &line) != nil || !strings.EqualFold(fmt.Sprint(line["level"]), "warn") || line["logger"] != "http.handlers.mesh" {
			continue
		}
		said := line["msg"].(string)
		for _, field := range []string{"key", "upstream", "models", "more", "expires"} {
			if v, ok := line[field]; ok {
				said += fmt.Sprintf("; %s %v", field, v)
			}
		}
		all = append(all, said)
	}
	slices.Sort(all)
	return all
}

func TestWhatIsHardlyMeantIsWarnedOf(t *testing.T) {
	const priced = "\tmodel demo/echo up {\n\t\tprice 1 2\n\t}\n\tmodel demo/* up\n"
	var many strings.Builder
	for i := range 8 {
		fmt.Fprintf(&many, "\tmodel demo/m%d up\n", i)
	}
	const hopeless, expired, idle, none, unpriced = "a key may use models of which none is configured; ", "a key has expired; ",
		"no model uses an upstream; ", "no model is configured, so that every request for one is refused",
		"a key with a spend cap can use models without a price, which cost it nothing; "
	key := func(options string) string { return "\tkey " + testKey + " {\n\t\tname k\n\t\t" + options + "\n\t}\n" }
	for _, tc := range []struct {
		name, block string
		want        []string
	}{
		{"nothing", priced + key("models demo/x demo/e* d*"), nil},
		{"models that are not there", priced + key("models demo/echo dmo/* other"), []string{hopeless + "key k; models [dmo/* other]"}},
		{"a key without a name", priced + "\tkey " + testKey + " {\n\t\tmodels dmo/*\n\t}\n", []string{hopeless + "key #1; models [dmo/*]"}},
		{"the model auto", priced + "\tauto {\n\t\tclassifier demo/echo\n\t\tcandidate demo/x \"all\"\n\t}\n" + key("models auto demo/x"), nil},
		{"auto where it is not", priced + key("models auto"), []string{hopeless + "key k; models [auto]"}},
		{"expired", priced + key("expires 2020-01-01T00:00:00Z"), []string{expired + "key k; expires 1.5778368e+09"}},
		{"an idle upstream", priced + "\tupstream spare http://127.0.0.1:1\n" + key("rpm 1"), []string{idle + "upstream spare"}},
		{"no models", key("models demo/*"), []string{none}},
		{"an exact name with a price", priced + key("spend_cap_usd 1\n\t\tmodels demo/echo"), nil},
		{"an exact name without", priced + key("spend_cap_usd 1\n\t\tmodels demo/echo demo/x"), []string{unpriced + "key k; models [demo/x]; more 0"}},
		{"a pattern", priced + key("spend_cap_usd 1\n\t\tmodels demo/e*"), []string{unpriced + "key k; models [demo/*]; more 0"}},
		{"below a longer pattern", priced + "\tmodel demo/e* up {\n\t\tprice 1 2\n\t}\n" + key("spend_cap_usd 1\n\t\tmodels demo/ec*"), nil},
		{"a price at each upstream", "\tmodel demo/* {\n\t\tupstream up price 1 2\n\t}\n" + key("spend_cap_usd 1"), nil},
		{"many", many.String() + key("spend_cap_usd 1"), []string{unpriced + "key k; models [demo/m0 demo/m1 demo/m2 demo/m3 demo/m4]; more 3"}},
		{"no cap", many.String() + key("rpm 1"), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := startGateway(t, "127.0.0.1:1", "mesh {\n\tstore local $DIR/mesh.db\n\tupstream up http://$UPSTREAM/v1\n"+tc.block+"}")
			log, err := os.ReadFile(g.dir + "/caddy.log")
			if err != nil {
				t.Fatal(err)
			}
			got := warnings(t, string(log))
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

func TestValidateWarnsToo(t *testing.T) {
	p := startProcess(t, "127.0.0.1:1", fmt.Sprintf(inSite, strings.Replace(site(""), "name tester", "name tester\n\t\tmodels test/plain gone/*", 1)))
	const want = "a key may use models of which none is configured"
	out, code := p.run("validate", "--config", "Caddyfile")
	if code != 0 || strings.Count(out, want) != 1 || !strings.Contains(out, "gone/*") {
		t.Errorf("%d %s", code, out)
	}
	if n := strings.Count(p.log(), want); n != 1 {
		t.Errorf("%d times in the log of the start", n)
	}
}
