package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

// painter is a model that makes images.
const painter = `	model test/painter up {
		type image
		price 5.00 40.00
		price_image 0.01
	}`

const paint = `{"model":"test/painter","messages":[{"role":"user","content":"Two dots"}],"image":{"n":2}}`

// of images.json: 50 × 5 + 544 × 40, per million, and 0.01 for each of two
const paintCost = 42_010_000

const (
	redDot  = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGO45mkMAANLAVPby7YLAAAAAElFTkSuQmCC"
	blueDot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGMw9rwGAAIFAVPgJe1cAAAAAElFTkSuQmCC"
)

const dots = `{"role":"assistant","content":null,"images":[{"type":"image_url","image_url":{"url":"data:image/png;base64,` + redDot + `"}},` +
	`{"type":"image_url","image_url":{"url":"data:image/png;base64,` + blueDot + `"}}]}`

// completionID is that of an answer which the gateway has put into the form of a completion.
func completionID(r *reply) string {
	return "chatcmpl-" + strings.TrimPrefix(r.Header.Get("X-Request-Id"), "req_")
}

func TestImagesComeBackAsACompletion(t *testing.T) {
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site(painter))
	r := g.post(paint)
	want := `{"id":"` + completionID(r) + `","object":"chat.completion","created":1713833628,"model":"test/painter","choices":[{"index":0,"message":` +
		dots + `,"finish_reason":"stop"}],"usage":{"prompt_tokens":50,"completion_tokens":544,"total_tokens":594},"cost":"0.04201"}`
	if string(r.body) != want {
		t.Errorf("got  %s\nwant %s", r.body, want)
	}
	if r.Header.Get("Content-Length") != strconv.Itoa(len(want)) || r.Header.Get("Content-Type") != "application/json" ||
		r.Header.Get("X-Mesh-Routing-Model") != "test/painter" || r.Header.Get("X-Mesh-Routing-Attempts") != "1" {
		t.Errorf("%q", r.Header)
	}
	got := up.last(t)
	if got.URL.String() != "/v1/images/generations" || got.Header.Get("Authorization") != "Bearer sk-upstream" || got.ContentLength != int64(len(got.body)) {
		t.Errorf("asked at %s with %q", got.URL, got.Header)
	}
	if want := `{"model":"painter","prompt":"Two dots","n":2}`; string(got.body) != want {
		t.Errorf("the upstream received %s", got.body)
	}
	e := g.ledger(1)[0]
	if e.Images != 2 || e.PromptTokens != 50 || e.CompletionTokens != 544 || e.Cost != paintCost || e.Estimated || e.Outcome != OutcomeCompleted || e.TTFT == 0 {
		t.Errorf("%+v", e)
	}
	g.spent([]Event{e})
	report := g.do(http.MethodGet, "/v1/usage/requests/"+r.Header.Get("X-Request-Id"), "")
	if !strings.Contains(string(report.body), `"images":2`) {
		t.Errorf("%s", report.body)
	}
}

