package mesh

import (
	"errors"
	"strconv"
	"time"
)

var errYear = errors.New("its time is in a year that JSON cannot say")

// finish makes e what a store settles, now if it does not say when, and encodes it.
func (e *Event) finish(now func() time.Time) ([]byte, error) {
	if e.Time.IsZero() {
		e.Time = now()
	}
	e.Time, e.Cost = e.Time.UTC(), max(e.Cost, 0)
	return encodeEvent(e)
}

// encodeEvent writes e as its tags say, without reflection: it is done for every request.
func encodeEvent(e *Event) ([]byte, error) {
	if !storable(e.KeyID) || !storable(e.RequestID) {
		return nil, errUnusableID
	}
	if year := e.Time.Year(); year < 0 || year > 9999 {
		return nil, errYear
	}
	o := objectWriter{buf: make([]byte, 0, 512)}
	o.text("request_id", e.RequestID)
	o.text("key_id", e.KeyID)
	o.textIfAny("key_name", e.KeyName)
	o.textIfAny("owner", e.Owner)
	o.textIfAny("session_id", e.SessionID)
	o.textIfAny("comparison_id", e.ComparisonID)
	o.textIfAny("parent_id", e.ParentID)
	o.name("time")
	o.buf = append(e.Time.AppendFormat(append(o.buf, '"'), time.RFC3339Nano), '"')
	o.number("duration_ns", int64(e.Duration))
	o.numberIfAny("ttft_ns", int64(e.TTFT))
	o.text("model", e.Model)
	o.textIfAny("upstream", e.Upstream)
	o.trueIf("stream", e.Stream)
	o.number("attempts", int64(e.Attempts))
	o.number("status", int64(e.Status))
	o.text("outcome", string(e.Outcome))
	o.textIfAny("error", e.Error)
	if len(e.Tried) > 0 {
		o.tried(e.Tried)
	}
	o.number("prompt_tokens", e.PromptTokens)
	o.numberIfAny("cached_tokens", e.CachedTokens)
	o.number("completion_tokens", e.CompletionTokens)
	o.numberIfAny("prompt_audio_tokens", e.PromptAudioTokens)
	o.numberIfAny("completion_audio_tokens", e.CompletionAudioTokens)
	o.numberIfAny("images", e.Images)
	o.trueIf("estimated", e.Estimated)
	o.money("cost_usd", e.Cost)
	if e.MaxCost != 0 {
		o.money("max_cost_usd", e.MaxCost)
	}
	return append(o.buf, '}'), nil
}

// objectWriter writes a JSON object, whose last brace is left to the caller. Names must not need escapes.
type objectWriter struct{ buf []byte }

func (o *objectWriter) name(name string) {
	separator := byte(',')
	if len(o.buf) == 0 {
		separator = '{'
	}
	o.buf = append(o.buf, separator, '"')
	o.buf = append(o.buf, name...)
	o.buf = append(o.buf, '"', ':')
}

func (o *objectWriter) text(name, value string) {
	o.name(name)
	o.buf = appendString(o.buf, value)
}

func (o *objectWriter) textIfAny(name, value string) {
	if value != "" {
		o.text(name, value)
	}
}

func (o *objectWriter) number(name string, value int64) {
	o.name(name)
	o.buf = strconv.AppendInt(o.buf, value, 10)
}

func (o *objectWriter) numberIfAny(name string, value int64) {
	if value != 0 {
		o.number(name, value)
	}
}

func (o *objectWriter) money(name string, amount Money) {
	o.name(name)
	o.buf = append(amount.append(append(o.buf, '"')), '"')
}

func (o *objectWriter) trueIf(name string, value bool) {
	if value {
		o.name(name)
		o.buf = append(o.buf, "true"...)
	}
}

// appendString appends a JSON string.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			encoded, _ := encodeJSON(s) // a string: cannot fail
			return append(b, encoded...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
