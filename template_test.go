package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const templateBody = `{"name":"greeter","description":"Greets","system":"You are {{tone}} at {{ company }}.",` +
	`"messages":[{"role":"user","content":"Hi, {{name}}"},{"role":"assistant","content":[{"type":"text","text":"Yes, {{name}}?"}]}],` +
	`"model":"test/templated","params":{"temperature":0.5,"max_tokens":64,"response_format":{"type":"text"}},"variables":["tone","company","name"]}`

// twoInstances starts two gateways on one Redis, whose keys are of one owner and of none.
func twoInstances(t *testing.T, up *upstream) [2]*gateway {
	t.Helper()
	server := startRedis(t)
	var instances [2]*gateway
	for i := range instances {
		p := startProcess(t, up.address(), templateSite("store redis {\n\t\taddress "+server.address+"\n\t\tjournal $DIR/journal.db\n\t\ttimeout 5s\n\t}"))
		instances[i] = p.gateway()
	}
	return instances
}

func templateSite(store string) string {
	return "http://$ADDRESS {\nmesh {\n\t" + store + "\n\tkey " + testKey + " {\n\t\towner acme\n\t}\n\tkey " + otherKey + "\n" +
		"\tupstream up http://$UPSTREAM/v1\n\tmodel test/* up\n\tdefault_model test/plain\n" +
		"\ttemplate shared {\n\t\tsystem \"Everybody's {{x}}.\"\n\t}\n}\n}\n"
}

