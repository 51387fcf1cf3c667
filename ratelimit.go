package mesh

import (
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// admit asks the store to let the request through, and tells the client where its key stands.
func (x *exchange) admit(store Store) *apiError {
	limits := x.key.limits()
	verdict, err := store.Admit(x.r.Context(), Admission{
		KeyID:     x.key.id,
		RequestID: x.event.RequestID,
		Limits:    limits,
	})
	if err != nil {
		return x.storeFailed(err)
	}
	limits.describe(verdict, x.w.Header())
	return limits.refusal(verdict)
}

// refusal is the error for the limit that refused a request, or nil.
func (l Limits) refusal(v Verdict) *apiError {
	switch v.Refused {
	case LimitSpend:
		return errorf(http.StatusPaymentRequired, "spend_limit_exceeded",
			"This API key has spent %s USD of its cap of %s USD%s.", v.Spend, l.SpendCap, l.SpendPeriod.phrase())
	case LimitRPD:
		return rateLimited("day", l.RPD, v.Day.Reset)
	case LimitRPM:
		return rateLimited("minute", l.RPM, v.Minute.Reset)
	}
	return nil
}

func rateLimited(window string, limit int64, reset time.Duration) *apiError {
	e := errorf(http.StatusTooManyRequests, "rate_limit_exceeded",
		"Rate limit reached: %d requests per %s. Try again in %d s.", limit, window, seconds(reset))
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
// (draft-ietf-httpapi-ratelimit-headers-10) for both windows.
func (l Limits) describe(v Verdict, header http.Header) {
	var policy, state string
	add := func(name string, limit int64, length int, w Window) {
		if limit == 0 {
			return
		}
		if policy != "" {
			policy, state = policy+", ", state+", "
		}
		policy += fmt.Sprintf("%q;q=%d;w=%d", name, limit, length)
		state += fmt.Sprintf("%q;r=%d;t=%d", name, remaining(limit, w), seconds(w.Reset))
	}
	add("rpm", l.RPM, 60, v.Minute)
	add("rpd", l.RPD, 24*60*60, v.Day)
	if policy == "" {
		return
	}
	header.Set("RateLimit-Policy", policy)
	header.Set("RateLimit", state)
	if l.RPM == 0 {
		return
	}
	header.Set("X-Ratelimit-Limit-Requests", strconv.FormatInt(l.RPM, 10))
	header.Set("X-Ratelimit-Remaining-Requests", strconv.FormatInt(remaining(l.RPM, v.Minute), 10))
	header.Set("X-Ratelimit-Reset-Requests", strconv.Itoa(seconds(v.Minute.Reset))+"s")
}

// remaining is never negative: the limit may have been lowered within the window.
func remaining(limit int64, w Window) int64 { return max(0, limit-w.Used) }
