package mesh

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// imageBytes is what an upstream gets for a request to a model of a kind.
func imageBytes(t *testing.T, body, kind string) string {
	t.Helper()
	req, refused := parseChat([]byte(body))
	if refused != nil {
		t.Fatalf("%s\nwas refused with %v", body, refused.details)
	}
	if refused := req.asImages(kind); refused != nil {
		t.Fatalf("%s\nwas refused with %v", body, refused.details)
	}
	if req.path() != imagesPath {
		t.Fatalf("%s\nis for %s", body, req.path())
	}
	parts, size := req.segmentsFor(&candidate{as: "dall-e-3", upstream: new(Upstream)})
	out := bytes.Join(parts, nil)
	if int64(len(out)) != size {
		t.Errorf("%d bytes, said to be %d", len(out), size)
	}
	return string(out)
}

func TestRequestForImagesBecomesOneOfTheImagesAPI(t *testing.T) {
	const asked = `"modality":"image",`
	for _, tc := range []struct{ name, in, out string }{
		{"a prompt", `{"model":"openai/dall-e-3","modality":"image","messages":[{"role":"user","content":"An otter"}]}`,
			`{"model":"dall-e-3","prompt":"An otter"}`},
		{"no model", `{` + asked + msgs + `}`, `{"model":"dall-e-3","prompt":"hi"}`},
		{"the last message of the user", `{` + asked + `"messages":[{"role":"system","content":"s"},{"role":"user","content":"one"},` +
			`{"role":"assistant","content":"a"},{"content":"two","role":"user"},{"role":"assistant","content":"b"}]}`,
			`{"model":"dall-e-3","prompt":"two"}`},
		{"the client's own bytes", `{` + asked + `"messages":[{"role":"user","content":"caf\u00e9 \ud83d\ude00 é \/ \"q\" \n"}],` +
			`"image":{ "size" :  "1024\u0078768","n": 2e0 }}`,
			`{"model":"dall-e-3","prompt":"caf\u00e9 \ud83d\ude00 é \/ \"q\" \n","size" :  "1024\u0078768","n": 2e0}`},
		{"parts", `{` + asked + `"messages":[{"role":"user","content":[{"type":"text","text":"one"},{"text":"","type":"text"},{"text":"t\u0077o","type":"text"}]}]}`,
			`{"model":"dall-e-3","prompt":"one\nt\u0077o"}`},
		{"every option", `{` + asked + `"image":{"n":3,"size":"1x1","quality":"hd","response_format":"b64_json"},"user":"u-1",` + msgs + `}`,
			`{"model":"dall-e-3","prompt":"hi","n":3,"size":"1x1","quality":"hd","response_format":"b64_json","user":"u-1"}`},
		{"null is absent", `{` + asked + `"image":{"n":null,"quality":"low","response_format":null},"user":null,"tools":null,` + msgs + `}`,
			`{"model":"dall-e-3","prompt":"hi","quality":"low"}`},
		{"what is the gateway's stays here", `{` + asked + `"session_id":"s","timeout":5,"cache":true,"models":[],"transforms":["middle-out"],"stream":true,` +
			`"stream_options":{"include_usage":true},"n":1,"modalities":["image"],` + msgs + `}`,
			`{"model":"dall-e-3","prompt":"hi"}`},
		{"what the user has said before stays here", `{` + asked + `"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}}]},` +
			`{"role":"user","content":"hi"}]}`, `{"model":"dall-e-3","prompt":"hi"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := imageBytes(t, tc.in, ""); got != tc.out {
				t.Errorf("got  %s\nwant %s", got, tc.out)
			}
			if without := strings.Replace(tc.in, `"modality":"image",`, "", 1); imageBytes(t, without, kindImage) != tc.out {
				t.Errorf("to a model that makes images it is %s", imageBytes(t, without, kindImage))
			}
		})
	}
}

func TestOnlyARequestForImagesLeavesTheChat(t *testing.T) {
	for _, tc := range []struct {
		members, kind string
		images        bool
	}{
		{``, "", false},
		{``, "text", false},
		{``, "audio", false},
		{``, "image", true},
		{`"modality":"image",`, "", true},
		{`"modality":"image",`, "text", true},
		{`"modality":"text",`, "", false},
		{`"modality":null,"image":null,`, "", false},
		{`"modality":"text",`, "image", true}, // the default
		{`"modalities":["text","image"],`, "", false},
		{`"modalities":["text","image"],`, "image", false}, // what it says of itself besides
		{`"modalities":["image"],`, "image", true},
		{`"image":{},`, "", false},
	} {
		req, refused := parseChat([]byte(`{` + tc.members + msgs + `}`))
		if refused != nil {
			t.Fatal(refused.details)
		}
		refused = req.asImages(tc.kind)
		if refused != nil || (req.images != nil) != tc.images {
			t.Errorf("%q to a model of type %q: images %v, %v", tc.members, tc.kind, req.images != nil, refused)
		}
	}
}

func TestRequestForImagesNamesWhatIsWrongWithIt(t *testing.T) {
	const (
		chatOnly = "value_error [body %s] Value error, it has no meaning for images"
		misplace = "value_error [body %s] Value error, for images it is image.%s"
		noText   = "value_error [body messages] Value error, the last message of the user has no text to make images of"
		notText  = "value_error [body messages] Value error, images are made of text alone, and the last message of the user has other parts"
		notHere  = "value_error [body image] Value error, images are for the modality 'image', or for a model whose type that is"
	)
	only := func(name string) string { return fmt.Sprintf(chatOnly, name) }
	for _, tc := range []struct {
		body, kind string
		want       []string
	}{
		{`{"image":{"n":1},` + msgs + `}`, "text", []string{notHere}},
		{`{"image":{"size":"1x1"},"modality":"text",` + msgs + `}`, "", []string{notHere}},
		{`{"image":{"size":"1x1"},"modalities":["text","image"],` + msgs + `}`, "image", []string{notHere}},
		{`{"tools":[{"type":"function","function":{"name":"f"}}],"n":2,"temperature":0.5,` + msgs + `}`, "image",
			[]string{only("tools"), fmt.Sprintf(misplace, "n", "n"), only("temperature")}},
		{`{"size":"1x1","quality":"hd","response_format":"url","background":"transparent",` + msgs + `}`, "image",
			[]string{fmt.Sprintf(misplace, "size", "size"), fmt.Sprintf(misplace, "quality", "quality"),
				fmt.Sprintf(misplace, "response_format", "response_format"), only("background")}},
		{`{"modalities":["audio"],"audio":{"voice":"a"},` + msgs + `}`, "image", []string{only("modalities"), only("audio")}},
		{`{"Modality":"text",` + msgs + `}`, "image", []string{only("Modality")}},
		{`{"messages":[{"role":"user","content":""}]}`, "image", []string{noText}},
		{`{"messages":[{"role":"user","content":[]}],"seed":1}`, "image", []string{noText, only("seed")}},
		{`{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}`, "image", []string{noText}},
		{`{"messages":[{"role":"user","content":"x"},{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}}]}]}`, "image", []string{notText}},
		{`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}},{"type":"text","text":"make it blue"}]}]}`, "image", []string{notText}},
	} {
		req, refused := parseChat([]byte(tc.body))
		if refused != nil {
			t.Fatal(tc.body, refused.details)
		}
		refused = req.asImages(tc.kind)
		if refused == nil || refused.status != 422 || refused.code != "validation_error" {
			t.Errorf("%s: %v", tc.body, refused)
			continue
		}
		var got []string
		for _, f := range refused.details {
			got = append(got, fmt.Sprint(f.Type, " ", f.Loc, " ", f.Msg))
		}
		if strings.Join(got, "\n") != strings.Join(tc.want, "\n") {
			t.Errorf("%s\nhas the faults %q\nwant %q", tc.body, got, tc.want)
		}
	}
}

func TestModelThatIsNotThereComesBeforeWhatIsWrongWithImages(t *testing.T) {
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), strings.Replace(site(painter), "name tester", "name tester\n\t\tmodels test/*", 1))
	const rest = `"modality":"image","tools":[{"type":"function","function":{"name":"f"}}],` + msgs + `}`
	for body, want := range map[string]int{
		`{"model":"nobody/x",` + rest:                                                 404,
		`{"model":"priced/x",` + rest:                                                 404,
		`{"model":"test/painter",` + rest:                                             422,
		`{"model":"test/writer",` + rest:                                              422,
		`{"model":"test/writer","image":{"n":1},` + msgs + `}`:                        422,
		`{"model":"test/painter","image":{"n":11},` + msgs + `}`:                      422,
		`{"model":"test/painter","audio":{"voice":"alloy"},` + msgs + `}`:             422,
		`{"model":"test/writer","modality":"image",` + msgs + `}`:                     200,
		`{"model":"test/painter","models":["other/painter"],"image":{},` + msgs + `}`: 404,
	} {
		if r := g.post(body); r.StatusCode != want {
			t.Errorf("%s: %s %s", body, r.Status, r.body)
		}
	}
	g.load("http://$ADDRESS {\n" + strings.Replace(site("\tmodel other/painter up"), "name tester", "name tester\n\t\tmodels test/*", 1) + "\n}\n")
	if r := g.post(`{"model":"other/painter",` + rest); r.StatusCode != 403 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

func TestTemplateBringsThePromptOfImages(t *testing.T) {
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), strings.Replace(site(painter+`
	template otter {
		system "You paint."
		message user "A {{kind}} otter"
		model test/painter
		params temperature 0.5 user "template's"
	}`), "\tdefault_model test/plain\n", "", 1))
	r := g.post(`{"template":"otter","variables":{"kind":"\"wet\""},"messages":[],"image":{"n":2}}`)
	if want := `{"model":"painter","prompt":"A \"wet\" otter","n":2,"user":"template's"}`; r.StatusCode != 200 || string(up.last(t).body) != want {
		t.Errorf("%s: the upstream received %s", r.Status, up.last(t).body)
	}
	g.post(`{"template":"otter","variables":{"kind":""},"user":"mine","messages":[{"role":"user","content":"No, a seal"}]}`)
	if want := `{"model":"painter","prompt":"No, a seal","user":"mine"}`; string(up.last(t).body) != want {
		t.Errorf("the upstream received %s", up.last(t).body)
	}
}

func TestMostThatImagesCanCost(t *testing.T) {
	req, refused := parseChat([]byte(`{"modality":"image","image":{"n":3},"messages":[{"role":"user","content":[{"type":"file","file":{}}]},{"role":"user","content":"hi"}]}`))
	if refused != nil {
		t.Fatal(refused)
	}
	if refused := req.asImages(""); refused != nil {
		t.Fatal(refused)
	}
	for _, tc := range []struct {
		price   *Price
		context int64
		want    Money
		bounded bool
	}{
		{&Price{Image: 40}, 0, 120, true},
		{&Price{Image: 40, Request: 7}, 0, 127, true},
		{nil, 0, 0, true},
		{&Price{Output: 1_000_000}, 0, 0, false},
		{&Price{Output: 1_000_000, Image: 40}, 1000, 3000 + 120, true},
		{&Price{Input: 1_000_000, Output: 1_000_000}, 10, 10 + 30, true},
	} {
		got, bounded := req.maxCost([]candidate{{price: tc.price, context: tc.context}})
		if got != tc.want || bounded != tc.bounded {
			t.Errorf("%+v in %d: %d, %t", tc.price, tc.context, got, bounded)
		}
	}
	if got, _ := req.maxCost([]candidate{{price: &Price{Image: 40}}, {price: &Price{Image: 50}}}); got != 150 {
		t.Errorf("of two candidates: %d", got)
	}
	if got, _ := req.maxCost([]candidate{{price: &Price{Input: 1_000_000}}}); got < Money(len("hi")) || got > 100 {
		t.Errorf("the prompt alone: %d", got)
	}
	if got := req.expected(candidate{price: &Price{Image: 40}}, 300); got != (usage{images: 3}) {
		t.Errorf("expected %+v", got)
	}
}

func TestHardCapHoldsForImages(t *testing.T) {
	up := startUpstream(t, plays(t, "images_url.json"))
	g := startGateway(t, up.address(), site(`	model test/flat up {
		type image
		price_image 0.04
	}
	model test/metered up {
		type image
		price 5 40
	}
	key `+otherKey+` {
		spend_cap_usd 0.10 hard
	}`))
	ask := func(model string, n int) *reply {
		return g.post(fmt.Sprintf(`{"model":%q,"image":{"n":%d},%s}`, model, n, msgs), "Authorization", "Bearer "+otherKey)
	}
	if r := ask("test/flat", 3); r.StatusCode != 402 || !strings.Contains(string(r.body), "can cost up to 0.12 USD") {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := ask("test/metered", 1); r.StatusCode != 402 || !strings.Contains(string(r.body), "context length") {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := ask("test/flat", 2); r.StatusCode != 200 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if e := g.ledger(1)[0]; e.Cost != 40_000_000 || e.Images != 1 {
		t.Errorf("not charged as they came: %+v", e)
	}
}

func TestFileOfPricesKnowsWhatMakesImages(t *testing.T) {
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site("\tprices "+inventedPrices+"\n\tmodel acme/* up"))
	for model, cost := range map[string]string{
		"acme/pixels":  "0.08",    // 2 × 0.04
		"acme/brushes": "0.02201", // 50 × 5 + 544 × 40, per million
	} {
		r := g.post(strings.Replace(chatBody, "test/plain", model, 1))
		if r.decode(t)["cost"] != cost || up.last(t).URL.Path != "/v1/images/generations" {
			t.Errorf("%s: %s %s", model, up.last(t).URL, r.body)
		}
	}
	entry := g.do(http.MethodGet, "/v1/models/acme/pixels", "")
	if !strings.Contains(string(entry.body), `"is_free":false,"model_type":"image"`) {
		t.Errorf("%s", entry.body)
	}
	absurd, err := newBook().add([]byte(`{"x":{"output_cost_per_image":5000},"y":{"output_cost_per_image":-1},"z":{"output_cost_per_image":0.04}}`))
	if err != nil || len(absurd) != 2 {
		t.Errorf("%v %v", absurd, err)
	}
}

func newBook() *priceBook {
	return &priceBook{models: make(map[string]*listedModel), providers: make(map[string]map[string]*listedModel)}
}

func TestImagesAreNotCompared(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site(painter+"\n\tcompare {\n\t\tmodel test/painter\n\t}"))
	r := g.compare(compareBody(`"test/a","test/painter"`, ""))
	if r.StatusCode != 422 || r.errorCode(t) != "unprocessable_entity" || !strings.Contains(string(r.body), "test/painter") {
		t.Errorf("%s %s", r.Status, r.body)
	}
	// one that is to judge leaves that to another
	c := g.compare(compareBody(`"test/a","test/b"`, "")).comparison(t)
	if !c.FallbackUsed || *c.ComparisonModel != "test/a" {
		t.Errorf("%+v", c)
	}
}
