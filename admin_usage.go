package mesh

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// usageBy are what a report can be grouped by.
var usageBy = []string{"day", "model", "key", "owner", "session"}

// usageLine is one line of a report of all keys.
type usageLine struct {
	Day     string `json:"day,omitempty"`
	Model   string `json:"model,omitempty"`
	Key     string `json:"key,omitempty"` // its id
	KeyName string `json:"key_name,omitempty"`
	Owner   string `json:"owner,omitempty"`
	Session string `json:"session_id,omitempty"`
	usageTotals
}

// usageTable is a report of all keys.
type usageTable struct {
	From  time.Time   `json:"from"`
	To    time.Time   `json:"to"`
	By    []string    `json:"by"`
	Lines []usageLine `json:"lines"`
	Total usageTotals `json:"total"`
}

// adminUsage serves GET /mesh/usage: sums of all keys of a store. Its query parameters are from and to (times of RFC 3339,
// in whole hours, or dates; by default the last 30 days), by (day, model, key, owner and session, by commas), key (an id, or
// the name of one key), owner, model, session_id and status to have only those, and format (json or csv). By session, requests without one are left out.
func adminUsage(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return adminError(http.StatusMethodNotAllowed, "method not allowed")
	}
	a, err := parseAdminUsage(r)
	if err != nil {
		return err
	}
	ref, err := managedStore(r)
	if err != nil {
		return err
	}
	opened, err := ref.acquire()
	if err != nil {
		return adminStoreError(err)
	}
	defer ref.release() //nolint:errcheck // the store logs its end
	store, ok := opened.(UsageStore)
	if !ok {
		return adminError(http.StatusNotImplemented, "the store keeps no sums")
	}
	labels, err := store.UsageKeys(r.Context())
	if err != nil {
		return adminStoreError(err)
	}
	if manager, ok := opened.(KeyManager); ok && a.query.KeyID != "" {
		k := &keysRequest{KeyManager: manager, Request: r, handlers: handlersOf(ref)}
		if a.query.KeyID, err = k.reported(a.query.KeyID, labels); err != nil {
			return keysError(err)
		}
	}
	table, err := a.table(r, store, labels)
	if err != nil {
		return adminStoreError(err)
	}
	if a.csv {
		return table.writeCSV(w)
	}
	return writeJSON(w, http.StatusOK, table)
}

// adminReport is what an operator asks for.
type adminReport struct {
	usageRequest
	query UsageQuery
	by    []string
	owner string
	owned bool // only owner's
	csv   bool
}

func parseAdminUsage(r *http.Request) (*adminReport, error) {
	values := r.URL.Query()
	a := &adminReport{by: []string{"model"}}
	for name := range values {
		if !slices.Contains([]string{"from", "to", "by", "key", "owner", "model", "session_id", "status", "format", "store"}, name) {
			return nil, adminError(http.StatusBadRequest, "there is no parameter %q", name)
		}
	}
	if err := a.parseRange(values.Get("from"), values.Get("to")); err != nil {
		return nil, err
	}
	if values.Has("by") {
		a.by = strings.FieldsFunc(values.Get("by"), func(r rune) bool { return r == ',' || r == ' ' })
	}
	for _, by := range a.by {
		if !slices.Contains(usageBy, by) {
			return nil, adminError(http.StatusBadRequest, "by: %q is none of %s", by, strings.Join(usageBy, ", "))
		}
	}
	switch a.status = values.Get("status"); a.status {
	case "", "success", "error":
	default:
		return nil, adminError(http.StatusBadRequest, "status: %q is neither success nor error", a.status)
	}
	switch values.Get("format") {
	case "", "json":
	case "csv":
		a.csv = true
	default:
		return nil, adminError(http.StatusBadRequest, "format: %q is neither json nor csv", values.Get("format"))
	}
	a.model, a.sessionID = values.Get("model"), values.Get("session_id")
	a.owner, a.owned = values.Get("owner"), values.Has("owner")
	a.query = a.usageRequest.query(values.Get("key"))
	a.query.Sessions = a.query.Sessions || slices.Contains(a.by, "session")
	return a, nil
}