func TestEveryFormOfImagesIsRead(t *testing.T) {
	const dot = `{"type":"image_url","image_url":{"url":"%s"}}`
	for name, tc := range map[string]struct{ answer, content, images, usage string }{
		"a URL and another prompt": {`{"created":5,"data":[{"revised_prompt":"An \u006ftter","url":"https:\/\/x\/1?a=1&b=2","b64_json":null}]}`,
			`"An \u006ftter"`, fmt.Sprintf(dot, `https:\/\/x\/1?a=1&b=2`), "0 0 0"},
		"another format": {`{"data":[{"b64_json":"AA=="}],"output_format":"webp","created":5}`, `null`, fmt.Sprintf(dot, "data:image/webp;base64,AA=="), "0 0 0"},
		"a format that is none": {`{"data":[{"b64_json":"AA=="}],"output_format":"a\",\"b","created":5}`, `null`,
			fmt.Sprintf(dot, "data:image/png;base64,AA=="), "0 0 0"},
		"what its bytes say, whatever it is called": {`{"created":5,"data":[{"b64_json":"` + redDot + `"}],"output_format":"webp"}`, `null`,
			fmt.Sprintf(dot, "data:image/png;base64,"+redDot), "0 0 0"},
		"JPEG without a word": {`{"created":5,"data":[{"b64_json":"\/9j\/4AAQSkZJRgABAQAAAQ=="}]}`, `null`,
			fmt.Sprintf(dot, `data:image/jpeg;base64,\/9j\/4AAQSkZJRgABAQAAAQ==`), "0 0 0"},
		"WebP and GIF": {`{"created":5,"data":[{"b64_json":"UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASoBAAEAAgA0JaQAA3AA/vuUAAA="},{"b64_json":"R0lGODlhAQABAAAAACw="}]}`, `null`,
			fmt.Sprintf(dot, "data:image/webp;base64,UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASoBAAEAAgA0JaQAA3AA/vuUAAA=") + "," +
				fmt.Sprintf(dot, "data:image/gif;base64,R0lGODlhAQABAAAAACw="), "0 0 0"},
		"what is no image": {`{"created":5,"data":[{"b64_json":"PGh0bWw+"},{"b64_json":"%"}],"output_format":"jpeg"}`, `null`,
			fmt.Sprintf(dot, "data:image/jpeg;base64,PGh0bWw+") + "," + fmt.Sprintf(dot, "data:image/jpeg;base64,%"), "0 0 0"},
		"no sum": {`{"created":5,"data":[{"url":"u"}],"usage":{"input_tokens":3,"output_tokens":4}}`, `null`, fmt.Sprintf(dot, "u"), "3 4 7"},
		"usage that makes no sense": {`{"created":5,"data":[{"url":"u"}],"usage":{"input_tokens":-3,"output_tokens":"x","total_tokens":null}}`, `null`,
			fmt.Sprintf(dot, "u"), "0 0 0"},
		"some that came to nothing": {`{"created":5,"data":[null,{"revised_prompt":"a"},{"url":""},{"url":"u","revised_prompt":"b"}],"error":null}`, `"a"`,
			fmt.Sprintf(dot, "u"), "0 0 0"},
	} {
		made, ok := readImages([]byte(tc.answer))
		if !ok {
			t.Errorf("%s: it is none", name)
			continue
		}
		var prompt, answer, total int
		fmt.Sscan(tc.usage, &prompt, &answer, &total)
		want := fmt.Sprintf(`{"id":"i","object":"chat.completion","created":5,"model":"m","choices":[{"index":0,"message":`+
			`{"role":"assistant","content":%s,"images":[%s]},"finish_reason":"stop"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}`,
			tc.content, tc.images, prompt, answer, total)
		got := made.completion("i", "m", 0)
		if string(got) != want || !json.Valid(got) {
			t.Errorf("%s: got %s\nwant %s", name, got, want)
		}
		for event := range strings.SplitSeq(strings.TrimSuffix(string(made.chunks("i", "m", 0)), "data: [DONE]\n\n"), "\n\n") {
			if data := strings.TrimPrefix(event, "data: "); event != "" && !json.Valid([]byte(data)) {
				t.Errorf("%s: %s", name, data)
			}
		}
	}
	for _, answer := range []string{``, `[]`, `{}`, `{"data":[]}`, `{"data":null}`, `{"data":[{}]}`, `{"data":[{"url":"u"}]`, `{"data":[{"url":"u"}],"error":{}}`, `<html>`} {
		if _, ok := readImages([]byte(answer)); ok {
			t.Errorf("%q passes for images", answer)
		}
	}
	before := time.Now().Unix()
	made, _ := readImages([]byte(`{"data":[{"url":"u"}]}`))
	var dated struct{ Created int64 }
	if err := json.Unmarshal(made.completion("i", "m", 0), &dated); err != nil || dated.Created < before {
		t.Errorf("%v: made at %d, and now it is %d", err, dated.Created, before)
	}
}

// TestImagesWithoutUsageCostTheirPriceAlone has dall-e-3's answer, which reports no tokens. None are estimated.
func TestImagesWithoutUsageCostTheirPriceAlone(t *testing.T) {
	up := startUpstream(t, plays(t, "images_url.json"))
	g := startGateway(t, up.address(), site(painter+"\n\tmodel test/gift up {\n\t\ttype image\n\t}"))
	r := g.post(paint)
	var got struct {
		Cost    string
		Choices []struct {
			Message struct {
				Content string
				Images  []struct {
					ImageURL struct{ URL string } `json:"image_url"`
				}
			}
		}
	}
	if err := json.Unmarshal(r.body, &got); err != nil {
		t.Fatal(err)
	}
	if m := got.Choices[0].Message; got.Cost != "0.01" || m.Content != `A small otter – wet, cheerful – floats on its back in "calm" water.` ||
		!strings.HasSuffix(m.Images[0].ImageURL.URL, "&sig=a%2Bb%3D") {
		t.Errorf("%s", r.body)
	}
	if e := g.ledger(1)[0]; e.Images != 1 || e.PromptTokens != 0 || e.CompletionTokens != 0 || e.Cost != 10_000_000 || e.Estimated {
		t.Errorf("%+v", e)
	}
	if r := g.post(strings.Replace(paint, "painter", "gift", 1)); r.StatusCode != 200 || r.decode(t)["cost"] != nil {
		t.Errorf("without a price: %s", r.body)
	}
}

