package mesh

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// postAll sends n requests, 100 at a time, and returns how many got each status.
func (g *gateway) postAll(n int, body string, headers ...string) map[int]int {
	g.t.Helper()
	var mu sync.Mutex
	got := make(map[int]int)
	turns := make(chan struct{}, 100)
	var wg sync.WaitGroup
	for range n {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			r := g.post(body, headers...)
			mu.Lock()
			defer mu.Unlock()
			got[r.StatusCode]++
		})
	}
	wg.Wait()
	return got
}

// awayFromMinuteEnd waits for the next minute where this one has less than 20 seconds left.
func awayFromMinuteEnd(t testing.TB) {
	t.Helper()
	if left := 60 - time.Now().Second(); left < 20 {
		t.Logf("waiting %d s for the next minute", left)
		time.Sleep(time.Duration(left) * time.Second)
	}
}

func TestExactlyAsManyPassAsTheLimitSays(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tkey "+otherKey+" {\n\t\trpm 60\n\t\trpd 1000\n\t}"))
	awayFromMinuteEnd(t)
	began := time.Now()
	var mu sync.Mutex
	got := make(map[int]int)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for range 500 {
		wg.Go(func() {
			<-start
			r := g.post(chatBody, "Authorization", "Bearer "+otherKey)
			mu.Lock()
			defer mu.Unlock()
			got[r.StatusCode]++
			if r.StatusCode != 429 {
				return
			}
			left := 60 - began.Second()
			after, err := strconv.Atoi(r.Header.Get("Retry-After"))
			if err != nil || after < 1 || after > left || r.errorCode(t) != "rate_limit_exceeded" {
				t.Errorf("Retry-After %q with %d s left: %s", r.Header.Get("Retry-After"), left, r.body)
			}
		})
	}
	close(start)
	wg.Wait()
	if got[200] != 60 || got[429] != 440 {
		t.Errorf("%v", got)
	}
	if n := len(up.received()); n != 60 {
		t.Errorf("the upstream received %d", n)
	}
	g.ledger(60)
	// what was refused counts nowhere: 940 are left of the day
	r := g.post(chatBody, "Authorization", "Bearer "+otherKey)
	if !strings.Contains(r.Header.Get("RateLimit"), `"rpd";r=940;`) {
		t.Errorf("RateLimit: %s", r.Header.Get("RateLimit"))
	}
}

func TestRateLimitHeaders(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tkey "+otherKey+" {\n\t\trpm 2\n\t\trpd 1000\n\t}\n\tkey rsk_01BX5ZZKBKACTAV9WEVGEMMVS0 {\n\t\trpd 5\n\t}"))
	awayFromMinuteEnd(t)
	r := g.post(chatBody, "Authorization", "Bearer "+otherKey)
	if r.Header.Get("RateLimit-Policy") != `"rpm";q=2;w=60, "rpd";q=1000;w=86400` ||
		r.Header.Get("x-ratelimit-limit-requests") != "2" || r.Header.Get("x-ratelimit-remaining-requests") != "1" {
		t.Errorf("%q", r.Header)
	}
	var minute, day int
	if n, err := fmt.Sscanf(r.Header.Get("RateLimit"), `"rpm";r=1;t=%d, "rpd";r=999;t=%d`, &minute, &day); n != 2 || minute < 1 || minute > 60 || day < 1 || day > 86400 {
		t.Errorf("RateLimit %q: %v", r.Header.Get("RateLimit"), err)
	}
	if reset := r.Header.Get("x-ratelimit-reset-requests"); reset != fmt.Sprint(minute)+"s" {
		t.Errorf("reset %s", reset)
	}
	// refused before it is counted
	for _, body := range []string{`{`, `{"messages":[]}`, `{"messages":[{"role":"user","content":"Hi"}],"model":"none"}`} {
		if r := g.post(body, "Authorization", "Bearer "+otherKey); r.StatusCode < 400 || r.Header.Get("RateLimit") != "" {
			t.Errorf("%s %q", r.Status, r.Header)
		}
	}
	if r = g.post(chatBody, "Authorization", "Bearer "+otherKey); r.StatusCode != 200 || r.Header.Get("x-ratelimit-remaining-requests") != "0" {
		t.Errorf("%s %q", r.Status, r.Header)
	}
	if r = g.post(chatBody, "Authorization", "Bearer "+otherKey); r.StatusCode != 429 || r.Header.Get("x-ratelimit-remaining-requests") != "0" {
		t.Errorf("%s %q", r.Status, r.Header)
	}
	// no limit, no headers; only one limit, only its headers
	if r = g.post(chatBody); r.Header.Get("RateLimit") != "" || r.Header.Get("x-ratelimit-limit-requests") != "" {
		t.Errorf("%q", r.Header)
	}
	r = g.post(chatBody, "Authorization", "Bearer rsk_01BX5ZZKBKACTAV9WEVGEMMVS0")
	if r.Header.Get("RateLimit-Policy") != `"rpd";q=5;w=86400` || r.Header.Get("x-ratelimit-limit-requests") != "" {
		t.Errorf("%q", r.Header)
	}
}

