package mesh

import (
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// admit asks the store to let the request through, and tells the client where its key stands.
func (x *exchange) admit(store Store, req *chatRequest, candidates []candidate) *apiError {
	limits := x.key.limits()
	if x.uncounted {
		limits = limits.spendOnly()
	}
	maxCost, unbounded := x.maxCost(req, candidates)
	if limits.Hard && unbounded != nil {
		return unbounded
	}
	verdict, err := x.askStore(store, Admission{
		KeyID:     x.key.id,
		RequestID: x.event.RequestID,
		Limits:    limits,
		MaxCost:   maxCost,
		Waited:    x.waited,
		Uncounted: x.uncounted,
		Keeps:     x.keeps,
		Pending:   x.pending(req, candidates, maxCost),
	})
	if err != nil {
		return x.storeFailed(err)
	}
	if verdict.Refused == LimitQueue {
		return errQueueFull
	}
	limits.describe(verdict, x.w.Header())
	x.noteCap(limits, verdict)
	return limits.refusal(verdict, maxCost)
}

const (
	firstTurnPause = 2 * time.Millisecond
	longestForTurn = 250 * time.Millisecond
)

// ask asks the store, and again where too many requests are under way: a client that sends one after another has the
// last byte of one a moment before the store hears that it has ended.
func (x *exchange) askStore(store Store, a Admission) (Verdict, error) {
	ctx := x.r.Context()
	for pause, waited := firstTurnPause, time.Duration(0); ; pause, waited = 2*pause, waited+pause {
		verdict, err := x.h.asks.ask(ctx, store, a)
		if err != nil || verdict.Refused != LimitConcurrency || verdict.void || waited >= longestForTurn {
			return verdict, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return verdict, nil
		}
	}
}

// errUnbounded is a 402, as a hard cap is what refuses the request, and says what would let it pass.
var errUnbounded = errorf(http.StatusPaymentRequired, "spend_limit_exceeded",
	"This API key has a hard spend cap, and nothing bounds what this request can cost. Set max_tokens.")

func (r *chatRequest) unbounded() *apiError {
	if r.images != nil {
		return errUnboundedImages
	}
	return errUnbounded
}

// maxCost returns the most that the request can cost, or why nothing bounds that.
func (x *exchange) maxCost(req *chatRequest, candidates []candidate) (most Money, unbounded *apiError) {
	if a := x.auto; a != nil {
		return a.maxCost, a.unbounded
	}
	most, bounded := req.maxCost(candidates)
	if !bounded {
		return 0, req.unbounded()
	}
	return most, nil
}

// maxCost returns the most that the request can cost at any of the candidates, and whether there is such a bound. No
// tokenizer makes more tokens of a text than it has bytes, and all text there is stands in the body. What an image, a
// sound or a file costs is known only to the upstream, so that a prompt with one is bounded by the model's context alone.
func (r *chatRequest) maxCost(candidates []candidate) (most Money, bounded bool) {
	if r.choices > maxChoices || r.vague {
		return 0, false
	}
	for _, c := range candidates {
		if c.price == nil {
			continue
		}
		if r.images != nil {
			cost, bounded := r.images.maxCost(&c)
			if !bounded {
				return 0, false
			}
			most = max(most, cost)
			continue
		}
		prompt := int64(len(r.body)+r.added) + int64(r.prompt.messages)*maxTokensPerMessage + tokensPerAnswer
		if c.context > 0 && (r.prompt.media || prompt > c.context) {
			prompt = c.context
		} else if r.prompt.media && c.price.dearestInput() > 0 {
			return 0, false
		}
		answer := r.maxTokens
		if c.context > 0 && (answer == 0 || answer > c.context) {
			answer = c.context
		}
		if answer == 0 && c.price.dearestOutput() > 0 {
			return 0, false
		}
		var cost tokenCost
		cost.add(prompt, c.price.dearestInput())
		for range max(r.choices, 1) {
			cost.add(answer, c.price.dearestOutput())
		}
		most = max(most, cost.round().plus(c.price.Request))
	}
	return most, true
}

const (
	// maxTokensPerMessage bounds what the role and the marks around a message take beside its text.
	maxTokensPerMessage = 16

	// maxChoices is the most answers that a bounded request may ask for: OpenAI's own limit of n.
	maxChoices = 128
)

// pending is what is charged for the request if this process dies before it is settled, at the price of the candidate
// that is asked first: the prompt, by the rule of thumb, as counting tokens takes too long for here, and an answer as
// long as this handler's have been on average lately, or as long as it may be if that is less. What a process that dies
// has under way then costs about as much as it will be charged for, though each request for itself may be far off. The
// prompt alone would always be too little; maxCost, the most that the request can cost if it is known, almost always far
// too much, and is there for who has to correct an entry.
func (x *exchange) pending(req *chatRequest, candidates []candidate, maxCost Money) Event {
	e, first := x.event, candidates[0]
	expected := req.expected(first, x.h.answers.tokens())
	e.use(expected)
	e.Cost = first.price.cost(expected)
	if e.MaxCost = maxCost; maxCost > 0 {
		e.Cost = min(e.Cost, maxCost)
	}
	e.Outcome, e.Estimated = OutcomeLost, true
	return e
}

// expected returns about what the request will use at a candidate, where answers have an average number of tokens.
func (r *chatRequest) expected(c candidate, average int64) usage {
	if r.images != nil {
		return usage{images: r.images.count}
	}
	prompt := r.prompt.quickEstimate()
	if r.wantsMiddleOut(&c) {
		prompt = min(prompt, c.context)
	}
	return usage{prompt: prompt, completion: r.expectedAnswer(c, prompt, average)}
}

// expectedAnswer returns about how many tokens the answer will have: the average, within what the request and the
// model's context allow.
func (r *chatRequest) expectedAnswer(c candidate, prompt, average int64) int64 {
	if r.maxTokens > 0 && r.maxTokens < average {
		average = min(average, r.maxTokens*min(max(r.choices, 1), maxChoices))
	}
	if c.context > 0 {
		average = min(average, max(0, c.context-prompt))
	}
	return average
}

// spendOnly returns the limits without those that are not about money.
func (l Limits) spendOnly() Limits {
	return Limits{SpendCap: l.SpendCap, SpendPeriod: l.SpendPeriod, Hard: l.Hard}
}

// refusal is the error for the limit that refused a request of a largest cost, or nil.
func (l Limits) refusal(v Verdict, maxCost Money) *apiError {
	switch v.Refused {
	case LimitSpend:
		if l.Hard && v.Spend < l.SpendCap {
			return errorf(http.StatusPaymentRequired, "spend_limit_exceeded",
				"This request can cost up to %s USD. This API key has spent %s USD of its hard cap of %s USD%s, and requests under way may need the rest.",
				maxCost, v.Spend, l.SpendCap, l.SpendPeriod.phrase())
		}
		return errorf(http.StatusPaymentRequired, "spend_limit_exceeded",
			"This API key has spent %s USD of its cap of %s USD%s.", v.Spend, l.SpendCap, l.SpendPeriod.phrase())
	case LimitRPD:
		return rateLimited(l.RPD, "requests per day", v.Day.Reset)
	case LimitRPM:
		return rateLimited(l.RPM, "requests per minute", v.Minute.Reset)
	case LimitTPM:
		return rateLimited(l.TPM, "tokens per minute", v.Tokens.Reset)
	case LimitConcurrency:
		return rateLimited(l.MaxConcurrency, "requests at the same time", time.Second)
	}
	return nil
}

func rateLimited(limit int64, of string, reset time.Duration) *apiError {
	e := errorf(http.StatusTooManyRequests, "rate_limit_exceeded",
		"Rate limit reached: %d %s. Try again in %d s.", limit, of, seconds(reset))
	e.retryAfter = reset
	return e
}

func (p Period) check() error {
	switch p {
	case "", PeriodTotal, PeriodMonth, PeriodDay:
		return nil
	}
	return fmt.Errorf("spend period %q is none of total, month and day", p)
}

func (p Period) phrase() string {
	switch p {
	case PeriodDay:
		return " for this day (UTC)"
	case PeriodMonth:
		return " for this month (UTC)"
	}
	return ""
}

// describe sets the rate limit headers: those OpenAI's clients know for the minute, and those of the IETF's draft
// (draft-ietf-httpapi-ratelimit-headers-10) for all windows.
func (l Limits) describe(v Verdict, header http.Header) {
	if l.RPM == 0 && l.RPD == 0 && l.TPM == 0 {
		return
	}
	policy, state := make([]byte, 0, 64), make([]byte, 0, 64)
	add := func(name string, limit, length int64, w Window) {
		if limit == 0 {
			return
		}
		if len(policy) > 0 {
			policy, state = append(policy, ", "...), append(state, ", "...)
		}
		policy = strconv.AppendInt(append(append(policy, name...), ";q="...), limit, 10)
		policy = strconv.AppendInt(append(policy, ";w="...), length, 10)
		state = strconv.AppendInt(append(append(state, name...), ";r="...), remaining(limit, w), 10)
		state = strconv.AppendInt(append(state, ";t="...), int64(seconds(w.Reset)), 10)
	}
	add(`"rpm"`, l.RPM, secondsPerMinute, v.Minute)
	add(`"rpd"`, l.RPD, secondsPerDay, v.Day)
	add(`"tpm"`, l.TPM, secondsPerMinute, v.Tokens)
	header.Set("Ratelimit-Policy", string(policy))
	header.Set("Ratelimit", string(state))
	if l.RPM > 0 {
		header.Set("X-Ratelimit-Limit-Requests", strconv.FormatInt(l.RPM, 10))
		header.Set("X-Ratelimit-Remaining-Requests", strconv.FormatInt(remaining(l.RPM, v.Minute), 10))
		header.Set("X-Ratelimit-Reset-Requests", strconv.Itoa(seconds(v.Minute.Reset))+"s")
	}
	if l.TPM > 0 {
		header.Set("X-Ratelimit-Limit-Tokens", strconv.FormatInt(l.TPM, 10))
		header.Set("X-Ratelimit-Remaining-Tokens", strconv.FormatInt(remaining(l.TPM, v.Tokens), 10))
		header.Set("X-Ratelimit-Reset-Tokens", strconv.Itoa(seconds(v.Tokens.Reset))+"s")
	}
}

// remaining is never negative: the limit may have been lowered within the window.
func remaining(limit int64, w Window) int64 { return max(0, limit-w.Used) }
