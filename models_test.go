package mesh

import (
	"encoding/json"
	"net/http"
	"testing"
)

func TestMostSpecificModelWins(t *testing.T) {
	table := newModelTable([]*Model{{Name: "*"}, {Name: "a/*"}, {Name: "a/bc*"}, {Name: "a/bcd"}, {Name: "a/b*"}}, nil)
	for name, want := range map[string]string{"x": "*", "a/x": "a/*", "a/b": "a/b*", "a/bc": "a/bc*", "a/bcd": "a/bcd", "a/bcde": "a/bc*", "A/b": "*"} {
		if got := table.find(name); got == nil || got.Name != want {
			t.Errorf("%s: %v, want %s", name, got, want)
		}
	}
	if got := newModelTable([]*Model{{Name: "a/*"}}, nil).find("b"); got != nil {
		t.Errorf("b: %s", got.Name)
	}
}

func TestNameOfAModelAtItsUpstream(t *testing.T) {
	for _, tc := range []struct{ name, as, want string }{
		{"openai/gpt-4o", "", "gpt-4o"}, {"openrouter/meta/llama", "", "meta/llama"}, {"llama", "", "llama"}, {"openai/gpt-4o", "x/y", "x/y"},
	} {
		if got := (&Target{As: tc.as}).nameThere(tc.name); got != tc.want {
			t.Errorf("%s as %q: %s", tc.name, tc.as, got)
		}
	}
}

func TestModelsAreListed(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site("\tmodel a/b up {\n\t\tprice 0.15 0.60\n\t\tprice_cached 0.075\n\t\tcontext_length 128000\n\t}\n"+
		"\tmodel gratis up {\n\t\tprice 0 0\n\t}\n\tkey "+otherKey+" {\n\t\tmodels a/*\n\t}"))
	const about = `"model_type":"text","input_modalities":["text"],"output_modalities":["text"],"supports_tools":false,"supports_structured_output":false,"supports_thinking":false,"supports_completions_api":true,"supports_responses_api":false}`
	const ab = `{"id":"a/b","object":"model","created":0,"owned_by":"a","name":"b","context_length":128000,"is_free":false,"pricing":{` +
		`"pricing_unit":"per_1m_tokens","prompt_usd_per_1m":"0.15","completion_usd_per_1m":"0.6","prompt_usd_per_1k":"0.00015",` +
		`"completion_usd_per_1k":"0.0006","cache_read_input_usd_per_1m":"0.075"},` + about
	const free = `{"id":"gratis","object":"model","created":0,"owned_by":"mesh","name":"gratis","is_free":true,"pricing":{"pricing_unit":"per_1m_tokens",` +
		`"prompt_usd_per_1m":"0","completion_usd_per_1m":"0","prompt_usd_per_1k":"0","completion_usd_per_1k":"0"},` + about
	for _, tc := range []struct {
		path, key, sdk string
		status         int
		want           string
	}{
		{"/v1/models", testKey, "", 200, `{"object":"list","data":[` + ab + "," + free + `]}`},
		{"/v1/models", testKey, "go/1", 200, `[` + ab + "," + free + `]`},
		{"/v1/models", otherKey, "", 200, `{"object":"list","data":[` + ab + `]}`},
		{"/v1/models/a/b", testKey, "", 200, ab},
		{"/v1/models/a%2Fb", testKey, "", 200, ab},
		{"/v1/models/gratis", otherKey, "", 404, "model_not_found"},
		{"/v1/models/test/anything", testKey, "", 200, `{"id":"test/anything","object":"model","created":0,"owned_by":"test","name":"anything","is_free":false,` + about},
		{"/v1/models/free", testKey, "", 200, `{"object":"list","data":[` + free + `]}`},
		{"/v1/models/free", testKey, "go/1", 200, `[` + free + `]`},
		{"/v1/models/free", otherKey, "", 200, `{"object":"list","data":[]}`},
		{"/v1/models/paid", testKey, "", 200, `{"object":"list","data":[` + ab + `]}`},
		{"/v1/models/", testKey, "", 404, "model_not_found"},
		{"/v1/models/test/", testKey, "", 404, "model_not_found"},
		{"/v1/models/test/a%0ab", testKey, "", 404, "model_not_found"},
		{"/v1/models/nothing", testKey, "", 404, "model_not_found"},
	} {
		r := g.do(http.MethodGet, tc.path, "", "Authorization", "Bearer "+tc.key, "X-MeshAPI-SDK", tc.sdk)
		got := string(r.body)
		if tc.status != 200 {
			got = r.errorCode(t)
		}
		if r.StatusCode != tc.status || got != tc.want {
			t.Errorf("%s: %d %s\nwant %s", tc.path, r.StatusCode, got, tc.want)
		}
	}
}

func TestOtherMethodsAndPaths(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", "route {\n"+site("")+"\nrespond \"next handler\" 418\n}")
	for _, tc := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/v1/chat/completions", 405, "POST"},
		{"DELETE", "/v1/chat/completions", 405, "POST"},
		{"POST", "/v1/models", 405, "GET"},
		{"PUT", "/v1/models/a", 405, "GET"},
		{"OPTIONS", "/v1/chat/completions", 418, ""},
		{"POST", "/v1/chat/completions/", 418, ""},
		{"POST", "/v1/embeddings", 418, ""},
		{"GET", "/", 418, ""},
		{"GET", "/v1/modelsx", 418, ""},
	} {
		r := g.do(tc.method, tc.path, "")
		if r.StatusCode != tc.status || r.Header.Get("Allow") != tc.allow {
			t.Errorf("%s %s: %s, Allow %q", tc.method, tc.path, r.Status, r.Header.Get("Allow"))
		}
		if tc.status == 405 {
			var e errorBody
			if err := json.Unmarshal(r.body, &e); err != nil || e.Error.Code != "method_not_allowed" {
				t.Errorf("%s", r.body)
			}
		}
	}
}