func TestImagesFallBackLikeEverythingElse(t *testing.T) {
	for name, first := range map[string]http.HandlerFunc{
		"failed":             answers(503, "application/json", bad),
		"no images":          answers(200, "application/json", `{"created":1,"data":[]}`),
		"a completion":       answers(200, "application/json", completion),
		"a stream":           answers(200, "text/event-stream", wordFrame+finishFrame+doneFrame),
		"an error as a 200":  answers(200, "application/json", `{"error":{"message":"overloaded","type":"server_error"}}`),
		"does not know them": answers(404, "application/json", `{"error":{"message":"no such model","code":"model_not_found"}}`),
	} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stream %t", name, stream), func(t *testing.T) {
				first := startUpstream(t, first)
				up := startUpstream(t, plays(t, "images.json"))
				g := startGateway(t, up.address(), site("\tupstream bad http://"+first.address()+"/v1\n"+painter+
					"\n\tmodel test/first bad {\n\t\tprice_image 9\n\t\tfallback test/painter\n\t}"))
				r := g.post(fmt.Sprintf(`{"model":"test/first","modality":"image","stream":%t,"image":{"n":2},%s}`, stream, msgs))
				if r.StatusCode != 200 || r.Header.Get("X-Mesh-Routing-Model") != "test/painter" || r.Header.Get("X-Mesh-Routing-Fallback") != "true" ||
					!strings.Contains(string(r.body), dots) {
					t.Errorf("%s %q %s", r.Status, r.Header, r.body)
				}
				for _, u := range []*upstream{first, up} {
					if got := u.last(t); got.URL.Path != "/v1/images/generations" || !strings.HasSuffix(string(got.body), `,"prompt":"hi","n":2}`) {
						t.Errorf("%s was sent %s", got.URL, got.body)
					}
				}
				if e := g.ledger(1)[0]; e.Cost != paintCost || e.Model != "test/painter" || len(e.Tried) != 1 {
					t.Errorf("%+v", e)
				}
			})
		}
	}
}

func TestRefusalOfImagesIsRelayed(t *testing.T) {
	up := startUpstream(t, answers(400, "application/json", `{"error":{"message":"Your request was rejected.","type":"image_generation_user_error","code":"moderation_blocked"}}`))
	g := startGateway(t, up.address(), site(painter))
	for _, body := range []string{paint, strings.Replace(paint, "{", `{"stream":true,`, 1)} {
		if r := g.post(body); r.StatusCode != 400 || r.errorCode(t) != "moderation_blocked" {
			t.Errorf("%s %s", r.Status, r.body)
		}
	}
	for _, e := range g.ledger(2) {
		if e.Cost != 0 || e.Images != 0 {
			t.Errorf("%+v", e)
		}
	}
}

func TestHedgeOfImagesLetsOneServe(t *testing.T) {
	first := startUpstream(t, hangs(""))
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site("\tupstream bad http://"+first.address()+"/v1\n\tmodel test/first {\n\t\ttype image\n\t\tupstream bad\n\t\tupstream up\n\t\thedge 50ms\n\t\tprice_image 0.01\n\t}"))
	for i, stream := range []bool{false, true} {
		r := g.post(fmt.Sprintf(`{"model":"test/first","stream":%t,%s}`, stream, msgs))
		if r.StatusCode != 200 || !strings.Contains(string(r.body), dots) {
			t.Errorf("%s %s", r.Status, r.body)
		}
		if e := g.ledger(i + 1)[i]; e.Images != 2 || e.Cost != 20_000_000 || e.Outcome != OutcomeCompleted {
			t.Errorf("%+v", e)
		}
	}
}

