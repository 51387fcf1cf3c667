package mesh

import (
	"context"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"
)

// eachStore calls fn for the gateway's own stores. Another's may still be open, for a stream that has not ended.
func (g *gateway) eachStore(fn func(*localStore)) {
	stores.Range(func(key, v any) bool {
		if strings.HasPrefix(key.(string), "local:"+g.dir+"/") {
			fn(v.(*localStore))
		}
		return true
	})
}

// ledger returns the entries of the gateway's store, the oldest first, once there are n.
func (g *gateway) ledger(n int) (events []Event) {
	g.t.Helper()
	eventually(g.t, "the ledger has its entries", func() bool {
		events = events[:0]
		g.eachStore(func(s *localStore) {
			if err := s.events(func(e Event) bool { events = append([]Event{e}, events...); return true }); err != nil {
				g.t.Fatal(err)
			}
		})
		return len(events) >= n
	})
	if len(events) != n {
		g.t.Fatalf("%d entries, want %d", len(events), n)
	}
	return events
}

// spent returns the sum of what the ledger says, and checks that the store's accounts say the same.
func (g *gateway) spent(events []Event) (sum Money) {
	g.t.Helper()
	keys := make(map[string]Money)
	for _, e := range events {
		keys[e.KeyID] += e.Cost
		sum += e.Cost
	}
	g.eachStore(func(s *localStore) {
		for key, want := range keys {
			if got := s.spend(key); got != want {
				g.t.Errorf("key %s has spent %s, and its ledger entries add up to %s", key, got, want)
			}
		}
	})
	return sum
}

const longWords = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "

func TestLedgerSaysHowEachRequestEnded(t *testing.T) {
	priced := strings.Replace(chatBody, "plain", "priced", 1)
	pricedStream := strings.Replace(streamBody, "plain", "priced", 1)
	words := `data: {"choices":[{"index":0,"delta":{"content":"` + longWords + `"},"finish_reason":null}]}` + "\n\n"
	for _, tc := range []struct {
		name    string
		request string
		answer  http.HandlerFunc
		want    Event // but for ids and times
	}{
		{"whole", priced, answers(200, "application/json", completion),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 1000, CachedTokens: 400, CompletionTokens: 200, Cost: 4_500_000}},
		{"a stream", pricedStream, answers(200, "text/event-stream", roleFrame+wordFrame+finishFrame+usageFrame+doneFrame),
			Event{Outcome: OutcomeCompleted, Status: 200, Stream: true, PromptTokens: 1000, CompletionTokens: 200, Cost: 4_500_000}},
		{"zeros are believed", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":0,"completion_tokens":0}}`),
			Event{Outcome: OutcomeCompleted, Status: 200}},
		// "Hi" is a token, three more go with the message and three with the answer; each of the sixteen words is a token,
		// and so is the space at the end
		{"no usage", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"`+longWords+`"}}]}`),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 7, CompletionTokens: 17, Estimated: true, Cost: 7*2500 + 17*10_000}},
		{"usage that makes no sense", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"`+longWords+`"}}],"usage":{"prompt_tokens":-1,"completion_tokens":1}}`),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 7, CompletionTokens: 17, Estimated: true, Cost: 7*2500 + 17*10_000}},
		{"more tokens than there can be", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"`+longWords+`"}}],"usage":{"prompt_tokens":9007199254740993,"completion_tokens":1}}`),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 7, CompletionTokens: 17, Estimated: true, Cost: 7*2500 + 17*10_000}},
		{"as many as there may be", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":1073741824,"completion_tokens":1}}`),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 1 << 30, CompletionTokens: 1, Cost: 1<<30*2500 + 10_000}},
		{"parts that are more than the whole", priced, answers(200, "application/json", `{"choices":[{"message":{"content":"x"}}],"usage":{`+
			`"prompt_tokens_details":{"cached_tokens":900,"audio_tokens":800},"completion_tokens_details":{"audio_tokens":1000},"prompt_tokens":10,"completion_tokens":20}}`),
			Event{Outcome: OutcomeCompleted, Status: 200, PromptTokens: 10, CachedTokens: 10, CompletionTokens: 20,
				PromptAudioTokens: 10, CompletionAudioTokens: 20, Cost: 10*2500 + 20*10_000}},
		{"cut by the upstream", pricedStream, func(w http.ResponseWriter, r *http.Request) {
			answers(200, "text/event-stream", words)(w, r)
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		},
			Event{Outcome: OutcomeCut, Status: 200, Stream: true, Error: "upstream_error", PromptTokens: 7, CompletionTokens: 17, Estimated: true, Cost: 7*2500 + 17*10_000}},
		{"the error of a stream is not charged", pricedStream, answers(200, "text/event-stream", words+"data: {\"error\":{\"message\":\""+longWords+"\"}}\n\n"),
			Event{Outcome: OutcomeError, Status: 200, Stream: true, Error: "upstream_error", PromptTokens: 7, CompletionTokens: 17, Estimated: true, Cost: 7*2500 + 17*10_000}},
		{"a stream that is only an error", pricedStream, answers(200, "text/event-stream", "data: {\"error\":{\"message\":\"no\"}}\n\n"),
			Event{Outcome: OutcomeError, Status: 200, Stream: true, Error: "upstream_error"}},
		{"refused by the upstream", priced, answers(400, "application/json", `{"error":{"message":"no","code":"bad_thing"}}`),
			Event{Outcome: OutcomeError, Status: 400, Error: "bad_thing", Tried: []Tried{{"test/priced", "up", "400"}}}},
		{"failed", priced, answers(500, "text/plain", `no`),
			Event{Outcome: OutcomeError, Status: 502, Error: "upstream_error", Tried: []Tried{{"test/priced", "up", "500"}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up := startUpstream(t, tc.answer)
			g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"))
			r := g.post(strings.Replace(tc.request, "{", `{"session_id":"s1",`, 1))
			e := g.ledger(1)[0]
			g.spent([]Event{e})
			if e.RequestID != r.Header.Get("X-Request-Id") || e.Time.Before(time.Now().Add(-time.Minute)) || e.Duration <= 0 {
				t.Errorf("%+v", e)
			}
			if (e.TTFT > 0) != (e.CompletionTokens > 0 || tc.name == "zeros are believed") {
				t.Errorf("time to the first token: %v", e.TTFT)
			}
			want := tc.want
			want.RequestID, want.Time, want.Duration, want.TTFT, want.KeyID = e.RequestID, e.Time, e.Duration, e.TTFT, e.KeyID
			want.KeyName, want.SessionID, want.Model, want.Upstream, want.Attempts = "tester", "s1", "test/priced", "up", 1
			if !reflect.DeepEqual(e, want) {
				t.Errorf("got  %+v\nwant %+v", e, want)
			}
		})
	}
}

