package mesh

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"
)

const (
	usagePath     = "/v1/usage"
	eventsPath    = usagePath + "/events"
	requestsPath  = usagePath + "/requests/"
	standingPath  = usagePath + "/rate-limits"
	defaultEvents = 50
	maxEventsPage = 200
	maxOffset     = 100_000
)

// usageRequest is a request for a report that has passed every check.
type usageRequest struct {
	since, until  time.Time // zero: no bound
	model         string
	status        string // success, error, or empty for both
	sessionID     string
	groups        []string
	limit, offset int
}

var usageFields = []string{"since", "until", "model", "status", "session_id", "group_by", "limit", "offset"}

// parseUsage reads and checks a request's body, which may be empty. All faults are reported at once.
func parseUsage(body []byte) (*usageRequest, *apiError) {
	u := &usageRequest{limit: defaultEvents}
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}}
	refusal := p.wholeObject(func(p *parser) { p.fields(usageFields, func(i int) { p.usageMember(usageFields[i], u) }) })
	if refusal != nil {
		return nil, refusal
	}
	if !u.since.IsZero() && !u.until.IsZero() && u.until.Before(u.since) {
		p.at("until").faultf("value_error", "Value error, until is before since")
	}
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	return u, nil
}

func (p *parser) usageMember(name string, u *usageRequest) {
	switch name {
	case "since":
		u.since = p.time(false)
	case "until":
		u.until = p.time(true)
	case "model":
		text, _ := p.text()
		u.model = string(text)
	case "status":
		u.status = p.oneOf("success", "error")
	case "session_id":
		u.sessionID = p.shortText(256)
	case "group_by":
		group := func(p *parser) { u.groups = append(u.groups, p.oneOf("day", "model", "session")) }
		if p.peek() == '[' {
			p.list(group)
		} else {
			group(p)
		}
	case "limit":
		if v, ok := p.number(rule{integer: true, min: 1, max: maxEventsPage}); ok {
			u.limit = int(v)
		}
	case "offset":
		if v, ok := p.number(rule{integer: true, max: maxOffset}); ok {
			u.offset = int(v)
		}
	}
}

// time reads a time of RFC 3339, or a date: its beginning, or its end.
func (p *parser) time(end bool) time.Time {
	text, ok := p.text()
	if !ok {
		return time.Time{}
	}
	t, err := parseReportTime(string(text), end)
	if err != nil {
		p.faultf("datetime_from_date_parsing", "Input should be a valid datetime or date, such as 2026-11-25T07:00:00Z or 2026-11-25")
	}
	return t
}

// parseReportTime reads a time, or a date in UTC: its beginning, or its end.
func parseReportTime(text string, end bool) (time.Time, error) {
	if day, err := time.Parse(time.DateOnly, text); err == nil {
		if end {
			day = day.Add(24 * time.Hour)
		}
		return day, nil
	}
	for _, form := range []string{time.RFC3339, "2006-01-02T15:04:05"} { // without a zone: UTC, as is all else here
		if t, err := time.Parse(form, text); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, errors.New(strconv.Quote(text) + " is neither a time of RFC 3339 nor a date, such as 2026-11-25")
}

// query returns the sums that the request needs: hours as a whole.
func (u *usageRequest) query(keyID string) UsageQuery {
	q := UsageQuery{KeyID: keyID, From: u.since.Truncate(time.Hour), To: u.until, Sessions: u.sessionID != "", SessionID: u.sessionID}
	if q.To.IsZero() {
		q.To = time.Now().UTC()
	}
	q.To = roundUp(q.To, time.Hour)
	return q
}

// wants returns of a row's sums those that the request asks for.
func (u *usageRequest) wants(row *UsageRow) usageSums {
	switch {
	case u.model != "" && row.Model != u.model:
		return usageSums{}
	case u.status == "success":
		return usageSums{All: row.succeeded()}
	case u.status == "error":
		return usageSums{All: row.Failed, Failed: row.Failed}
	}
	return row.usageSums
}

// usageTotals are sums as the API shows them.
type usageTotals struct {
	TotalRequests      int64 `json:"total_requests"`
	SuccessfulRequests int64 `json:"successful_requests"`
	ErrorRequests      int64 `json:"error_requests"`
	PromptTokens       int64 `json:"prompt_tokens"`
	CachedTokens       int64 `json:"cached_tokens"`
	CompletionTokens   int64 `json:"completion_tokens"`
	TotalTokens        int64 `json:"total_tokens"`
	TotalCost          Money `json:"total_cost_usd"`
}

func (s usageSums) totals() usageTotals {
	return usageTotals{
		TotalRequests:      s.All.Requests,
		SuccessfulRequests: s.All.Requests - s.Failed.Requests,
		ErrorRequests:      s.Failed.Requests,
		PromptTokens:       s.All.Prompt,
		CachedTokens:       s.All.Cached,
		CompletionTokens:   s.All.Completion,
		TotalTokens:        s.All.Prompt + s.All.Completion,
		TotalCost:          s.All.Cost,
	}
}

// usageGroup are the sums of one day, model or session.
type usageGroup struct {
	Day     string `json:"day,omitempty"`
	Model   string `json:"model,omitempty"`
	Session string `json:"session_id,omitempty"`
	usageTotals
}

// usageReport is the answer to POST /v1/usage.
type usageReport struct {
	Since *time.Time `json:"since"`
	Until *time.Time `json:"until"`
	usageTotals
	ByModel   []usageGroup `json:"by_model"`
	ByDay     []usageGroup `json:"by_day,omitempty"`
	BySession []usageGroup `json:"by_session,omitempty"`
}

// groupSums are sums by a name.
type groupSums map[string]*usageSums

func (g groupSums) add(name string, sums usageSums) {
	if g[name] == nil {
		g[name] = new(usageSums)
	}
	g[name].add(sums)
}

func (g groupSums) groups(named func(name string) usageGroup) []usageGroup {
	list := make([]usageGroup, 0, len(g))
	for _, name := range slices.Sorted(maps.Keys(g)) {
		if g[name].All.Requests == 0 {
			continue
		}
		group := named(name)
		group.usageTotals = g[name].totals()
		list = append(list, group)
	}
	return list
}

// report authenticates, reads what is asked for, and has the store that knows what was used answer it.
func (x *exchange) report(answer func(UsageStore, *usageRequest) *apiError) *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	u, refusal := x.readUsage()
	if refusal != nil {
		return refusal
	}
	opened, err := x.h.store.acquire()
	if err != nil {
		return x.storeFailed(err)
	}
	defer x.h.releaseStore()
	store, ok := opened.(UsageStore)
	if !ok {
		return errorf(http.StatusServiceUnavailable, "store_unavailable", "The gateway's store keeps no sums.")
	}
	return answer(store, u)
}

