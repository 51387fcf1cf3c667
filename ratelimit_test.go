package mesh

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
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
