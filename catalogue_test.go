package mesh

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// catalogueSite has models of every kind.
var catalogueSite = site(`	model acme/small up {
		price 0.10 0.20
		display_name "Acme Small"
		supports tools structured_output
	}
	model acme/eyes up {
		price 1 2
		input_modalities text image
		supports tools structured_output thinking
		context_length 8000
	}
	model bolt/painter up {
		price_request 0.04
		type image
		output_modalities image
	}
	model bolt/gift up {
		price 0 0
	}
	model plain up
	key ` + otherKey + ` {
		models acme/*
	}`)

func idsOf(t *testing.T, body []byte, list string) (ids []string) {
	t.Helper()
	var answer map[string]json.RawMessage
	if err := json.Unmarshal(body, &answer); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	var entries []struct{ ID string }
	if err := json.Unmarshal(answer[list], &entries); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	for _, e := range entries {
		ids = append(ids, e.ID)
	}
	return ids
}

func TestModelsAreFiltered(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", catalogueSite)
	for _, tc := range []struct{ query, want string }{
		{"", "acme/small acme/eyes bolt/painter bolt/gift plain"},
		{"?free=true", "bolt/gift"},
		{"?free=No", "acme/small acme/eyes bolt/painter plain"},
		{"?type=image", "bolt/painter"},
		{"?type=text&provider=bolt", "bolt/gift"},
		{"?provider=mesh", "plain"},
		{"?provider=nobody", ""},
		{"?free=0&free=1", "bolt/gift"},
		{"?unknown=1", "acme/small acme/eyes bolt/painter bolt/gift plain"},
	} {
		r := g.do(http.MethodGet, "/v1/models"+tc.query, "")
		if got := strings.Join(idsOf(t, r.body, "data"), " "); r.StatusCode != 200 || got != tc.want {
			t.Errorf("%s: %d %s, want %s", tc.query, r.StatusCode, got, tc.want)
		}
	}
	if got := idsOf(t, g.do(http.MethodGet, "/v1/models/paid?type=image", "").body, "data"); !slices.Equal(got, []string{"bolt/painter"}) {
		t.Errorf("paid images: %s", got)
	}
}

func TestModelsAreSearched(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", catalogueSite)
	for _, tc := range []struct{ key, query, want string }{
		{testKey, "", "[acme/small acme/eyes bolt/painter bolt/gift plain] of 5, 50 from 0, [acme bolt mesh]"},
		{testKey, "?q=ACME", "[acme/small acme/eyes] of 2, 50 from 0, [acme]"},
		{testKey, "?q=acme+small", "[acme/small] of 1, 50 from 0, [acme]"},
		{testKey, "?limit=2&offset=1", "[acme/eyes bolt/painter] of 5, 2 from 1, [acme bolt mesh]"},
		{testKey, "?offset=9", "[] of 5, 50 from 9, [acme bolt mesh]"},
		{testKey, "?q=nothing", "[] of 0, 50 from 0, []"},
		{testKey, "?q=t&free=true", "[bolt/gift] of 1, 50 from 0, [bolt]"},
		{otherKey, "", "[acme/small acme/eyes] of 2, 50 from 0, [acme]"},
	} {
		r := g.do(http.MethodGet, "/v1/models/search"+tc.query, "", "Authorization", "Bearer "+tc.key)
		var page struct {
			Total, Limit, Offset int
			Brands               []string
		}
		if err := json.Unmarshal(r.body, &page); err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprintf("%s of %d, %d from %d, %s", idsOf(t, r.body, "items"), page.Total, page.Limit, page.Offset, page.Brands)
		if r.StatusCode != 200 || got != tc.want {
			t.Errorf("%s: %d %s\nwant %s", tc.query, r.StatusCode, got, tc.want)
		}
	}
}

