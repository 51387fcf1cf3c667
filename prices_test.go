package mesh

import (
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

const inventedPrices = "testdata/prices/invented.json"

func TestPricesPerTokenAreReadExactly(t *testing.T) {
	for text, want := range map[string]Money{
		"0":                      0,
		"0.0":                    0,
		"-0.0":                   0,
		"0e5":                    0,
		"2.5e-06":                2_500_000_000,
		"2.5E-6":                 2_500_000_000,
		"0.0000025":              2_500_000_000,
		"25e-7":                  2_500_000_000,
		"1e-05":                  10 * usd,
		"1.25e-06":               1_250_000_000,
		"7.5e-08":                75_000_000,
		"5.46875e-07":            546_875_000,
		"1.5000000000000002e-07": 150_000_000, // what a float left in the file
		"1e-15":                  1,
		"4.9e-16":                0,
		"5e-16":                  1,
		"1e-900":                 0,
	} {
		if got, ok := scaled(text, 15); !ok || got != want {
			t.Errorf("%s is %d, want %d", text, got, want)
		}
	}
	for _, text := range []string{"-1", "-1e-6", "1e5", "9300", "1e2000", "1e99999999999999999999"} {
		if got, ok := scaled(text, 15); ok {
			t.Errorf("%s is %d", text, got)
		}
	}
}

func FuzzPricePerTokenIsNeverAFloat(f *testing.F) {
	f.Add(int64(25), int16(-7))
	f.Add(int64(1), int16(-16))
	f.Fuzz(func(t *testing.T, digits int64, exponent int16) {
		if digits < 0 || exponent > 20 || exponent < -60 {
			t.Skip()
		}
		text := big.NewInt(digits).String() + "e" + big.NewInt(int64(exponent)).String()
		exact, _ := new(big.Rat).SetString(text)
		exact.Add(exact.Mul(exact, big.NewRat(1e15, 1)), big.NewRat(1, 2))
		want := new(big.Int).Div(exact.Num(), exact.Denom())
		got, ok := scaled(text, 15)
		if ok != want.IsInt64() && want.Cmp(big.NewInt(1<<62)) < 0 || ok && int64(got) != want.Int64() {
			t.Errorf("%s is %d, %v; want %s", text, got, ok, want)
		}
	})
}

func TestModelTakesFromTheFileWhatItDoesNotSayItself(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site(`	prices `+inventedPrices+`
	upstream farm http://$UPSTREAM {
		provider llama_farm
	}
	model acme/gpt-zero up
	model mine/bare-one up
	model house/sheep farm {
		upstream up
	}
	model renamed {
		upstream farm as woolly
	}
	model acme/* up
	model own/gpt-zero {
		upstream up as acme/gpt-zero
		price 7 8
		input_modalities audio
	}`))
	for id, want := range map[string]string{
		"acme/gpt-zero": `"name":"gpt-zero","context_length":128000,"is_free":false,"pricing":{"pricing_unit":"per_1m_tokens","prompt_usd_per_1m":"2.5",` +
			`"completion_usd_per_1m":"10","prompt_usd_per_1k":"0.0025","completion_usd_per_1k":"0.01","cache_read_input_usd_per_1m":"1.25"},` +
			`"model_type":"text","input_modalities":["text","image"],"output_modalities":["text"],"supports_tools":true,"supports_structured_output":true,"supports_thinking":false,`,
		"mine/bare-one":    `"context_length":4096,"is_free":false,"pricing":{"pricing_unit":"per_1m_tokens","prompt_usd_per_1m":"0.15","completion_usd_per_1m":"0.6"`,
		"renamed":          `"prompt_usd_per_1m":"0.1"`,
		"house/sheep":      `"is_free":false,"model_type"`, // nothing known
		"own/gpt-zero":     `"context_length":128000,"is_free":false,"pricing":{"pricing_unit":"per_1m_tokens","prompt_usd_per_1m":"7","completion_usd_per_1m":"8"`,
		"acme/vectors":     `"model_type":"embedding","input_modalities":["text"],"output_modalities":[],`,
		"acme/per-request": `"request_usd":"0.005"`,
		"acme/per-million": `"name":"per-million","is_free":false,"model_type"`, // left out
		"acme/pixels":      `"is_free":false,"model_type":"image"`,
		"acme/unheard-of":  `"is_free":false,"model_type"`,
	} {
		if r := g.do(http.MethodGet, "/v1/models/"+id, ""); !strings.Contains(string(r.body), want) {
			t.Errorf("%s: %s\nwant %s", id, r.body, want)
		}
	}
	if r := g.do(http.MethodGet, "/v1/models/own/gpt-zero", ""); !strings.Contains(string(r.body), `"input_modalities":["audio"]`) {
		t.Errorf("%s", r.body)
	}
}

