package mesh

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sumOf adds up one of the sums of all models, and counts the models that have one.
func sumOf(t *testing.T, usage map[string]string, name string) (sum int64, models int) {
	t.Helper()
	for field, value := range usage {
		if !strings.HasPrefix(field, name+" ") {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum, models = sum+n, models+1
	}
	return sum, models
}

func TestModelsThatClientsMakeUpHaveOneSumTogether(t *testing.T) {
	const limit, made = 200, 250 // as redis_settle.lua has it
	s := openStill(t, redisModule(t, startRedis(t).address))
	ctx := t.Context()
	name := func(i int) string { return fmt.Sprint("openai/made-up-", i) }
	request := func(i int) Event {
		return Event{
			RequestID: newRequestID(), KeyID: "key", SessionID: "s", Model: name(i), Outcome: OutcomeError,
			PromptTokens: 10, CachedTokens: 5, CompletionTokens: 2, Cost: Money(i),
		}
	}
	usage := func() map[string]string {
		return s.client.HGetAll(ctx, s.key("key", "usage:"+dayOfRequest(newRequestID()))).Val()
	}
	var cost, requests int64
	estimates := make([]Event, made)
	for i := range made {
		estimates[i] = request(i)
		admitRedis(t, s, Admission{KeyID: "key", RequestID: estimates[i].RequestID})
		enterNow(t, s, settlement{Kind: settleLost, Event: estimates[i]})
		again := request(i)
		enterNow(t, s, settlement{Kind: settleEvent, Event: again})
		cost += int64(2 * i)
		requests += 2
	}
	check := func(when string) {
		t.Helper()
		sums := usage()
		for field, want := range map[string]int64{
			"requests": requests, "errors": requests, "prompt_tokens": 10 * requests, "cached_tokens": 5 * requests,
			"completion_tokens": 2 * requests, "cost": cost,
		} {
			got, models := sumOf(t, sums, field)
			if got != want || models > limit+1 {
				t.Errorf("%s: %s are %d, want %d, in %d fields", when, field, got, want, models)
			}
		}
	}
	check("at first")
	for i, want := range map[int]string{0: "2", limit - 1: "2", limit: "", made - 1: ""} {
		if got := usage()["requests "+name(i)]; got != want {
			t.Errorf("%s has %q requests, want %q", name(i), got, want)
		}
	}
	others := int64(2 * (made - limit))
	if got := usage()["requests other models"]; got != strconv.FormatInt(others, 10) {
		t.Errorf("the others have %s requests, want %d", got, others)
	}
	if checkName("other models") == nil {
		t.Error("a model can have the name of the others")
	}

	// what replaces an estimate takes it away from where it was added, though its model would be counted elsewhere
	for _, i := range []int{made - 1, 7} {
		exact := estimates[i]
		exact.Cost = 1
		if exact.Model = name(7); i == 7 {
			exact.Model = name(made - 1)
		}
		enterNow(t, s, settlement{Kind: settleEvent, Event: exact})
		cost += 1 - int64(i)
	}
	check("after estimates were replaced")
	sums := usage()
	if sums["requests "+name(7)] != "2" || sums["requests other models"] != strconv.FormatInt(others, 10) {
		t.Errorf("7 has %s, others %s", sums["requests "+name(7)], sums["requests other models"])
	}
	var session usageSums
	q := UsageQuery{KeyID: "key", From: time.Now().Add(-time.Hour), To: time.Now(), Sessions: true, SessionID: "s"}
	if err := s.Usage(ctx, q, func(row UsageRow) { session.add(row.usageSums) }); err != nil || session.All.Requests != requests || int64(session.All.Cost) != cost {
		t.Errorf("%v, session: %+v", err, session)
	}
}