func (a *adminReport) parseRange(from, to string) (err error) {
	now := time.Now().UTC()
	a.since = now.Add(-30 * 24 * time.Hour).Truncate(24 * time.Hour)
	if from != "" {
		if a.since, err = parseReportTime(from, false); err != nil {
			return adminError(http.StatusBadRequest, "from: %w", err)
		}
	}
	last := now
	if to != "" {
		if last, err = parseReportTime(to, false); err != nil {
			return adminError(http.StatusBadRequest, "to: %w", err)
		}
		a.until, _ = parseReportTime(to, true)
	}
	if last.Before(a.since) && !a.until.After(a.since) { // of a day, all is in
		return adminError(http.StatusBadRequest, "from: %s is after to: %s",
			cmp.Or(from, a.since.Format(time.RFC3339)), cmp.Or(to, last.Format(time.RFC3339)))
	}
	return nil
}

// table adds up what is asked for.
func (a *adminReport) table(r *http.Request, store UsageStore, labels map[string]KeyLabel) (*usageTable, error) {
	type place struct{ day, model, key, owner, session string }
	sums := make(map[place]*usageSums)
	var total usageSums
	err := store.Usage(r.Context(), a.query, func(row UsageRow) {
		label := labels[row.KeyID]
		if a.owned && label.Owner != a.owner {
			return
		}
		wanted := a.wants(&row)
		if wanted.All.Requests == 0 {
			return
		}
		var at place
		for _, by := range a.by {
			switch by {
			case "day":
				at.day = row.Day
			case "model":
				at.model = row.Model
			case "key":
				at.key = row.KeyID
			case "owner":
				at.owner = label.Owner
			case "session":
				at.session = row.Session
			}
		}
		if sums[at] == nil {
			sums[at] = new(usageSums)
		}
		sums[at].add(wanted)
		total.add(wanted)
	})
	if err != nil {
		return nil, err
	}
	table := &usageTable{From: a.query.From, To: a.query.To, By: a.by, Lines: []usageLine{}, Total: total.totals()}
	for at, s := range sums {
		line := usageLine{Day: at.day, Model: at.model, Key: at.key, Owner: at.owner, Session: at.session, usageTotals: s.totals()}
		if at.key != "" {
			line.KeyName = labels[at.key].Name
		}
		table.Lines = append(table.Lines, line)
	}
	slices.SortFunc(table.Lines, func(a, b usageLine) int {
		for _, by := range table.By {
			if c := strings.Compare(a.cell(by), b.cell(by)); c != 0 {
				return c
			}
		}
		return 0
	})
	return table, nil
}

// cell returns what a line is about.
func (l *usageLine) cell(by string) string {
	switch by {
	case "day":
		return l.Day
	case "model":
		return l.Model
	case "key":
		return l.Key
	case "owner":
		return l.Owner
	}
	return l.Session
}

// writeCSV writes a line of names, and the lines.
func (t *usageTable) writeCSV(w http.ResponseWriter) error {
	w.Header().Set("Content-Type", "text/csv; charset=utf-8")
	out := csv.NewWriter(w)
	var header []string
	for _, by := range t.By {
		header = append(header, by)
		if by == "key" {
			header = append(header, "key_name")
		}
	}
	header = append(header, "requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")
	if err := out.Write(header); err != nil {
		return err
	}
	for _, l := range t.Lines {
		var cells []string
		for _, by := range t.By {
			cells = append(cells, plainCell(l.cell(by)))
			if by == "key" {
				cells = append(cells, plainCell(l.KeyName))
			}
		}
		for _, n := range []int64{l.TotalRequests, l.ErrorRequests, l.PromptTokens, l.CachedTokens, l.CompletionTokens} {
			cells = append(cells, strconv.FormatInt(n, 10))
		}
		if err := out.Write(append(cells, l.TotalCost.String())); err != nil {
			return err
		}
	}
	out.Flush()
	return out.Error()
}

// plainCell keeps spreadsheets from taking a text for a formula: clients choose what sessions and models are called.
func plainCell(s string) string {
	if s != "" && strings.ContainsRune("=+-@\t\r", rune(s[0])) {
		return "'" + s
	}
	return s
}

// cells are for a table that people read.
func (t usageTotals) cells() string {
	return fmt.Sprintf("%d\t%d\t%d\t%d\t%s", t.TotalRequests, t.ErrorRequests, t.PromptTokens, t.CompletionTokens, t.TotalCost)
}
