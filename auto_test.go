package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// routed is a provider of the models of autoBlock. The classifier says what says returns.
func routed(t testing.TB, says func(r *http.Request) string) *upstream {
	return startUpstream(t, routes(says))
}

func routes(says func(r *http.Request) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var asked struct {
			Model  string
			Stream bool
		}
		json.Unmarshal(body, &asked)
		switch {
		case asked.Model == "classifier":
			said, _ := json.Marshal(says(r))
			fmt.Fprintf(w, `{"id":"k","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":%s},"finish_reason":"stop"}],`+
				`"usage":{"prompt_tokens":50,"completion_tokens":4,"total_tokens":54}}`, said)
		case asked.Stream:
			answers(200, "text/event-stream", roleFrame+wordFrame+finishFrame+usageFrame+doneFrame)(w, r)
		default:
			answers(200, "application/json", strings.Replace(completion, "Hello there.", "I am "+asked.Model, 1))(w, r)
		}
	}
}

func saying(text string) func(*http.Request) string {
	return func(*http.Request) string { return text }
}

const autoBlock = "\tmodel paid/* up {\n\t\tprice 2.50 10.00\n\t}\n" +
	"\tmodel paid/classifier up {\n\t\tprice 1 2\n\t}\n" +
	"\tauto {\n\t\tclassifier paid/classifier\n\t\tcandidate paid/small \"short questions\"\n\t\tcandidate paid/large \"mathematics\"\n" +
	"\t\tcandidate test/code \"programs\"\n\t\tdefault paid/large\n\t\ttimeout 30s\n\t}\n"

func autoBody(more string) string {
	return `{"model":"auto","messages":[{"role":"system","content":"Be kind."},{"role":"user","content":"Say \"hi\" twice."}]` + more + `}`
}

func TestAutoHasTheClassifiersChoiceAnswer(t *testing.T) {
	up := routed(t, saying(" paid/small low\n"))
	g := startGateway(t, up.address(), site(autoBlock))
	r := g.post(autoBody(`,"session_id":"s","temperature":0.5`))
	got := r.decode(t)
	if r.StatusCode != 200 || got["x_auto_routed"] != true || got["x_resolved_model_id"] != "paid/small" || got["x_auto_routed_fallback"] != nil ||
		r.Header.Get("X-Mesh-Routing-Model") != "paid/small" || !strings.Contains(string(r.body), "I am small") {
		t.Errorf("%s %v %s", r.Status, r.Header, r.body)
	}
	usage := got["usage"].(map[string]any)
	for name, want := range map[string]any{"prompt_tokens": 1000.0, "completion_tokens": 200.0, "total_tokens": 1200.0,
		"classifier_prompt_tokens": 50.0, "classifier_completion_tokens": 4.0, "classifier_total_tokens": 54.0, "classifier_cost": "0.000058"} {
		if usage[name] != want {
			t.Errorf("usage.%s is %v, want %v", name, usage[name], want)
		}
	}
	if got["cost"] != "0.0045" {
		t.Errorf("cost %v", got["cost"])
	}

	asked := string(up.received()[0].body)
	for _, part := range []string{"paid/small: short questions", "test/code: programs", `system: Be kind.\nuser: Say \"hi\" twice.`} {
		if !strings.Contains(asked, part) {
			t.Errorf("the classifier is not told %q: %s", part, asked)
		}
	}
	if strings.Contains(asked, "session_id") || strings.Contains(asked, "temperature") {
		t.Errorf("the classifier is sent %s", asked)
	}

	events := g.ledger(2)
	classifier, answered := events[0], events[1]
	if classifier.ParentID == "" {
		classifier, answered = answered, classifier
	}
	if classifier.Model != "paid/classifier" || classifier.ParentID != r.Header.Get("X-Request-Id") || classifier.Cost != 58_000 || classifier.SessionID != "s" {
		t.Errorf("%+v", classifier)
	}
	if answered.Model != "paid/small" || answered.RequestID != r.Header.Get("X-Request-Id") || answered.ParentID != "" || answered.Cost != 4_500_000 {
		t.Errorf("%+v", answered)
	}
	g.spent(events)
}