func (r *reply) template(t testing.TB, status int) (s storedTemplate) {
	t.Helper()
	if r.StatusCode != status {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	if err := json.Unmarshal(r.body, &s); err != nil {
		t.Fatalf("%v in %s", err, r.body)
	}
	return s
}

func TestLifeOfATemplate(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	t.Run("local", func(t *testing.T) {
		g := startProcess(t, up.address(), templateSite("store local $DIR/mesh.db")).gateway()
		lifeOfATemplate(t, up, g, g)
	})
	t.Run("redis, two instances", func(t *testing.T) {
		g := twoInstances(t, up)
		lifeOfATemplate(t, up, g[0], g[1])
	})
}

// lifeOfATemplate changes at one instance, and looks at the other.
func lifeOfATemplate(t *testing.T, up *upstream, one, other *gateway) {
	stranger := []string{"Authorization", "Bearer " + otherKey}
	// the other instance remembers that there is none
	if r := other.do(http.MethodGet, templatesPath, ""); r.StatusCode != 200 || strings.Contains(string(r.body), "greeter") {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	created := one.do(http.MethodPost, templatesPath, templateBody).template(t, 201)
	if created.Name != "greeter" || *created.Owner != "acme" || created.IsGlobal || created.Created.IsZero() || !created.Created.Equal(created.Updated) || len(created.ID) != 36 {
		t.Errorf("%+v", created)
	}
	path := templatesPath + "/" + created.ID
	began := time.Now()
	eventually(t, "the other instance sees it", func() bool { return other.do(http.MethodGet, path, "").StatusCode == 200 })
	t.Logf("a new template is seen after %s", time.Since(began).Round(time.Millisecond))
	if got := other.do(http.MethodGet, path, "").template(t, 200); got.ID != created.ID || *got.System != *created.System || len(got.Messages) != 2 {
		t.Errorf("%+v", got)
	}
	var list []storedTemplate
	if err := json.Unmarshal(other.do(http.MethodGet, templatesPath, "").body, &list); err != nil || len(list) != 2 {
		t.Fatalf("%v %+v", err, list)
	}
	if i := slices.IndexFunc(list, func(s storedTemplate) bool { return s.Name == "shared" }); i < 0 || !list[i].IsGlobal || list[i].Owner != nil {
		t.Errorf("%+v", list)
	}

	other.use(`"template":"greeter","variables":{"tone":"kind","company":"Acme","name":"Ann"}`)
	want := `{"messages":[{"role":"system","content":"You are kind at Acme."},{"role":"user","content":"Hi, Ann"},` +
		`{"role":"assistant","content":[{"type":"text","text":"Yes, Ann?"}]},{"role":"user","content":"Bye"}],"model":"templated",` +
		`"max_tokens":64,"response_format":{"type":"text"},"temperature":0.5}`
	if got := string(up.last(t).body); got != want {
		t.Errorf("the upstream received\n%s, want\n%s", got, want)
	}
	other.use(`"template":"` + created.ID + `","variables":{"tone":"1","company":"2","name":"3"}`)

	for _, tc := range []struct {
		method, path, body string
		status             int
		code               string
		headers            []string
	}{
		{"POST", templatesPath, templateBody, 409, "conflict", nil},
		{"POST", templatesPath, `{"system":"x"}`, 422, "validation_error", nil},
		{"GET", templatesPath + "/nonsense", "", 404, "not_found", nil},
		{"GET", templatesPath + "/00000000-0000-4000-8000-000000000000", "", 404, "not_found", nil},
		{"GET", path, "", 404, "not_found", stranger},
		{"PATCH", path, `{"name":"x"}`, 404, "not_found", stranger},
		{"DELETE", path, "", 404, "not_found", stranger},
		{"DELETE", templatesPath + "/" + list[slices.IndexFunc(list, func(s storedTemplate) bool { return s.IsGlobal })].ID, "", 403, "forbidden", nil},
		{"PUT", path, "", 405, "method_not_allowed", nil},
		{"POST", chatPath, `{"template":"greeter","messages":[]}`, 404, "not_found", stranger},
		{"POST", chatPath, `{"template":"greeter","messages":[]}`, 422, "unprocessable_entity", nil},
		{"PATCH", path, `{"name":null}`, 422, "validation_error", nil},
	} {
		if r := other.do(tc.method, tc.path, tc.body, tc.headers...); r.StatusCode != tc.status || r.errorCode(t) != tc.code {
			t.Errorf("%s %s %s: %s %s", tc.method, tc.path, tc.body, r.Status, r.body)
		}
	}

	// another owner may have one of the same name
	one.do(http.MethodPost, templatesPath, templateBody, stranger...).template(t, 201)

	updated := other.do(http.MethodPatch, path, `{"name":"welcomer","description":null,"system":"Be {{tone}}."}`).template(t, 200)
	if updated.Name != "welcomer" || updated.Description != nil || *updated.Model != "test/templated" || len(updated.Messages) != 2 ||
		!updated.Updated.After(created.Updated) || !updated.Created.Equal(created.Created) {
		t.Errorf("%+v", updated)
	}
	eventually(t, "the first instance sees the change", func() bool {
		return one.post(`{"template":"greeter","messages":[]}`).StatusCode == 404
	})
	one.use(`"template":"welcomer","variables":{"tone":"brief","name":"Bo"}`)
	if got := string(up.last(t).body); !strings.Contains(got, `"Be brief."`) {
		t.Errorf("the upstream received %s", got)
	}

	if r := one.do(http.MethodDelete, path, ""); r.StatusCode != 204 || len(r.body) != 0 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := one.do(http.MethodGet, path, ""); r.StatusCode != 404 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	eventually(t, "the other instance sees the end", func() bool { return other.do(http.MethodGet, path, "").StatusCode == 404 })

	// of many at once, one is first
	const many = 24
	var creating sync.WaitGroup
	statuses := make([]int, many)
	for i := range many {
		creating.Go(func() {
			g := []*gateway{one, other}[i%2]
			statuses[i] = g.do(http.MethodPost, templatesPath, templateBody).StatusCode
		})
	}
	creating.Wait()
	slices.Sort(statuses)
	if statuses[0] != 201 || statuses[1] != 409 || statuses[many-1] != 409 {
		t.Errorf("%v", statuses)
	}
}

// use asks for a completion with a template.
func (g *gateway) use(members string) {
	g.t.Helper()
	if r := g.post(`{` + members + `,"messages":[{"role":"user","content":"Bye"}]}`); r.StatusCode != 200 {
		g.t.Fatalf("%s %s", r.Status, r.body)
	}
}

func TestTemplatesOutliveARestart(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	p := startProcess(t, up.address(), templateSite("store local $DIR/mesh.db"))
	p.gateway().do(http.MethodPost, templatesPath, templateBody).template(t, 201)
	p.child.end() // killed: what was answered is on the disk
	p.start()
	p.gateway().use(`"template":"greeter","variables":{"tone":"kind","company":"Acme","name":"Ann"}`)
}

// TestDefaultsFillWhatARequestLacks has parameters of the key and of a template.
func TestDefaultsFillWhatARequestLacks(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\tdefault_params temperature 0.1 stop end user \"of the key\"\n\t}\n"+
		"\tupstream up http://$UPSTREAM/v1\n\tmodel test/* up\n\tdefault_model test/plain\n"+
		"\ttemplate t {\n\t\tmodel test/other\n\t\tparams temperature 0.9 max_tokens 7 n 2\n\t}\n}")
	const messages = `"messages":[{"role":"user","content":"Hi"}]`
	for _, tc := range []struct{ sent, want string }{
		{`{` + messages + `}`, `{` + messages + `,"model":"plain","stop":"end","temperature":0.1,"user":"of the key"}`},
		{`{"temperature":1.50,` + messages + `,"user":null,"x":1}`, `{"temperature":1.50,` + messages + `,"user":"of the key","x":1,"model":"plain","stop":"end"}`},
		{`{"template":"t",` + messages + `}`, `{` + messages + `,"model":"other","max_tokens":7,"n":2,"stop":"end","temperature":0.1,"user":"of the key"}`},
		{`{"max_completion_tokens":9,"model":"test/m","template":"t",` + messages + `,"n":1,"stop":[]}`,
			`{"max_completion_tokens":9,"model":"m",` + messages + `,"n":1,"stop":[],"temperature":0.1,"user":"of the key"}`},
		{`{` + messages + `,"template":"t","max_tokens":null}`, `{` + messages + `,"max_tokens":7,"model":"other","n":2,"stop":"end","temperature":0.1,"user":"of the key"}`},
	} {
		if r := g.post(tc.sent); r.StatusCode != 200 {
			t.Errorf("%s: %s %s", tc.sent, r.Status, r.body)
			continue
		}
		if got := string(up.last(t).body); got != tc.want {
			t.Errorf("sent %s\ngot  %s\nwant %s", tc.sent, got, tc.want)
		}
	}
	if r := g.post(`{` + messages + `,"Temperature":1}`); r.StatusCode != 422 || !strings.Contains(string(r.body), `"temperature"`) {
		t.Errorf("a twin of a default: %s %s", r.Status, r.body)
	}
}

// TestDefaultsReachAnUpstreamWithoutStreamOptions has the place where members are added be one that is taken out.
func TestDefaultsReachAnUpstreamWithoutStreamOptions(t *testing.T) {
	up := startUpstream(t, answers(200, "text/event-stream", wordFrame+finishFrame+doneFrame))
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\tdefault_params temperature 0.1\n\t}\n"+
		"\tupstream up http://$UPSTREAM/v1 {\n\t\tno_stream_options\n\t}\n\tmodel test/* up\n\tdefault_model test/plain\n\ttemplate t {\n\t\tsystem Hello\n\t}\n}")
	for _, tc := range []struct{ sent, want string }{
		{`{"messages":[],"template":"t","stream":true}`, `{"messages":[{"role":"system","content":"Hello"}],"stream":true,"model":"plain","temperature":0.1}`},
		{`{"stream":true,"messages":[],"stream_options":{"include_usage":true},"template":"t","timeout":60}`,
			`{"stream":true,"messages":[{"role":"system","content":"Hello"}],"model":"plain","temperature":0.1}`},
		{`{"stream":true,"stream_options":{"include_usage":true},"messages":[],"model":"test/m","template":"t","seed":1}`,
			`{"stream":true,"messages":[{"role":"system","content":"Hello"}],"model":"m","seed":1,"temperature":0.1}`},
	} {
		if r := g.post(tc.sent); r.StatusCode != 200 {
			t.Errorf("%s: %s %s", tc.sent, r.Status, r.body)
			continue
		}
		if got := string(up.last(t).body); got != tc.want {
			t.Errorf("sent %s\ngot  %s\nwant %s", tc.sent, got, tc.want)
		}
	}
}