// readUsage reads what is asked for: by default, all there is.
func (x *exchange) readUsage() (*usageRequest, *apiError) {
	if x.r.Method == http.MethodGet || x.r.ContentLength == 0 {
		return &usageRequest{limit: defaultEvents}, nil
	}
	body, refusal := readBody(x.w, x.r, min(64<<10, x.h.MaxBodySize))
	if refusal != nil {
		return nil, refusal
	}
	x.taken = true
	return parseUsage(body)
}

// reportUsage serves POST /v1/usage.
func (x *exchange) reportUsage() *apiError { return x.report(x.sumUsage) }

func (x *exchange) sumUsage(store UsageStore, u *usageRequest) *apiError {
	var all usageSums
	models, days, sessions := make(groupSums), make(groupSums), make(groupSums)
	q := u.query(x.key.id)
	err := store.Usage(x.r.Context(), q, func(row UsageRow) {
		sums := u.wants(&row)
		all.add(sums)
		models.add(row.Model, sums)
		days.add(row.Day, sums)
		sessions.add(row.Session, sums)
	})
	if err == nil && slices.Contains(u.groups, "session") && !q.Sessions {
		clear(sessions)
		bySession := q
		bySession.Sessions = true
		err = store.Usage(x.r.Context(), bySession, func(row UsageRow) { sessions.add(row.Session, u.wants(&row)) })
	}
	if err != nil {
		return x.storeFailed(err)
	}
	report := &usageReport{usageTotals: all.totals(), ByModel: models.groups(func(name string) usageGroup { return usageGroup{Model: name} })}
	if !u.since.IsZero() {
		report.Since = &q.From
	}
	if !u.until.IsZero() {
		report.Until = &q.To
	}
	if slices.Contains(u.groups, "day") {
		report.ByDay = days.groups(func(name string) usageGroup { return usageGroup{Day: name} })
	}
	if slices.Contains(u.groups, "session") {
		report.BySession = sessions.groups(func(name string) usageGroup { return usageGroup{Session: name} })
	}
	return x.answer(report)
}

// metric is where a key stands with one limit.
type metric struct {
	Current any      `json:"current"` // a number, or an amount in USD
	Limit   any      `json:"limit"`   // null: none
	Percent *float64 `json:"pct"`
	Resets  *int     `json:"resets_in_seconds"` // null: never
}

// getStanding serves GET /v1/usage/rate-limits.
func (x *exchange) getStanding() *apiError { return x.report(x.standing) }

func (x *exchange) standing(store UsageStore, _ *usageRequest) *apiError {
	limits := x.key.limits()
	s, err := store.Standing(x.r.Context(), x.key.id, limits)
	if err != nil {
		return x.storeFailed(err)
	}
	return x.answer(struct {
		AsOf time.Time         `json:"as_of"`
		Key  map[string]metric `json:"key"`
	}{time.Now().UTC().Truncate(time.Millisecond), s.metrics(limits)})
}

func (s *Standing) metrics(l Limits) map[string]metric {
	in := func(d time.Duration) *int { n := seconds(d); return &n }
	metrics := map[string]metric{
		"rpm":   counted(s.Minute.Used, l.RPM, in(s.Minute.Reset)),
		"rpd":   counted(s.Day.Used, l.RPD, in(s.Day.Reset)),
		"spend": {Current: s.Spend, Percent: percent(int64(s.Spend), int64(l.SpendCap))},
	}
	spend := metrics["spend"]
	if l.SpendCap > 0 {
		spend.Limit = l.SpendCap
	}
	if s.Reset > 0 {
		spend.Resets = in(s.Reset)
	}
	metrics["spend"] = spend
	if l.TPM > 0 {
		metrics["tpm"] = counted(s.Tokens.Used, l.TPM, in(s.Tokens.Reset))
	}
	if l.MaxConcurrency > 0 {
		metrics["max_concurrency"] = counted(s.UnderWay, l.MaxConcurrency, nil)
	}
	return metrics
}

func counted(used, limit int64, resets *int) metric {
	m := metric{Current: used, Percent: percent(used, limit), Resets: resets}
	if limit > 0 {
		m.Limit = limit
	}
	return m
}

func percent(used, limit int64) *float64 {
	if limit <= 0 {
		return nil
	}
	p := float64(int64(float64(used)/float64(limit)*1e4)) / 100
	return &p
}