func TestCatalogueNamesEveryFaultOfAQuery(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", catalogueSite)
	const (
		boolean = `{"type":"bool_parsing","loc":["query","free"],"msg":"Input should be a valid boolean, unable to interpret input"}`
		integer = `{"type":"int_parsing","loc":["query","limit"],"msg":"Input should be a valid integer, unable to parse string as an integer"}`
	)
	for path, want := range map[string]string{
		"/v1/models?free=perhaps":                      boolean,
		"/v1/models/search?free=&limit=many":           boolean + "," + integer,
		"/v1/models/search?limit=0":                    `{"type":"greater_than_equal","loc":["query","limit"],"msg":"Input should be greater than or equal to 1"}`,
		"/v1/models/search?limit=201":                  `{"type":"less_than_equal","loc":["query","limit"],"msg":"Input should be less than or equal to 200"}`,
		"/v1/models/search?offset=-1":                  `{"type":"greater_than_equal","loc":["query","offset"],"msg":"Input should be greater than or equal to 0"}`,
		"/v1/models/search?limit=1e1":                  integer,
		"/v1/models/search?limit=99999999999999999999": integer,
	} {
		r := g.do(http.MethodGet, path, "")
		if r.StatusCode != 422 || r.errorCode(t) != "validation_error" || !strings.Contains(string(r.body), `"details":[`+want+`]`) {
			t.Errorf("%s: %d %s", path, r.StatusCode, r.body)
		}
	}
	if r := g.do(http.MethodGet, "/v1/models/search?limit=0", "", "Authorization", "none"); r.StatusCode != 401 {
		t.Errorf("without a key: %d", r.StatusCode)
	}
}

func TestCatalogueSaysWhatAModelIs(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", catalogueSite)
	for id, want := range map[string]string{
		"acme/small": `"name":"Acme Small"`,
		"acme/eyes": `"model_type":"text","input_modalities":["text","image"],"output_modalities":["text"],"supports_tools":true,` +
			`"supports_structured_output":true,"supports_thinking":true,"supports_completions_api":true,"supports_responses_api":false}`,
		"bolt/painter": `"completion_usd_per_1k":"0","request_usd":"0.04"},"model_type":"image","input_modalities":["text"],"output_modalities":["image"],` +
			`"supports_tools":false,"supports_structured_output":false,"supports_thinking":false,"supports_completions_api":true,"supports_responses_api":false}`,
	} {
		if r := g.do(http.MethodGet, "/v1/models/"+id, ""); !strings.Contains(string(r.body), want) {
			t.Errorf("%s: %s\nwant %s", id, r.body, want)
		}
	}
}

func TestPriceOfARequestIsChargedOncePerAnswer(t *testing.T) {
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v1") {
			answers(200, "application/json", completion)(w, r)
			return
		}
		answers(500, "application/json", `{}`)(w, r)
	})
	g := startGateway(t, up.address(), site("\tupstream broken http://$UPSTREAM/broken\n"+
		"\tmodel test/flat broken up {\n\t\tprice_request 0.01\n\t}\n"+
		"\tmodel test/both up {\n\t\tprice 2.50 10.00\n\t\tprice_request 0.01\n\t}\n"+
		"\tmodel test/broken broken {\n\t\tprice_request 0.01\n\t}"))
	for _, tc := range []struct {
		model string
		want  Money
	}{
		{"flat", 10_000_000}, // though two upstreams were asked
		{"both", 4_500_000 + 10_000_000},
		{"broken", 0},
	} {
		r := g.post(strings.Replace(chatBody, "plain", tc.model, 1))
		if tc.want > 0 && r.decode(t)["cost"] != tc.want.String() {
			t.Errorf("%s: %s", tc.model, r.body)
		}
	}
	for i, want := range []Money{10_000_000, 14_500_000, 0} {
		if e := g.ledger(3)[i]; e.Cost != want {
			t.Errorf("%s cost %s, want %s", e.Model, e.Cost, want)
		}
	}
}

func TestMostThatARequestCanCostHasItsPrice(t *testing.T) {
	req, refused := parseChat([]byte(`{"max_tokens":1,` + msgs + `}`))
	if refused != nil {
		t.Fatal(refused)
	}
	plain, _ := req.maxCost([]candidate{{price: &Price{Input: usd, Output: usd}}})
	flat, bounded := req.maxCost([]candidate{{price: &Price{Input: usd, Output: usd, Request: 7}}})
	if !bounded || flat != plain+7 {
		t.Errorf("%s and %s", plain, flat)
	}
}
