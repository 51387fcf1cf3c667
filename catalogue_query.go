package mesh

import (
	"net/url"
	"strconv"
	"strings"
)

// modelQuery is what a client wants of the catalogue. Empty fields ask for everything.
type modelQuery struct {
	free      *bool
	kind      string
	provider  string
	text      string // lower case
	limit     int64
	offset    int64
	faults    []fault
	parameter url.Values
}

const (
	defaultSearchLimit = 50
	maxSearchLimit     = 200
)

// newModelQuery reads the filters free, type and provider. What is wrong with them is in its faults.
func newModelQuery(parameters url.Values) *modelQuery {
	q := &modelQuery{parameter: parameters}
	q.free = q.boolean("free")
	q.kind, _ = q.value("type")
	q.provider, _ = q.value("provider")
	return q
}

// newModelSearch reads the filters, and q, limit and offset.
func newModelSearch(parameters url.Values) *modelQuery {
	q := newModelQuery(parameters)
	text, _ := q.value("q")
	q.text = strings.ToLower(strings.TrimSpace(text))
	q.limit = q.whole("limit", defaultSearchLimit, 1, maxSearchLimit)
	q.offset = q.whole("offset", 0, 0, 1<<53)
	return q
}

// value returns a parameter; of one that is given more than once, the last, as pydantic's frameworks do.
func (q *modelQuery) value(name string) (value string, given bool) {
	values := q.parameter[name]
	if len(values) == 0 {
		return "", false
	}
	return values[len(values)-1], true
}

func (q *modelQuery) fault(name, kind, msg string) {
	q.faults = append(q.faults, fault{Type: kind, Loc: []any{"query", name}, Msg: msg})
}

// boolean reads what pydantic takes for a boolean.
func (q *modelQuery) boolean(name string) *bool {
	text, given := q.value(name)
	if !given {
		return nil
	}
	var v bool
	switch strings.ToLower(text) {
	case "true", "t", "yes", "y", "on", "1":
		v = true
	case "false", "f", "no", "n", "off", "0":
	default:
		q.fault(name, "bool_parsing", "Input should be a valid boolean, unable to interpret input")
		return nil
	}
	return &v
}

func (q *modelQuery) whole(name string, absent, low, high int64) int64 {
	text, given := q.value(name)
	if !given {
		return absent
	}
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	switch {
	case err != nil:
		q.fault(name, "int_parsing", "Input should be a valid integer, unable to parse string as an integer")
	case n < low:
		q.fault(name, "greater_than_equal", "Input should be greater than or equal to "+strconv.FormatInt(low, 10))
	case n > high:
		q.fault(name, "less_than_equal", "Input should be less than or equal to "+strconv.FormatInt(high, 10))
	default:
		return n
	}
	return absent
}

// matches reports whether q asks for an entry. Text is looked for in the name that requests use and in what people
// call it.
func (q *modelQuery) matches(e *catalogueEntry) bool {
	return (q.free == nil || *q.free == e.IsFree) &&
		(q.kind == "" || q.kind == e.ModelType) &&
		(q.provider == "" || q.provider == e.OwnedBy) &&
		(q.text == "" || strings.Contains(strings.ToLower(e.ID), q.text) || strings.Contains(strings.ToLower(e.Name), q.text))
}