func TestClientThatLeavesIsChargedWhatItWasSent(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer string
		want   int64 // tokens of the answer
	}{
		{"in the middle", `data: {"choices":[{"index":0,"delta":{"content":"` + longWords + `"}}]}` + "\n\n", 17},
		{"before the first byte", "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			arrived := make(chan struct{})
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				if tc.answer != "" {
					answers(200, "text/event-stream", tc.answer)(w, r)
					http.NewResponseController(w).Flush()
				}
				close(arrived)
				<-r.Context().Done()
			})
			g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}"))
			g.leave(strings.Replace(streamBody, "plain", "priced", 1), len(tc.answer), arrived)
			e := g.ledger(1)[0]
			if e.Outcome != OutcomeClientGone || !e.Estimated || e.PromptTokens != 7 || e.CompletionTokens != tc.want || e.Cost != Money(7*2500+tc.want*10_000) {
				t.Errorf("%+v", e)
			}
		})
	}
}

func TestClientThatLeavesBeforeTheUpstreamIsReachedPaysNothing(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", "mesh {\n\tstore local $DIR/mesh.db\n\tkey "+testKey+"\n\tupstream slow {\n\t\thandle {\n\t\t\treverse_proxy 192.0.2.1:9\n\t\t}\n\t}\n\tmodel test/* slow {\n\t\tprice 1 1\n\t}\n}")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/v1/chat/completions", strings.NewReader(chatBody))
	req.Header.Set("Authorization", "Bearer "+testKey)
	req.Header.Set("Content-Type", "application/json")
	if resp, err := http.DefaultClient.Do(req); err == nil {
		t.Skipf("192.0.2.1 answers here: %s", resp.Status) // a network that resets what it does not route
	}
	if e := g.ledger(1)[0]; e.Cost != 0 || e.Outcome == OutcomeCompleted {
		t.Errorf("%+v", e)
	}
}

func TestSpendCapRefusesOnceItIsReached(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 2.50 10.00\n\t}\n\tkey "+otherKey+" {\n\t\tspend_cap_usd 0.009 month\n\t\trpm 100\n\t}"))
	body := strings.Replace(chatBody, "plain", "priced", 1) // costs 0.0045
	for range 2 {
		if r := g.post(body, "Authorization", "Bearer "+otherKey); r.StatusCode != 200 {
			t.Fatalf("%s %s", r.Status, r.body)
		}
	}
	r := g.post(body, "Authorization", "Bearer "+otherKey)
	if r.StatusCode != 402 || r.errorCode(t) != "spend_limit_exceeded" || r.Header.Get("X-Ratelimit-Remaining-Requests") != "98" {
		t.Errorf("%s %q %s", r.Status, r.Header, r.body)
	}
	if got := g.spent(g.ledger(2)); got != 9_000_000 {
		t.Errorf("spent %s", got)
	}
	// and it is not forgotten by a reload
	g.load("http://$ADDRESS {\n" + site("\tkey "+otherKey+" {\n\t\tspend_cap_usd 0.009\n\t}") + "\n}\n")
	if r := g.post(chatBody, "Authorization", "Bearer "+otherKey); r.StatusCode != 402 {
		t.Errorf("after a reload: %s %s", r.Status, r.body)
	}
}

func TestSpendOfManyAtOnceAddsUp(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 0.0001006 0.0003\n\t}"))
	g.postAll(400, strings.Replace(chatBody, "plain", "priced", 1))
	// 1,000 tokens are 100.6 nano-dollars and 200 are 60, which is rounded to 161
	if got := g.spent(g.ledger(400)); got != 400*161 {
		t.Errorf("spent %s", got)
	}
	g.load("http://$ADDRESS {\n" + site("\tmodel test/priced up {\n\t\tprice 0.003 0.01\n\t}") + "\n}\n")
	g.postAll(400, strings.Replace(chatBody, "plain", "priced", 1))
	if got := g.spent(g.ledger(800)); got != 400*161+400*5000 {
		t.Errorf("spent %s", got)
	}
}
