package mesh

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// pendingOf returns the only request that is pending in a Redis, and what it has reserved.
func pendingOf(t *testing.T, server *redisServer) (e Event, reserved string) {
	t.Helper()
	client := server.client()
	eventually(t, "a request is pending", func() bool { return len(client.Keys(t.Context(), "mesh:{*}:pending").Val()) == 1 })
	for _, entry := range client.HVals(t.Context(), client.Keys(t.Context(), "mesh:{*}:pending").Val()[0]).Val() {
		_, e, _ = parsePending(entry)
		reserved = strings.Fields(entry)[2]
	}
	return e, reserved
}

// TestPendingRequestSaysWhatItWillAndWhatItMayCost looks at a request while its upstream takes its time.
func TestPendingRequestSaysWhatItWillAndWhatItMayCost(t *testing.T) {
	for name, tc := range map[string]struct {
		bound, cap string
		answer     int64 // tokens
		reserved   string
	}{
		"unbounded":          {"", "", 200, "0"},
		"bounded":            {`"max_tokens":1000,`, "", 200, "0"},
		"bounded closely":    {`"max_tokens":7,`, "", 7, "0"},
		"under a hard cap":   {`"max_tokens":1000,`, "spend_cap_usd 1 hard", 200, "max"},
		"with more than 128": {`"max_tokens":10,"n":1000,`, "", 200, "0"},
	} {
		t.Run(name, func(t *testing.T) {
			server := startRedis(t)
			release := make(chan struct{})
			slow := strings.Replace(chatBody, `{"model`, `{`+tc.bound+`"seed":1,"model`, 1)
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				if body, _ := io.ReadAll(r.Body); strings.Contains(string(body), `"seed"`) {
					<-release
				}
				answers(200, "application/json", completion)(w, r)
			})
			g := startGateway(t, up.address(), strings.NewReplacer(
				"store local $DIR/mesh.db", "store redis "+server.address+" {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t}",
				"model test/* up", "model test/* up {\n\t\tprice 1 10\n\t}", // 1,000 and 10,000 nano-dollars a token
				"name tester", "name tester\n\t\t"+tc.cap,
			).Replace(site("")))
			if r := g.post(strings.Replace(chatBody, `{"model`, `{"max_tokens":200,"model`, 1)); r.StatusCode != 200 { // is 200 tokens long
				t.Fatalf("%s %s", r.Status, r.body)
			}
			var answered sync.WaitGroup
			answered.Go(func() { g.post(slow) })
			defer answered.Wait()
			defer close(release)
			eventually(t, "the request is at the upstream", func() bool { return len(up.received()) == 2 })
			client := server.client()
			eventually(t, "the first is settled", func() bool {
				return client.HLen(t.Context(), client.Keys(t.Context(), "mesh:{*}:pending").Val()[0]).Val() == 1
			})
			e, reserved := pendingOf(t, server)
			var most Money
			if n := map[string]Money{"bounded": 1000, "bounded closely": 7, "under a hard cap": 1000}[name]; n > 0 {
				most = Money(len(slow)+maxTokensPerMessage+tokensPerAnswer)*1000 + n*10_000
			}
			if want := "0"; tc.reserved == "max" && reserved != strconv.FormatInt(int64(most), 10) || tc.reserved != "max" && reserved != want {
				t.Errorf("reserved %s", reserved)
			}
			const prompt = 2/bytesPerToken + tokensPerMessage + tokensPerAnswer
			if e.PromptTokens != prompt || e.CompletionTokens != tc.answer || e.Cost != Money(prompt*1000+tc.answer*10_000) || e.MaxCost != most {
				t.Errorf("%+v; want %d and %d tokens, at most %s", e, prompt, tc.answer, most)
			}
		})
	}
}