func TestSitesWithOneStoreShareTheirCounts(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site(""))
	other := freeAddress(t)
	limited := strings.Replace(site(""), "name tester", "name tester\n\t\trpd 3", 1)
	g.load("http://$ADDRESS {\n" + limited + "\n}\nhttp://" + other + " {\n" + limited + "\n}\n")
	first := *g
	second := gateway{t: t, url: "http://" + other}
	for i, g := range []gateway{first, second, first, second} {
		want := 200
		if i == 3 {
			want = 429
		}
		if r := g.post(chatBody); r.StatusCode != want {
			t.Errorf("request %d: %s", i, r.Status)
		}
	}
}

func TestCountsSurviveAReload(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	limited := strings.Replace(site(""), "name tester", "name tester\n\t\trpd 2", 1)
	g := startGateway(t, up.address(), limited)
	for i, want := range []int{200, 200, 429} {
		if r := g.post(chatBody); r.StatusCode != want {
			t.Errorf("request %d: %s", i, r.Status)
		}
		g.load("http://$ADDRESS {\n" + limited + fmt.Sprintf("\nheader X-Generation %d\n}\n", i))
	}
}

func TestHardCapIsNeverPassedAndNothingStaysReserved(t *testing.T) {
	s := openLocal(t, filepath.Join(t.TempDir(), "mesh.db"))
	testHardCap(t, s, func() Money { return s.spend("hard") })
	account := s.account("hard")
	account.mu.Lock()
	defer account.mu.Unlock()
	if account.reserved.sum != 0 || len(account.reserved.byRequest) != 0 {
		t.Errorf("reserved: %+v", account.reserved)
	}
}

// TestSoftCapIsPassedByWhatIsUnderWay has 200 requests at an upstream at once, with a cap that fits ten: all of them
// began below it. Spend passes the cap by what they cost, and by no more: the next request is refused.
func TestSoftCapIsPassedByWhatIsUnderWay(t *testing.T) {
	const n, cost = 200, 4_500_000
	var under sync.WaitGroup
	under.Add(n)
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		under.Done()
		under.Wait()
		answers(200, "application/json", completion)(w, r)
	})
	g := startGateway(t, up.address(), site(pricedModel+"\n\tkey "+otherKey+" {\n\t\tspend_cap_usd 0.045\n\t}"))
	body := strings.Replace(chatBody, "plain", "priced", 1)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if r := g.post(body, "Authorization", "Bearer "+otherKey); r.StatusCode != 200 {
				t.Errorf("%s %s", r.Status, r.body)
			}
		})
	}
	wg.Wait()
	if got := g.spent(g.ledger(n)); got != n*cost {
		t.Errorf("spent %s", got)
	}
	if r := g.post(body, "Authorization", "Bearer "+otherKey); r.StatusCode != 402 {
		t.Errorf("afterwards: %s", r.Status)
	}
}

// testHardCap runs 200 requests at once against a cap that has room for ten, over and over until nothing fits.
func testHardCap(t *testing.T, s Store, spend func() Money) {
	const limit, largest, cost = 1000, 100, 60
	limits := Limits{SpendCap: limit, Hard: true}
	var id atomic.Int64
	round := func() (admitted int64) {
		var count atomic.Int64
		var wg sync.WaitGroup
		var ids sync.Map
		for range 200 {
			wg.Go(func() {
				requestID := requestID(int(id.Add(1)))
				v, err := s.Admit(t.Context(), Admission{KeyID: "hard", RequestID: requestID, Limits: limits, MaxCost: largest})
				if err != nil {
					t.Error(err)
				}
				if v.Refused == "" {
					count.Add(1)
					ids.Store(requestID, true)
				}
			})
		}
		wg.Wait()
		before := spend()
		if got := count.Load(); int64(before)+got*largest > limit {
			t.Errorf("admitted %d with %d spent", got, before)
		}
		ids.Range(func(requestID, _ any) bool {
			s.Settle(Event{RequestID: requestID.(string), KeyID: "hard", Cost: cost})
			return true
		})
		eventually(t, "the settlements are charged", func() bool { return spend() == before+Money(count.Load()*cost) })
		return count.Load()
	}
	if got := round(); got != 10 {
		t.Errorf("the first round admitted %d, want 10", got)
	}
	for round() > 0 {
	}
	if got := spend(); got > limit || got < limit-largest {
		t.Errorf("spent %d of %d", got, limit)
	}
}

