package mesh

import (
	"net/http"
	"strings"
	"time"
)

// publicEvent is an entry of the ledger as its key's owner sees it.
type publicEvent struct {
	RequestID        string    `json:"request_id"`
	ComparisonID     string    `json:"comparison_id,omitempty"`
	ParentID         string    `json:"parent_id,omitempty"` // of the request whose model it chose
	SessionID        string    `json:"session_id,omitempty"`
	CreatedAt        time.Time `json:"created_at"` // when the request began
	Model            string    `json:"model"`
	Upstream         string    `json:"upstream,omitempty"`
	Stream           bool      `json:"stream"`
	Status           string    `json:"status"` // success or error
	StatusCode       int       `json:"status_code"`
	Outcome          Outcome   `json:"outcome"`
	ErrorCode        string    `json:"error_code,omitempty"`
	Attempts         int       `json:"attempts"`
	PromptTokens     int64     `json:"prompt_tokens"`
	CachedTokens     int64     `json:"cached_tokens"`
	CompletionTokens int64     `json:"completion_tokens"`
	TotalTokens      int64     `json:"total_tokens"`
	PromptAudio      int64     `json:"prompt_audio_tokens,omitempty"`
	CompletionAudio  int64     `json:"completion_audio_tokens,omitempty"`
	Images           int64     `json:"images,omitempty"`
	Estimated        bool      `json:"estimated"`
	Cost             Money     `json:"cost_usd"`
	LatencyMS        int64     `json:"latency_ms"`
	FirstByteMS      *int64    `json:"ttft_ms,omitempty"`
}

func (e *Event) began() time.Time {
	if began, ok := requestBegan(e.RequestID); ok {
		return began
	}
	return e.Time.Add(-e.Duration)
}

func (e *Event) status() string {
	if e.Outcome.failed() {
		return "error"
	}
	return "success"
}

func (x *exchange) public(e *Event) publicEvent {
	p := publicEvent{
		RequestID: e.RequestID, ComparisonID: e.ComparisonID, ParentID: e.ParentID, SessionID: e.SessionID, CreatedAt: e.began(), Model: e.Model, Stream: e.Stream,
		Status: e.status(), StatusCode: e.Status, Outcome: e.Outcome, ErrorCode: e.Error, Attempts: e.Attempts,
		PromptTokens: e.PromptTokens, CachedTokens: e.CachedTokens, CompletionTokens: e.CompletionTokens,
		TotalTokens: e.PromptTokens + e.CompletionTokens, PromptAudio: e.PromptAudioTokens, CompletionAudio: e.CompletionAudioTokens,
		Images: e.Images, Estimated: e.Estimated, Cost: e.Cost, LatencyMS: e.Duration.Milliseconds(),
	}
	if e.TTFT > 0 {
		ms := e.TTFT.Milliseconds()
		p.FirstByteMS = &ms
	}
	if x.h.ExposeUpstream {
		p.Upstream = e.Upstream
	}
	return p
}

// matches reports whether an event is one of those asked for, but for its time.
func (u *usageRequest) matches(e *Event) bool {
	return (u.model == "" || e.Model == u.model) && (u.status == "" || e.status() == u.status) && (u.sessionID == "" || e.SessionID == u.sessionID)
}

// listEvents serves POST /v1/usage/events.
func (x *exchange) listEvents() *apiError { return x.report(x.pageOfEvents) }

func (x *exchange) pageOfEvents(store UsageStore, u *usageRequest) *apiError {
	total, err := x.countEvents(store, u)
	if err != nil {
		return x.storeFailed(err)
	}
	events := []publicEvent{}
	if skip := u.offset; int64(skip) < total {
		err = x.eachEvent(store, u, u.since, u.until, func(e *Event) bool {
			if skip > 0 {
				skip--
				return true
			}
			events = append(events, x.public(e))
			return len(events) < u.limit
		})
	}
	if err != nil {
		return x.storeFailed(err)
	}
	return x.answer(struct {
		Events []publicEvent `json:"events"`
		Total  int64         `json:"total"`
		Limit  int           `json:"limit"`
		Offset int           `json:"offset"`
	}{events, total, u.limit, u.offset})
}

// eachEvent calls fn for the events asked for of a part of their time, until it returns false.
func (x *exchange) eachEvent(store UsageStore, u *usageRequest, from, to time.Time, fn func(*Event) bool) error {
	return store.KeyEvents(x.r.Context(), x.key.id, from, to, func(e *Event) bool { return !u.matches(e) || fn(e) })
}

// countEvents returns how many events are asked for. Whole hours have sums, which count those too that the ledger has dropped; what
// there is at both ends beside them is counted in the ledger.
func (x *exchange) countEvents(store UsageStore, u *usageRequest) (n int64, err error) {
	one := func(*Event) bool { n++; return true }
	from, to := u.whole(time.Now().UTC())
	if !from.Before(to) {
		err = x.eachEvent(store, u, u.since, u.until, one)
		return n, err
	}
	q := u.query(x.key.id)
	q.From, q.To = from, to
	err = store.Usage(x.r.Context(), q, func(row UsageRow) { n += u.wants(&row).All.Requests })
	if err == nil && u.since.Before(from) {
		err = x.eachEvent(store, u, u.since, from, one)
	}
	if err == nil && to.Before(u.until) {
		err = x.eachEvent(store, u, to, u.until, one)
	}
	return n, err
}

// whole returns the time asked for without what is less than a sum at its ends: than an hour, or where that is too long ago, than
// a day. Nothing has begun after now.
func (u *usageRequest) whole(now time.Time) (from, to time.Time) {
	unit := func(t time.Time) time.Duration {
		const day = 24 * time.Hour
		if u.sessionID == "" && now.Sub(t.Truncate(day)) > keptHours-time.Hour {
			return day
		}
		return time.Hour
	}
	from, to = roundUp(u.since, unit(u.since)), u.until.Truncate(unit(u.until))
	if u.until.IsZero() || !u.until.Before(now) {
		to = roundUp(now, time.Hour)
	}
	return from, to
}

// roundUp returns t, or the next time that is a multiple of unit.
func roundUp(t time.Time, unit time.Duration) time.Time {
	if whole := t.Truncate(unit); whole.Before(t) {
		return whole.Add(unit)
	}
	return t
}

// getEvent serves GET /v1/usage/requests/{request_id}.
func (x *exchange) getEvent() *apiError { return x.report(x.oneEvent) }

func (x *exchange) oneEvent(store UsageStore, _ *usageRequest) *apiError {
	id := strings.TrimPrefix(x.r.URL.Path, requestsPath)
	if _, ok := requestBegan(id); !ok {
		return requestNotFound(id)
	}
	e, err := store.KeyEvent(x.r.Context(), x.key.id, id)
	if err != nil {
		return x.storeFailed(err)
	}
	if e == nil {
		return requestNotFound(id)
	}
	return x.answer(struct {
		RequestID string      `json:"request_id"`
		Outcome   Outcome     `json:"outcome"`
		Event     publicEvent `json:"event"`
	}{e.RequestID, e.Outcome, x.public(e)})
}

func requestNotFound(id string) *apiError {
	return errorf(http.StatusNotFound, "not_found", "There is no request %.64q of this API key.", id)
}