// TestDrainedImagesAreCharged has the client leave before they are made.
func TestDrainedImagesAreCharged(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream %t", stream), func(t *testing.T) {
			arrived, left := make(chan struct{}), make(chan struct{})
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				close(arrived)
				<-left
				time.Sleep(50 * time.Millisecond) // until the gateway knows
				plays(t, "images.json")(w, r)
			})
			g := startGateway(t, up.address(), strings.Replace(site(painter), "api_key sk-upstream", "on_hangup drain", 1))
			g.leave(strings.Replace(paint, "{", fmt.Sprintf(`{"stream":%t,`, stream), 1), 0, arrived)
			close(left)
			if e := g.ledger(1)[0]; e.Outcome != OutcomeClientGone || e.Cost != paintCost || e.Images != 2 || e.Estimated {
				t.Errorf("%+v", e)
			}
		})
	}
}

func TestClientThatLeavesBeforeImagesAreMadePaysForNone(t *testing.T) {
	arrived := make(chan struct{})
	up := startUpstream(t, func(_ http.ResponseWriter, r *http.Request) { close(arrived); <-r.Context().Done() })
	g := startGateway(t, up.address(), site(painter))
	g.leave(paint, 0, arrived)
	if e := g.ledger(1)[0]; e.Outcome != OutcomeClientGone || e.Cost != 0 || e.Images != 0 || e.PromptTokens != 0 {
		t.Errorf("%+v", e)
	}
}

func TestModelThatMakesImagesInItsChatIsLeftAlone(t *testing.T) {
	answer := `{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"` + longWords + `","images":[{"type":"image_url","image_url":{"url":"data:image/png;base64,` +
		strings.Repeat("AAAA", 5000) + `"}}]},"finish_reason":"stop"}]}`
	stream := `data: {"choices":[{"index":0,"delta":{"content":"` + longWords + `","images":[{"type":"image_url","image_url":{"url":"data:image/png;base64,` +
		strings.Repeat("AAAA", 5000) + `"}}]},"finish_reason":null}]}` + "\n\n" + finishFrame + doneFrame
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); strings.Contains(string(body), `"stream":true`) {
			sends(stream)(w, r)
			return
		}
		answers(200, "application/json", answer)(w, r)
	})
	g := startGateway(t, up.address(), site("\tmodel test/both up {\n\t\tprice 2.50 10.00\n\t\tprice_image 1\n\t\toutput_modalities text image\n\t}"))
	for body, want := range map[string]string{
		ask("test/both", `,"modalities":["text","image"]`):               answer,
		ask("test/both", `,"modalities":["text","image"],"stream":true`): stream,
	} {
		r := g.post(body)
		if got := up.last(t); string(r.body) != want || got.URL.Path != "/v1/chat/completions" || !strings.Contains(string(got.body), `"modalities":["text","image"]`) {
			t.Errorf("%s %s: %.200s", got.URL, got.body, r.body)
		}
	}
	for _, e := range g.ledger(2) {
		if e.CompletionTokens != 17 || !e.Estimated || e.Cost != 7*2500+17*10_000 || e.Images != 0 {
			t.Errorf("an image is no text: %+v", e)
		}
	}
}

func TestUpstreamMayHaveItsOwnPriceOfImages(t *testing.T) {
	dear := startUpstream(t, plays(t, "images.json"))
	up := startUpstream(t, plays(t, "images.json"))
	g := startGateway(t, up.address(), site("\texpose_upstream\n\tupstream dear http://"+dear.address()+"/v1\n\tmodel test/two {\n\t\ttype image\n\t\tpolicy cheapest\n"+
		"\t\tupstream dear price_image 0.08\n\t\tupstream up as x price 5 40 price_image 0.01\n\t}"))
	r := g.post(ask("test/two", ""))
	if r.Header.Get("X-Mesh-Upstream") != "up" || r.decode(t)["cost"] != "0.04201" {
		t.Errorf("%q %s", r.Header, r.body)
	}
}

func TestAnswerOfImagesIsBounded(t *testing.T) {
	a := newAnswer(nil, &chatRequest{images: new(imageCall)}, new(candidate))
	if _, err := a.Write(make([]byte, maxWhole)); err != nil {
		t.Error(err)
	}
	if _, err := a.Write([]byte("x")); err != errTooLong || a.fault != errTooLong {
		t.Errorf("%v, %v", err, a.fault)
	}
}