func TestLargestCost(t *testing.T) {
	price := &Price{Input: 1_000_000, Output: 10_000_000} // a nano-dollar a token, and ten
	for _, tc := range []struct {
		body    string
		price   *Price
		context int64
		want    Money // beyond the prompt's bytes and what is around them
		bounded bool
	}{
		{`{"max_tokens":7}`, price, 0, 70, true},
		{`{"max_completion_tokens":7}`, price, 0, 70, true},
		{`{"max_tokens":7,"max_completion_tokens":9}`, price, 0, 90, true},
		{`{"max_tokens":7,"n":3}`, price, 0, 210, true},
		{`{"max_tokens":7,"n":1e9}`, price, 0, 0, false},
		{`{}`, price, 0, 0, false},
		{`{"max_completion_tokens":"many"}`, price, 0, 0, false},
		{`{}`, price, 1000, 10000, true},
		{`{"max_tokens":5000}`, price, 1000, 10000, true},
		{`{}`, nil, 0, 0, true},
		{`{}`, &Price{}, 0, 0, true},
	} {
		body := tc.body[:len(tc.body)-1] + `,"messages":[{"role":"user","content":"Hi"}]}`
		body = strings.Replace(body, "{,", "{", 1)
		req, refusal := parseChat([]byte(body))
		if refusal != nil {
			t.Fatal(refusal)
		}
		got, bounded := req.maxCost([]candidate{{price: tc.price, context: tc.context}})
		want := tc.want
		if bounded && tc.price == price {
			want += Money(len(body) + maxTokensPerMessage + tokensPerAnswer)
		}
		if bounded != tc.bounded || bounded && got != want {
			t.Errorf("%s: %d, %t; want %d, %t", body, got, bounded, want, tc.bounded)
		}
	}
	media := `{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"file","file":{}}]}]}`
	req, refusal := parseChat([]byte(media))
	if refusal != nil {
		t.Fatal(refusal)
	}
	if _, bounded := req.maxCost([]candidate{{price: price}}); bounded {
		t.Error("a file of unknown size is bounded")
	}
	if got, bounded := req.maxCost([]candidate{{price: price, context: 500}}); !bounded || got != 510 {
		t.Errorf("a file in a context of 500: %d, %t", got, bounded)
	}
}

func TestHardCapRefusesWhatNothingBounds(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site("\tmodel test/priced up {\n\t\tprice 1 10\n\t}\n"+
		"\tkey "+otherKey+" {\n\t\tspend_cap_usd 0.01 hard\n\t}"))
	for bound, want := range map[string]int{
		"": 402, `"max_tokens":100000000,`: 402, `"max_tokens":1,`: 200, `"max_tokens":1,"max_completion_tokens":null,"n":1,`: 200,
		// what one upstream reads as the client meant it, and another does not
		`"max_tokens":1,"max_completion_tokens":"1000000",`: 402, `"max_tokens":1,"n":"9",`: 402,
		`"max_tokens":1,"MAX_COMPLETION_TOKENS":100000,`: 402, `"max_tokens":1,"N":100,`: 402,
	} {
		body := "{" + bound + `"model":"test/priced","messages":[{"role":"user","content":"Hi"}]}`
		r := g.post(body, "Authorization", "Bearer "+otherKey)
		if r.StatusCode != want || want == 402 && r.errorCode(t) != "spend_limit_exceeded" {
			t.Errorf("%s: %s %s", bound, r.Status, r.body)
		}
		if bound == "" && !strings.Contains(string(r.body), "max_tokens") {
			t.Errorf("does not say what helps: %s", r.body)
		}
	}
}

func TestExpectedAnswerIsTheAverageWithinWhatIsAllowed(t *testing.T) {
	var lately answerLength
	if got := lately.tokens(); got != firstAnswer {
		t.Errorf("before the first answer: %d", got)
	}
	lately.note(1000)
	if got := lately.tokens(); got != 1000 {
		t.Errorf("after one of 1000: %d", got)
	}
	for range 10 * averagedAnswers {
		lately.note(100)
	}
	if got := lately.tokens(); got < 100 || got > 110 {
		t.Errorf("after many of 100: %d", got)
	}
	for _, tc := range []struct {
		maxTokens, choices, context, want int64
	}{
		{0, 0, 0, 300},
		{1000, 0, 0, 300},
		{20, 0, 0, 20},
		{20, 4, 0, 80},
		{20, 1 << 40, 0, 300},
		{1 << 62, 128, 0, 300},
		{0, 0, 1050, 50},
		{0, 0, 500, 0},
	} {
		r := chatRequest{maxTokens: tc.maxTokens, choices: tc.choices}
		if got := r.expectedAnswer(candidate{context: tc.context}, 1000, 300); got != tc.want {
			t.Errorf("%+v: %d", tc, got)
		}
	}
}
