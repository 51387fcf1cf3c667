package mesh

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestModelsOutsideOfASpendCapAreTold(t *testing.T) {
	p := startManaged(t, "127.0.0.1:1", siteNumber(0, "\tmodel demo/* up {\n\t\tprice 1 2\n\t}\n\tmodel demo/dead up\n\tmodel demo/free* up"))
	const warning = "warning: spend_cap_usd: the key may use models without a price, which cost it nothing: "
	for _, tc := range []struct{ args, want string }{
		{"--spend-cap-usd 1 --model demo/dead", "demo/dead\n"},
		{"--spend-cap-usd 1 --model demo/freely", "demo/freely\n"},
		{"--spend-cap-usd 1 --model demo/*", "demo/dead, demo/free*\n"},
		{"--spend-cap-usd 1", "demo/dead, demo/free*, test/*\n"},
		{"--spend-cap-usd 1 --model demo/dear", ""},
		{"--spend-cap-usd 1 --model demo/d* --model demo/dear", "demo/dead\n"},
		{"--model demo/dead", ""},
	} {
		output := p.mustMesh(append([]string{"key", "create"}, strings.Fields(tc.args)...)...)
		if tc.want == "" && strings.Contains(output, "warning") || tc.want != "" && !strings.Contains(output, warning+tc.want) {
			t.Errorf("%s: %s, want %s", tc.args, output, tc.want)
		}
	}
}

func TestAWholeFileOfPricesLeavesNoWarningForWhatItKnows(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	prices := filepath.Join(t.TempDir(), "prices.json")
	if err := os.WriteFile(prices, []byte(`{"known":{"input_cost_per_token":1e-6,"output_cost_per_token":2e-6}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	p := startManaged(t, up.address(), siteNumber(0, "\tprices "+prices))
	for model, warned := range map[string]bool{"test/known": false, "test/unknown": true, "test/*": true} {
		k := p.askKey("POST", keysPath, `{"spend_cap_usd":"1","models":["`+model+`"]}`, 201)
		if (len(k.Warnings) > 0) != warned {
			t.Errorf("%s: %v", model, k.Warnings)
		}
	}
}