func TestEveryMissingVariableIsNamed(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site("\ttemplate t {\n\t\tsystem \"{{a}} {{ b }} {{c}} {{ not a slot }} {{a}}\"\n\t\tmessage user {{d_1}}\n\t}\n"))
	r := g.post(`{"template":"t","variables":{"b":"","x":"unused"},"messages":[]}`)
	var said errorBody
	if err := json.Unmarshal(r.body, &said); err != nil || r.StatusCode != 422 || said.Error.Code != "unprocessable_entity" || len(said.Error.Details) != 3 {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	for i, want := range []string{"a", "c", "d_1"} {
		if loc := fmt.Sprint(said.Error.Details[i].Loc); loc != "[body variables "+want+"]" || !strings.Contains(said.Error.Message, `"`+want+`"`) {
			t.Errorf("%s in %s", loc, said.Error.Message)
		}
	}
	if r := g.post(`{"messages":[]}`); r.StatusCode != 422 || r.errorCode(t) != "validation_error" {
		t.Errorf("no messages: %s %s", r.Status, r.body)
	}
}

func TestHardCapCountsWhatATemplateBrings(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	long := strings.Repeat("word ", 8000) // 40,000 bytes, so up to 40,000 tokens
	g := startGateway(t, up.address(), "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+" {\n\t\tspend_cap_usd 0.05 hard\n\t}\n\tupstream up http://$UPSTREAM/v1\n"+
		"\tmodel paid/m up {\n\t\tprice 2.50 10.00\n\t}\n\tdefault_model paid/m\n\ttemplate long {\n\t\tsystem \""+long+"\"\n\t}\n\ttemplate wordy {\n\t\tsystem x\n\t\tparams max_tokens 100000\n\t}\n}")
	if r := g.post(`{"max_tokens":10,"messages":[{"role":"user","content":"Hi"}]}`); r.StatusCode != 200 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	for _, body := range []string{`{"template":"long","max_tokens":10,"messages":[]}`, `{"template":"wordy","messages":[]}`} {
		if r := g.post(body); r.StatusCode != 402 {
			t.Errorf("%s: %s %s", body, r.Status, r.body)
		}
	}
}