func TestNamesOfAPatternAreChargedWhatTheFileSays(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	path := filepath.Join(t.TempDir(), "prices.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"test/later":{"input_cost_per_token":1e-6}}`)
	config := site("\tprices " + inventedPrices + " " + path + "\n\tmodel acme/* up")
	g := startGateway(t, up.address(), config)
	cost := func(model string) any {
		t.Helper()
		r := g.post(strings.Replace(chatBody, "test/plain", model, 1))
		if r.StatusCode != 200 {
			t.Fatalf("%s: %s", r.Status, r.body)
		}
		return r.decode(t)["cost"]
	}
	// 600 tokens at 2.50, 400 at 1.25 and 200 at 10 USD a million
	if got := cost("acme/gpt-zero"); got != "0.004" {
		t.Errorf("cost %v", got)
	}
	if got := cost("acme/unheard-of"); got != nil {
		t.Errorf("an unknown name cost %v", got)
	}
	if got := cost("test/later"); got != "0.001" {
		t.Errorf("cost %v", got)
	}
	write(`{"test/later":{"input_cost_per_token":2e-6}}`)
	g.load("http://$ADDRESS {\n" + strings.Replace(config, "mesh {", "mesh {\n\tmax_body_size 1MB", 1) + "\n}\n")
	if got := cost("test/later"); got != "0.002" {
		t.Errorf("after a reload it cost %v", got)
	}
}

func TestBadFileOfPricesStopsTheConfiguration(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"missing":      {"", "no such file"},
		"no JSON":      {"{", "unexpected end of JSON"},
		"a list":       {"[]", "cannot unmarshal array"},
		"a bad model":  {`{"x/y":5}`, "model x/y"},
		"a bad price":  {`{"x/y":{"input_cost_per_token":"cheap"}}`, "model x/y"},
		"a bad length": {`{"x/y":{"max_input_tokens":-5}}`, "model x/y"},
		"too large":    {"{}" + strings.Repeat(" ", maxPriceFile), "larger than"},
	} {
		path := filepath.Join(t.TempDir(), "prices.json")
		if tc.text != "" {
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := readPrices([]string{path}, zap.NewNop())
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMissingFileOfPricesFailsValidation(t *testing.T) {
	cfg := adaptCaddyfile(t, "http://localhost {\n\tmesh {\n\t\tprices nowhere.json\n\t\tupstream u http://127.0.0.1:1\n\t\tmodel m u\n\t\tdefault_model m\n\t}\n}\n")
	var c caddy.Config
	if err := caddy.StrictUnmarshalJSON(cfg, &c); err != nil {
		t.Fatal(err)
	}
	c.Admin = &caddy.AdminConfig{Disabled: true}
	if err := caddy.Validate(&c); err == nil || !strings.Contains(err.Error(), "nowhere.json") {
		t.Errorf("%v", err)
	}
}

func TestAbsurdPricesAreLeftOutWithAWarning(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	book, err := readPrices([]string{inventedPrices}, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	if all := logs.All(); len(all) != 1 || all[0].ContextMap()["model"] != "acme/per-million" || all[0].ContextMap()["file"] != inventedPrices {
		t.Errorf("%+v", all)
	}
	if book.models["acme/per-million"] != nil || book.models["sample_spec"] != nil || book.models["acme/gpt-zero"] == nil {
		t.Error("the wrong models were left out")
	}
	for _, price := range []string{"2.5", "0.15", "2.5e-12", "1e-20", "-1e-6", "1e300"} {
		absurd, err := book.add([]byte(`{"x":{"output_cost_per_token":` + price + `}}`))
		if err != nil || len(absurd) != 1 {
			t.Errorf("%s: %v %v", price, absurd, err)
		}
	}
	for _, price := range []string{"6e-4", "1e-9", "0", "0.000"} {
		absurd, err := book.add([]byte(`{"x":{"output_cost_per_token":` + price + `}}`))
		if err != nil || len(absurd) != 0 {
			t.Errorf("%s: %v %v", price, absurd, err)
		}
	}
}

func TestLookingAPriceUpAllocatesNothing(t *testing.T) {
	book, err := readPrices([]string{inventedPrices}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	m := &Model{Name: "*", Targets: []*Target{{Upstream: "llama_farm"}}}
	table := newModelTable([]*Model{m}, map[string]*Upstream{"llama_farm": {Name: "llama_farm"}})
	table.addPrices(book)
	e := table.find("x")
	for _, name := range []string{"acme/gpt-zero", "mine/bare-one", "a/name/that/is/rather/long/and/not/there/woolly", "mine/woolly"} {
		if n := testing.AllocsPerRun(100, func() { e.terms(name) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if price, _ := e.terms("mine/woolly"); price == nil {
		t.Error("the provider's own name was not found")
	}
}
