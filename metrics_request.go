package mesh

import (
	"cmp"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// targetSeries are the metrics of one model at one upstream, looked up at its first request and never again.
type targetSeries struct {
	model, upstream string // as the configuration names them

	once       sync.Once
	requests   map[Outcome]prometheus.Counter
	attempts   map[result]prometheus.Counter
	fallbacks  prometheus.Counter
	tokens     tokenSeries
	cost       prometheus.Counter
	firstToken prometheus.Observer
	perToken   prometheus.Observer
	duration   prometheus.Observer
	streams    prometheus.Gauge
}

// outcomes are those of a request that this gateway settles itself.
var outcomes = []Outcome{OutcomeCompleted, OutcomeError, OutcomeTimeout, OutcomeCut, OutcomeClientGone}

// resolve looks the series up. They are there with 0 from then on, so that a rate sees the first of each outcome.
func (s *targetSeries) resolve() {
	s.once.Do(func() {
		m := collectors
		s.requests = make(map[Outcome]prometheus.Counter, len(outcomes))
		for _, o := range outcomes {
			s.requests[o] = m.requests.WithLabelValues(s.model, s.upstream, string(o))
		}
		s.attempts = make(map[result]prometheus.Counter, len(results))
		for _, r := range results {
			s.attempts[r] = m.attempts.WithLabelValues(s.upstream, string(r))
		}
		s.fallbacks = m.fallbacks.WithLabelValues(s.model)
		s.tokens = newTokenSeries(m.tokens, s.model)
		s.cost = m.cost.WithLabelValues(s.model)
		s.firstToken = m.firstToken.WithLabelValues(s.model, s.upstream)
		s.perToken = m.perToken.WithLabelValues(s.model, s.upstream)
		s.duration = m.duration.WithLabelValues(s.model, s.upstream)
		s.streams = m.streams.WithLabelValues(s.model, s.upstream)
	})
}

// tokenSeries count tokens by their kind.
type tokenSeries struct {
	prompt, cached, completion prometheus.Counter
}

func newTokenSeries(vec *prometheus.CounterVec, of string) tokenSeries {
	return tokenSeries{
		prompt:     vec.WithLabelValues(of, "prompt"),
		cached:     vec.WithLabelValues(of, "cached"),
		completion: vec.WithLabelValues(of, "completion"),
	}
}

func (s tokenSeries) add(e *Event) {
	s.prompt.Add(float64(e.PromptTokens))
	s.cached.Add(float64(e.CachedTokens))
	s.completion.Add(float64(e.CompletionTokens))
}

// usd returns an amount as metrics have it. They do not bill.
func (m Money) usd() float64 { return float64(m) / 1e9 }

// observe counts a request that has ended.
func (s *targetSeries) observe(e *Event) {
	if c := s.requests[e.Outcome]; c != nil {
		c.Inc()
	}
	if e.Attempts > 1 {
		s.fallbacks.Inc()
	}
	s.tokens.add(e)
	s.cost.Add(e.Cost.usd())
	s.duration.Observe(e.Duration.Seconds())
	if !e.Stream || e.TTFT == 0 || e.Images > 0 { // images come all at once, at the end
		return
	}
	s.firstToken.Observe(e.TTFT.Seconds())
	if n := e.CompletionTokens - 1; n > 0 {
		s.perToken.Observe((e.Duration - e.TTFT).Seconds() / float64(n))
	}
}

// count counts the request, whatever became of it.
func (x *exchange) count() {
	if x.streams != nil {
		x.streams.Dec()
	}
	e := &x.event
	if x.sum {
		x.trace.end(e)
		return
	}
	switch {
	case e.Outcome != outcomeRefused && x.series != nil: // it was let through, and an upstream was asked
		x.series.observe(e)
	case e.Outcome == outcomeRefused && e.Error != "":
		collectors.rejections.WithLabelValues(e.Error).Inc()
	}
	if m := x.h.Metrics; m != nil && m.PerKey && e.KeyID != "" {
		keysSeen.series(cmp.Or(e.KeyName, e.KeyID)).observe(e)
	}
	x.trace.end(e)
}

// opened counts the stream as open, until count.
func (x *exchange) opened(by *candidate) {
	if by.series == nil {
		return
	}
	by.series.resolve()
	x.streams = by.series.streams
	x.streams.Inc()
}

const (
	maxKeySeries = 1000 // keys that metrics tell apart
	otherKeys    = "other"
)

// keysSeen are the keys that metrics tell apart. Like the metrics themselves they are the process's.
var keysSeen keySet

type keySet struct {
	byLabel sync.Map   // label → *keySeries
	mu      sync.Mutex // for additions
	count   int
}

// series returns the metrics of a key, or those of all keys there is no room for.
func (k *keySet) series(label string) *keySeries {
	if found, ok := k.byLabel.Load(label); ok {
		return found.(*keySeries)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.count >= maxKeySeries {
		label = otherKeys
	}
	if found, ok := k.byLabel.Load(label); ok {
		return found.(*keySeries)
	}
	added := newKeySeries(label)
	k.byLabel.Store(label, added)
	k.count++
	return added
}

// keySeries are the metrics of one key.
type keySeries struct {
	label  string
	tokens tokenSeries
	cost   prometheus.Counter
}

// newKeySeries has the refusals that alerts are about begin with 0, as a rate does not see a series appear.
func newKeySeries(label string) *keySeries {
	for _, reason := range []string{"spend_limit_exceeded", "rate_limit_exceeded"} {
		collectors.keyRejections.WithLabelValues(label, reason)
	}
	return &keySeries{
		label:  label,
		tokens: newTokenSeries(collectors.keyTokens, label),
		cost:   collectors.keyCost.WithLabelValues(label),
	}
}

func (s *keySeries) observe(e *Event) {
	switch {
	case e.Outcome == outcomeRefused && e.Error != "":
		collectors.keyRejections.WithLabelValues(s.label, e.Error).Inc()
	case e.Attempts > 0:
		collectors.keyRequests.WithLabelValues(s.label, string(e.Outcome)).Inc()
		s.tokens.add(e)
		s.cost.Add(e.Cost.usd())
	}
}