func TestFaultsOfATemplateAreAllNamed(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site(""))
	r := g.do(http.MethodPost, templatesPath, `{"name":7,"messages":[{"role":"robot"}],"params":{"temperature":3,"model":"x","Stop":"y"},"variables":"z"}`)
	var said errorBody
	if err := json.Unmarshal(r.body, &said); err != nil || r.StatusCode != 422 {
		t.Fatalf("%s %s", r.Status, r.body)
	}
	var places []string
	for _, d := range said.Error.Details {
		places = append(places, strings.Trim(fmt.Sprint(d.Loc[1:]), "[]"))
	}
	want := "name, messages 0 role, messages 0 content, params temperature, params model, params Stop, variables"
	if got := strings.Join(places, ", "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if r := g.do(http.MethodPost, templatesPath, `{"name":"x","system":"`+strings.Repeat("y", maxTemplateSize)+`"}`); r.StatusCode != 413 {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

// FuzzExpand inserts values into every place that takes them. Whatever they hold, they end up as text where the slot was.
func FuzzExpand(f *testing.F) {
	for _, value := range []string{"plain", `"}],"x":[{"`, "{{b}}", "{{ a }}", "a\nb\t\\", "\u2028\u2029\u0000", `\u007b\u007ba}}`, "😀", "</script>", `{"role":"system"}`} {
		f.Add(value, value+"2", "text {{a}} and {{b}}")
	}
	f.Fuzz(func(t *testing.T, a, b, text string) {
		if !json.Valid(appendString(nil, text)) || strings.ToValidUTF8(a+b+text, "") != a+b+text {
			t.Skip()
		}
		template := &Template{System: "{{a}}", Messages: []TemplateMessage{
			{Role: "user", Content: appendString(nil, text)},
			{Role: "user", Content: json.RawMessage(`[{"type":"text","text":` + string(appendString(nil, text)) + `},{"type":"image_url","image_url":{"url":"{{a}}"}}]`)},
		}}
		rendered := template.compile().render(map[string]string{"a": a, "b": b})
		var messages []struct {
			Role    string
			Content json.RawMessage
		}
		decoder := json.NewDecoder(bytes.NewReader(append(append([]byte{'['}, rendered...), ']')))
		if err := decoder.Decode(&messages); err != nil || len(messages) != 3 {
			t.Fatalf("%v in %s", err, rendered)
		}
		want := slot.ReplaceAllStringFunc(text, func(s string) string {
			switch slot.FindStringSubmatch(s)[1] {
			case "a":
				return a
			case "b":
				return b
			}
			return ""
		})
		var system, whole string
		var parts []struct {
			Text     string
			ImageURL struct{ URL string } `json:"image_url"`
		}
		if err := json.Unmarshal(messages[0].Content, &system); err != nil || system != a {
			t.Errorf("%v %q, want %q", err, system, a)
		}
		if err := json.Unmarshal(messages[1].Content, &whole); err != nil || whole != want {
			t.Errorf("%v %q, want %q", err, whole, want)
		}
		if err := json.Unmarshal(messages[2].Content, &parts); err != nil || parts[0].Text != want || parts[1].ImageURL.URL != "{{a}}" {
			t.Errorf("%v %+v, want %q", err, parts, want)
		}
	})
}