func TestAutoCountsAsOneRequest(t *testing.T) {
	up := routed(t, saying("paid/small"))
	g := startGateway(t, up.address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\trpm 2", 1))
	awayFromMinuteEnd(t)
	for want := range 2 {
		r := g.post(autoBody(""))
		if left := r.Header.Get("X-Ratelimit-Remaining-Requests"); r.StatusCode != 200 || left != fmt.Sprint(1-want) {
			t.Errorf("%s, %s requests left", r.Status, left)
		}
	}
	if r := g.post(autoBody("")); r.StatusCode != 429 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 4 {
		t.Errorf("%d calls: the one that was refused has been classified", n)
	}
}

func TestAutoStreamSaysInHeadersWhatTheBodyWouldSay(t *testing.T) {
	up := routed(t, saying("`paid/small`"))
	g := startGateway(t, up.address(), site(autoBlock))
	r := g.post(autoBody(`,"stream":true,"stream_options":{"include_usage":true}`))
	if r.Header.Get("X-Auto-Routed") != "true" || r.Header.Get("X-Resolved-Model-Id") != "paid/small" || r.Header.Get("X-Auto-Routed-Fallback") != "" {
		t.Errorf("%v", r.Header)
	}
	text := string(r.body)
	if !strings.HasPrefix(text, roleFrame+wordFrame+finishFrame+"data: {") || !strings.HasSuffix(text, "}\n\n"+doneFrame) ||
		!strings.Contains(text, `"classifier_prompt_tokens":50,"classifier_completion_tokens":4,"classifier_total_tokens":54,"classifier_cost":"0.000058"}`) ||
		!strings.Contains(text, `"cost":"`) || strings.Contains(text, "x_auto") {
		t.Errorf("%s", text)
	}
}

func TestAutoFallsBackOnTheDefault(t *testing.T) {
	const failing = "\tmodel bad/classifier broken\n\tupstream broken http://127.0.0.1:1/v1\n"
	for name, c := range map[string]struct {
		says  func(*http.Request) string
		block func(string) string
		want  fallbackReason
	}{
		"no candidate":    {says: saying("paid/huge"), want: reasonInvalid},
		"two of them":     {says: saying("either paid/small or test/code"), want: reasonInvalid},
		"nothing":         {says: saying(""), want: reasonInvalid},
		"not to be asked": {says: saying("paid/small"), want: reasonInvalid, block: func(s string) string { return strings.Replace(s, "candidate paid/small", "candidate paid/tiny", 1) }},
		"an upstream is down": {says: saying("paid/small"), want: reasonFailed, block: func(s string) string {
			return strings.Replace(s, "classifier paid/classifier", "classifier bad/classifier", 1)
		}},
		"late": {want: reasonTimeout, says: func(r *http.Request) string { <-r.Context().Done(); return "" },
			block: func(s string) string { return strings.Replace(s, "timeout 30s", "timeout 20ms", 1) }},
	} {
		t.Run(name, func(t *testing.T) {
			block := failing + autoBlock
			if c.block != nil {
				block = c.block(block)
			}
			g := startGateway(t, routed(t, c.says).address(), site(block))
			for _, stream := range []bool{false, true} {
				r := g.post(autoBody(fmt.Sprintf(`,"stream":%v`, stream)))
				if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "paid/large" || r.Header.Get("X-Auto-Routed-Fallback") != "true" ||
					r.Header.Get("X-Auto-Routed-Fallback-Reason") != string(c.want) || r.Header.Get("X-Resolved-Model-Id") != "paid/large" {
					t.Errorf("stream %v: %s %v", stream, r.Status, r.Header)
				}
				if stream {
					continue
				}
				if got := r.decode(t); got["x_auto_routed"] != true || got["x_auto_routed_fallback"] != true || got["x_auto_routed_fallback_reason"] != string(c.want) {
					t.Errorf("%s", r.body)
				}
			}
			g.spent(g.ledger(4))
		})
	}
}

func TestAutoChoosesOnlyWhatTheKeyMayUse(t *testing.T) {
	up := routed(t, saying("paid/small"))
	g := startGateway(t, up.address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\tmodels test/*", 1))
	r := g.post(autoBody(""))
	if r.StatusCode != 200 || r.decode(t)["x_resolved_model_id"] != "test/code" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("%d calls for a choice of one", n)
	}
	if e := g.ledger(1)[0]; e.Model != "test/code" {
		t.Errorf("%+v", e)
	}
}

func TestAutoWithoutAModelForTheKeyIsForbidden(t *testing.T) {
	g := startGateway(t, routed(t, saying("")).address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\tmodels test/plain", 1))
	if r := g.post(autoBody("")); r.StatusCode != 403 || r.errorCode(t) != "forbidden" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestAutoIsNoModelWhereItIsNotConfigured(t *testing.T) {
	g := startGateway(t, routed(t, saying("")).address(), site(""))
	if r := g.post(autoBody("")); r.StatusCode != 404 || r.errorCode(t) != "model_not_found" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := g.do(http.MethodPost, selectPath, `{"messages":[{"role":"user","content":"Hi"}]}`); r.StatusCode != 404 || r.errorCode(t) != "not_found" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestAutoIsInTheCatalogueOfThoseWhoMayUseIt(t *testing.T) {
	for name, c := range map[string]struct {
		site   string
		listed bool
	}{
		"all models":     {site(autoBlock), true},
		"one candidate":  {strings.Replace(site(autoBlock), "name tester", "name tester\n\t\tmodels test/code", 1), true},
		"no candidate":   {strings.Replace(site(autoBlock), "name tester", "name tester\n\t\tmodels test/plain", 1), false},
		"not configured": {site(""), false},
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, "127.0.0.1:1", c.site)
			status := map[bool]int{true: 200, false: 404}[c.listed]
			if r := g.do(http.MethodGet, modelsPath+"/auto", ""); r.StatusCode != status || c.listed && r.decode(t)["owned_by"] != "mesh" {
				t.Errorf("%s %s", r.Status, r.body)
			}
			for query, asked := range map[string]bool{"": true, "?type=text&provider=mesh&free=false": true, "/search?q=AUT": true, "?type=image": false, "/free": false} {
				r := g.do(http.MethodGet, modelsPath+query, "")
				if got := strings.Contains(string(r.body), `"id":"auto"`); got != (c.listed && asked) {
					t.Errorf("%s: %s", query, r.body)
				}
			}
		})
	}
}

func TestAutoMayBeADefaultModel(t *testing.T) {
	g := startGateway(t, routed(t, saying("test/code")).address(), strings.Replace(site(autoBlock), "default_model test/plain", "default_model auto", 1))
	if r := g.post(`{"messages":[{"role":"user","content":"Hi"}]}`); r.StatusCode != 200 || r.decode(t)["x_resolved_model_id"] != "test/code" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

// A hard cap sets aside what the dearest candidate can cost, and what the choice can.
func TestAutoKeepsAHardCap(t *testing.T) {
	const capped = "name tester\n\t\tspend_cap_usd %s hard"
	block := strings.Replace(autoBlock, "timeout 30s", "timeout 30s\n\t\tmax_tokens 10", 1)
	for amount, status := range map[string]int{"0.0001": 402, "1": 200} {
		up := routed(t, saying("test/code"))
		g := startGateway(t, up.address(), strings.Replace(site(block), "name tester", fmt.Sprintf(capped, amount), 1))
		r := g.post(autoBody(`,"max_tokens":100`))
		if r.StatusCode != status {
			t.Errorf("cap %s: %s %s", amount, r.Status, r.body)
		}
		if status == 200 && r.decode(t)["x_auto_routed_fallback"] != nil {
			t.Errorf("%s", r.body)
		}
		if n := len(up.received()); status == 402 && n != 0 {
			t.Errorf("%d calls of a request that was refused", n)
		}
	}
}

func TestClientThatLeavesDuringTheChoiceIsAskedForNothing(t *testing.T) {
	arrived := make(chan struct{}, 1)
	up := routed(t, func(r *http.Request) string {
		arrived <- struct{}{}
		<-r.Context().Done()
		return ""
	})
	g := startGateway(t, up.address(), site(autoBlock))
	g.leave(autoBody(""), 0, arrived)
	for _, e := range g.ledger(2) {
		if e.Outcome != OutcomeClientGone {
			t.Errorf("%+v", e)
		}
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("%d calls", n)
	}
}

func TestAutoTakesItsTimeFromTheRequests(t *testing.T) {
	up := routed(t, func(r *http.Request) string {
		select {
		case <-r.Context().Done():
		case <-time.After(300 * time.Millisecond):
		}
		return "test/code"
	})
	g := startGateway(t, up.address(), site(autoBlock))
	if r := g.post(autoBody(`,"timeout":0.2`)); r.StatusCode != 504 || r.errorCode(t) != "gateway_timeout" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if n := len(up.received()); n != 1 {
		t.Errorf("%d calls", n)
	}
}

func TestChoiceIsReadFromWhatModelsSay(t *testing.T) {
	names := []string{"openai/gpt-4o", "openai/gpt-4o-mini", "llama3:8b"}
	for answer, want := range map[string]string{
		"openai/gpt-4o low":               "openai/gpt-4o low",
		"openai/gpt-4o-mini":              "openai/gpt-4o-mini ",
		"**LLAMA3:8B**, High.":            "llama3:8b high",
		"Model: `openai/gpt-4o`":          "openai/gpt-4o ",
		"openai/gpt-4o none":              "openai/gpt-4o ",
		"llama3:8b, not openai/gpt-4o":    "llama3:8b ",
		"not openai/gpt-4o but llama3:8b": " ",
		"gpt-4o":                          " ",
		"":                                " ",
	} {
		model, effort := readChoice(answer, names)
		if got := model + " " + effort; got != want {
			t.Errorf("%q is read as %q, want %q", answer, got, want)
		}
	}
}

func TestClassifierIsShownTheFirstAndTheLastOfALongConversation(t *testing.T) {
	var messages []string
	for i := range 400 {
		messages = append(messages, fmt.Sprintf(`{"role":"user","content":"message %d %s"}`, i, strings.Repeat("ä", i%90)))
	}
	messages = append(messages, `{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,`+strings.Repeat("A", 1<<20)+
		`"}},{"type":"text","text":"What \"is\" this? `+strings.Repeat("ö", 50_000)+`END"}]}`)
	body := []byte("[" + strings.Join(messages, ",") + "]")
	shown := shownConversation(body, span{0, len(body)}, []byte(`{"role":"system","content":"Be brief.`))
	if len(shown) > maxShown+100 || !strings.HasPrefix(shown, `template: {"role":"system","content":"Be brief.`) ||
		!strings.Contains(shown, "message 399 ") || strings.Contains(shown, "message 100 ") || strings.Contains(shown, "AAAA") ||
		!strings.Contains(shown, `user: [image_url]What "is" this? ö`) || !strings.HasSuffix(shown, "ö…") && !strings.HasSuffix(shown, "ö") {
		t.Errorf("%d bytes: %.200s … %.200s", len(shown), shown, shown[max(0, len(shown)-200):])
	}
}

func (g *gateway) selectModel(body string, headers ...string) *reply {
	g.t.Helper()
	return g.do(http.MethodPost, selectPath, body, headers...)
}

func TestSelectNamesAModelAndAsksNoneForAnAnswer(t *testing.T) {
	up := routed(t, saying("paid/large high"))
	g := startGateway(t, up.address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\trpm 10", 1))
	const messages = `{"messages":[{"role":"user","content":"1+1?"}]`
	r := g.selectModel(messages + `,"api_type":"chat_completions"}`)
	if want := `{"model":"paid/large","reasoning_effort":"high","auto_router":{"fallback_used":false}}`; strings.TrimSpace(string(r.body)) != want {
		t.Errorf("%s %s, want %s", r.Status, r.body, want)
	}
	if left := r.Header.Get("X-Ratelimit-Remaining-Requests"); left != "9" {
		t.Errorf("%s requests left", left)
	}
	r = g.selectModel(messages + `,"exclude_models":["paid/large"]}`)
	if want := `{"model":"paid/small","reasoning_effort":null,"auto_router":{"fallback_used":true,"fallback_reason":"classifier_invalid"}}`; strings.TrimSpace(string(r.body)) != want {
		t.Errorf("%s %s, want %s", r.Status, r.body, want)
	}
	r = g.selectModel(messages + `,"candidate_models":["test/code"]}`)
	if want := `{"model":"test/code","reasoning_effort":null,"auto_router":{"fallback_used":false}}`; strings.TrimSpace(string(r.body)) != want {
		t.Errorf("%s %s, want %s", r.Status, r.body, want)
	}
	r = g.selectModel(messages + `,"candidate_models":["test/other","paid/large","test/other"]}`)
	if got := r.decode(t)["model"]; got != "paid/large" {
		t.Errorf("%s %s", r.Status, r.body)
	}
	for _, e := range g.ledger(3) {
		if e.Model != "paid/classifier" || e.ParentID != "" {
			t.Errorf("%+v", e)
		}
	}
}

func TestSelectIsFoundInTheLedgerByItsRequestID(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		g := startGateway(t, routed(t, saying("paid/large")).address(), strings.Replace(site(autoBlock), "store local $DIR/mesh.db", store, 1))
		id := g.selectModel(`{"messages":[{"role":"user","content":"1+1?"}]}`).Header.Get("X-Request-Id")
		var found struct {
			RequestID string `json:"request_id"`
			Event     struct {
				Model string
				Cost  Money `json:"cost_usd"`
			}
		}
		eventually(t, "the ledger has it", func() bool {
			r := g.do(http.MethodGet, requestsPath+id, "")
			return r.StatusCode == http.StatusOK && json.Unmarshal(r.body, &found) == nil
		})
		if found.RequestID != id || found.Event.Model != "paid/classifier" || found.Event.Cost != 58_000 {
			t.Errorf("%+v", found)
		}
	})
}

func TestSelectRefusesWhatItCannotChoose(t *testing.T) {
	up := routed(t, saying("paid/large high"))
	g := startGateway(t, up.address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\tmodels paid/*", 1))
	const messages = `{"messages":[{"role":"user","content":"1+1?"}]`
	for body, want := range map[string]string{
		messages + `,"candidate_models":["nobody/x"]}`:              "404 model_not_found candidate_models",
		messages + `,"candidate_models":["test/code"]}`:             "403 forbidden candidate_models",
		messages + `,"exclude_models":["paid/small","paid/large"]}`: "422 unprocessable_entity exclude_models",
		messages + `,"exclude_models":"paid/small"}`:                "422 validation_error exclude_models",
		messages + `,"candidate_models":[1]}`:                       "422 validation_error candidate_models[0]",
		messages + `,"api_type":1}`:                                 "422 validation_error api_type",
		`{"messages":[]}`:                                           "422 validation_error messages",
		`{}`:                                                        "422 validation_error messages",
		`[]`:                                                        "400 invalid_request <nil>",
		messages + `,"exclude_models":[` + strings.Repeat(`"a/b",`, maxSelectable) + `"a/b"]}`: "422 validation_error exclude_models",
	} {
		r := g.selectModel(body)
		e, _ := r.decode(t)["error"].(map[string]any)
		if got := fmt.Sprint(r.StatusCode, " ", e["code"], " ", e["param"]); got != want {
			t.Errorf("%.120s: %s, want %s", body, got, want)
		}
	}
	if r := g.selectModel(messages+"}", "Authorization", ""); r.StatusCode != 401 {
		t.Errorf("%s", r.Status)
	}
	if n := len(up.received()); n != 0 {
		t.Errorf("%d calls", n)
	}
}

func TestSelectIsLimitedAsAnyRequest(t *testing.T) {
	up := routed(t, saying("paid/large"))
	g := startGateway(t, up.address(), strings.Replace(site(autoBlock), "name tester", "name tester\n\t\trpd 1", 1))
	const body = `{"messages":[{"role":"user","content":"1+1?"}]}`
	if r := g.selectModel(body); r.StatusCode != 200 {
		t.Errorf("%s %s", r.Status, r.body)
	}
	if r := g.selectModel(body); r.StatusCode != 429 || r.Header.Get("Retry-After") == "" {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestChoicesAreCounted(t *testing.T) {
	var invalid atomic.Bool
	up := routed(t, func(*http.Request) string {
		if invalid.Load() {
			return "nobody"
		}
		return "paid/small"
	})
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site(autoBlock)))
	g := p.gateway()
	g.post(autoBody(""))
	invalid.Store(true)
	g.post(autoBody(""))
	got := p.metrics()
	for series, want := range map[string]float64{
		`auto_routes_total{model="paid/*",reason="chosen"}`:                         1,
		`auto_routes_total{model="paid/*",reason="classifier_invalid"}`:             1,
		`requests_total{model="paid/classifier",outcome="completed",upstream="up"}`: 2,
		`requests_total{model="paid/*",outcome="completed",upstream="up"}`:          2,
	} {
		if got["caddy_mesh_"+series] != want {
			t.Errorf("%s is %v, want %v", series, got["caddy_mesh_"+series], want)
		}
	}
}

func TestAutoMayChooseBetweenWordsAndImages(t *testing.T) {
	var painter atomic.Bool
	up := routed(t, func(*http.Request) string {
		if painter.Load() {
			return "test/painter"
		}
		return "test/code"
	})
	g := startGateway(t, up.address(), site(strings.Replace(autoBlock, "candidate test/code", "candidate test/painter \"paintings\"\n\t\tcandidate test/code", 1)+
		"\tmodel test/painter up {\n\t\ttype image\n\t}\n"))
	const body = `{"model":"auto","messages":[{"role":"user","content":"An otter"}]}`
	for _, want := range []string{"/v1/chat/completions", "/v1/images/generations"} {
		g.post(body) // the answer is that of a chat, which no images API would give
		if got := up.last(t).URL.Path; got != want {
			t.Errorf("%s, want %s", got, want)
		}
		painter.Store(true)
	}
}

func TestModelOfAJobIsChosenWhenItRuns(t *testing.T) {
	g := startGateway(t, routed(t, saying("paid/small")).address(), site(autoBlock))
	j := g.becomes(g.submit(autoBody(`,"async_mode":true`)), JobCompleted)
	if !strings.Contains(string(j.Response), `"x_resolved_model_id":"paid/small"`) {
		t.Errorf("%s", j.Response)
	}
	events := g.ledger(2)
	if sum := g.spent(events); sum != 4_500_000+58_000 {
		t.Errorf("%s for %+v", sum, events)
	}
}
