package mesh

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Model is a name that clients may ask for, or a pattern of names, and who serves it.
type Model struct {
	// The name as clients write it, `<provider>/<name>`; or, ending in `*`, every name that begins so. Of several
	// that match, an exact name wins, then the longest pattern.
	Name string `json:"name,omitempty"`

	// The upstreams that serve it, in order of preference.
	Targets []*Target `json:"upstreams,omitempty"`

	// What its requests cost. Default: what the files of prices say; without a price, its requests are free and their
	// answers carry no cost.
	Price *Price `json:"price,omitempty"`

	// How many tokens prompt and answer may have together. Default: what the files of prices say, or not known.
	ContextLength int64 `json:"context_length,omitempty"`

	// What is done to requests that do not say `transforms` themselves: `middle-out` takes messages out of the middle of a
	// conversation that is longer than context_length. Default: nothing.
	Transforms []string `json:"transforms,omitempty"`

	// Models to ask, in this order, where none of its upstreams answers and none of the models that the request names
	// itself; after each of them, its own fallbacks. One that the key may not use is left out.
	Fallback []string `json:"fallback,omitempty"`

	// In which order its upstreams are asked: `first`, as they are written; `weighted`, by chance; `least_latency`, by how
	// soon their answers have begun lately; `cheapest`, by what the request would cost there. Default: `first`.
	Policy string `json:"policy,omitempty"`

	// How soon the answer of each upstream has to begin. Default: the handler's.
	FirstByteTimeout caddy.Duration `json:"first_byte_timeout,omitempty"`

	// After how long without a sign of an answer the next upstream is asked too. The first that answers serves the request
	// and is charged for, the other is stopped; but a provider may bill what it had begun. Default: never.
	Hedge caddy.Duration `json:"hedge,omitempty"`

	About
}

// Target is one upstream of a model.
type Target struct {
	// The upstream's name.
	Upstream string `json:"upstream,omitempty"`

	// What the model is called there. Default: its name without the first part, so that `openai/gpt-4o` is `gpt-4o`.
	As string `json:"as,omitempty"`

	// How often it is the first to be asked, compared with the others, under the policy `weighted`. Default: 1.
	Weight int64 `json:"weight,omitempty"`

	// What requests cost there. Default: the model's price.
	Price *Price `json:"price,omitempty"`
}

// Price is what requests cost, in USD, as decimal strings. Tokens have a price per million.
type Price struct {
	// Tokens of the prompt.
	Input Money `json:"input"`

	// Tokens of the answer.
	Output Money `json:"output"`

	// Tokens of the prompt that the upstream had cached. Default: as input.
	Cached *Money `json:"cached,omitempty"`

	// Tokens of the prompt that are sound. Default: as input.
	AudioInput *Money `json:"audio_input,omitempty"`

	// Tokens of the answer that are sound. Default: as output.
	AudioOutput *Money `json:"audio_output,omitempty"`

	// Each request, whatever its tokens. Like a prompt's tokens, it is charged once an upstream has the request and
	// may charge for it. Default: nothing.
	Request Money `json:"request,omitempty"`

	// Each image that it makes for a request of the modality `image`, beside tokens. Default: nothing.
	Image Money `json:"image,omitempty"`
}

// free reports whether requests cost nothing at a price that is given.
func (p *Price) free() bool {
	return p != nil && p.dearestInput() == 0 && p.dearestOutput() == 0 && p.Request == 0 && p.Image == 0
}

func (m *Model) check(upstreams map[string]bool) error {
	if err := checkPattern(m.Name); err != nil {
		return err
	}
	if len(m.Targets) == 0 {
		return errors.New("no upstream serves it")
	}
	if m.ContextLength < 0 {
		return fmt.Errorf("context_length: %d is negative", m.ContextLength)
	}
	if err := m.Price.check(); err != nil {
		return fmt.Errorf("price: %w", err)
	}
	if err := checkPolicy(m.Policy); err != nil {
		return err
	}
	if m.Hedge < 0 {
		return fmt.Errorf("hedge: %s is negative", time.Duration(m.Hedge))
	}
	if m.FirstByteTimeout < 0 {
		return fmt.Errorf("first_byte_timeout: %s is negative", time.Duration(m.FirstByteTimeout))
	}
	if err := checkWords("transforms", m.Transforms, []string{middleOut}); err != nil {
		return err
	}
	if err := m.About.check(); err != nil {
		return err
	}
	type place struct{ upstream, as string }
	seen := make(map[place]bool, len(m.Targets))
	for _, t := range m.Targets {
		if t == nil {
			return errNull
		}
		if !upstreams[t.Upstream] {
			return wrongf(t, "there is no upstream %q", t.Upstream)
		}
		if seen[place{t.Upstream, t.As}] {
			return wrongf(t, "upstream %s is given twice", t.Upstream)
		}
		if err := t.Price.check(); err != nil {
			return wrongf(t, "upstream %s: price: %w", t.Upstream, err)
		}
		if t.Weight < 0 || t.Weight > maxWeight {
			return wrongf(t, "upstream %s: weight: %d is not between 1 and %d", t.Upstream, t.Weight, maxWeight)
		}
		seen[place{t.Upstream, t.As}] = true
	}
	return nil
}

// maxModelName is how many bytes the name of a model may have. Names that only a pattern covers come from clients,
// and go into headers, logs and the ledger.
const maxModelName = 256

func checkName(name string) error {
	switch {
	case name == "", strings.HasSuffix(name, "/"):
		return errors.New("a model needs a name")
	case len(name) > maxModelName:
		return fmt.Errorf("the name of a model may have %d bytes", maxModelName)
	case strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }):
		return fmt.Errorf("%q has white space or control characters in it", name)
	}
	return nil
}

// checkPattern checks the name of a model, or a pattern of names.
func checkPattern(pattern string) error {
	if err := checkName(pattern); err != nil {
		return err
	}
	if strings.Contains(strings.TrimSuffix(pattern, "*"), "*") {
		return fmt.Errorf("%q: a pattern has one *, at its end", pattern)
	}
	return nil
}

// matches reports whether a pattern covers a name.
func matches(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

// modelTable finds the model that serves a name.
type modelTable struct {
	exact    map[string]*modelEntry
	patterns map[string]*modelEntry // by what stands before the *
	lengths  []int                  // of the keys of patterns, the longest first
	names    []*modelEntry          // those with an exact name, in the configuration's order
	auto     bool                   // the gateway chooses where autoModel is asked for
}

// modelEntry is a model with its targets' upstreams at hand.
type modelEntry struct {
	*Model
	upstreams []*Upstream // one for each target
	series    []targetSeries
	book      *priceBook   // of a pattern; nil where there is none
	known     *listedModel // of a name, what the book says of it
	fallbacks []fallbackModel
}

func newModelTable(models []*Model, upstreams map[string]*Upstream) modelTable {
	t := modelTable{exact: make(map[string]*modelEntry, len(models)), patterns: make(map[string]*modelEntry)}
	for _, m := range models {
		e := &modelEntry{Model: m, series: make([]targetSeries, len(m.Targets))}
		for i, target := range m.Targets {
			e.upstreams = append(e.upstreams, upstreams[target.Upstream])
			e.series[i].model, e.series[i].upstream = m.Name, target.Upstream
		}
		if prefix, ok := strings.CutSuffix(m.Name, "*"); ok {
			t.patterns[prefix] = e
			t.lengths = append(t.lengths, len(prefix))
			continue
		}
		t.exact[m.Name] = e
		t.names = append(t.names, e)
	}
	slices.Sort(t.lengths)
	t.lengths = slices.Compact(t.lengths)
	slices.Reverse(t.lengths)
	t.linkFallbacks()
	return t
}

// addPrices gives the models what a book says of them.
func (t modelTable) addPrices(b *priceBook) {
	for _, m := range t.names {
		m.known = b.find(m.Name, m.Targets, m.upstreams)
	}
	for _, m := range t.patterns {
		m.book = b
	}
}

// find returns the model that serves a name, or nil.
func (t modelTable) find(name string) *modelEntry {
	if checkName(name) != nil {
		return nil
	}
	if m := t.exact[name]; m != nil {
		return m
	}
	return t.longestPattern(name)
}

// longestPattern returns the model of the longest pattern that covers a name, or nil.
func (t modelTable) longestPattern(name string) *modelEntry {
	for _, n := range t.lengths {
		if n > len(name) {
			continue
		}
		if m := t.patterns[name[:n]]; m != nil {
			return m
		}
	}
	return nil
}

// mayLead reports whether a name that begins so may lead to a model. An exact name, and a longer pattern, go before it.
func (t modelTable) mayLead(prefix string, m *Model) bool {
	if strings.HasPrefix(strings.TrimSuffix(m.Name, "*"), prefix) {
		return true
	}
	e := t.longestPattern(prefix)
	return e != nil && e.Model == m
}

// knows reports whether a name can be asked for.
func (t modelTable) knows(name string) bool {
	return t.auto && name == autoModel || t.find(name) != nil
}

// candidate is one way to serve a request.
type candidate struct {
	model     string // as clients call it
	price     *Price
	upstream  *Upstream
	as        string // what the upstream calls the model
	middleOut bool   // messages are left out of what does not fit
	context   int64  // how many tokens prompt and answer may have together; 0: not known
	series    *targetSeries

	weight    int64
	firstByte time.Duration // 0: the handler's
	hedge     time.Duration // 0: never
	measured  bool          // its latency decides on the order
}

// unpriced reports whether a model has no price, or, of a pattern, whether it may cover a name that has none.
func (t modelTable) unpriced(m *Model) bool {
	if e := t.exact[m.Name]; e != nil {
		return e.unpriced(m.Name)
	}
	return m.Price == nil && m.unpricedSomewhere()
}

// unpriced reports whether the model may cost nothing under a name.
func (m *modelEntry) unpriced(name string) bool {
	price, _ := m.terms(name)
	return price == nil && m.unpricedSomewhere()
}

// unpricedSomewhere reports whether an upstream lacks a price of its own for the model.
func (m *Model) unpricedSomewhere() bool {
	return slices.ContainsFunc(m.Targets, func(t *Target) bool { return t.Price == nil })
}

// listed returns what the price book says of the model under a name, or nil.
func (m *modelEntry) listed(name string) *listedModel {
	if m.book == nil {
		return m.known
	}
	return m.book.find(name, m.Targets, m.upstreams)
}

// terms returns the price and the context length of the model under a name: its own, or else those of the price book.
func (m *modelEntry) terms(name string) (price *Price, context int64) {
	price, context = m.Price, m.ContextLength
	if price != nil && context != 0 {
		return price, context
	}
	if l := m.listed(name); l != nil {
		return cmp.Or(price, l.price), cmp.Or(context, l.context)
	}
	return price, context
}

// maxWeight keeps sums of weights from overflowing.
const maxWeight = 1_000_000

// candidates returns the ways to serve a model under a name, in order of preference.
func (m *modelEntry) candidates(name string) []candidate {
	list := make([]candidate, len(m.Targets))
	price, context := m.terms(name)
	for i, t := range m.Targets {
		list[i] = candidate{
			model: name, price: cmp.Or(t.Price, price), upstream: m.upstreams[i], as: t.nameThere(name),
			context: context, middleOut: len(m.Transforms) > 0, series: &m.series[i], weight: max(t.Weight, 1),
			firstByte: time.Duration(m.FirstByteTimeout), hedge: time.Duration(m.Hedge), measured: m.Policy == policyLeastLatency,
		}
	}
	return list
}

func (t *Target) nameThere(name string) string {
	if t.As != "" {
		return t.As
	}
	if _, rest, ok := strings.Cut(name, "/"); ok {
		return rest
	}
	return name
}

// route finds who may serve a chat request.
func (x *exchange) route(req *chatRequest) ([]candidate, *apiError) {
	name := cmp.Or(req.model, x.key.DefaultModel, req.templateModel)
	if name == "" {
		if name = x.h.DefaultModel; !x.h.models.knows(name) {
			return nil, noModelNamed(name)
		}
	}
	if name == autoModel && x.h.Auto != nil {
		return x.routeAuto(req)
	}
	return x.routeTo(req, name)
}

// routeTo finds who may serve a chat request by a model's name.
func (x *exchange) routeTo(req *chatRequest, name string) ([]candidate, *apiError) {
	entry, refusal := x.model(name)
	if entry != nil {
		x.event.Model = name
	}
	if refusal != nil {
		return nil, refusal
	}
	if refusal := req.asImages(entry.kind(name)); refusal != nil {
		return nil, refusal
	}
	list := entry.candidates(name)
	x.order(entry.Policy, req, list)
	if len(req.fallbacks) == 0 && len(entry.fallbacks) == 0 {
		return list, nil
	}
	return x.withFallbacks(req, list, entry.fallbacks)
}

// model returns the model of a name that the client asks for. One that the key may not use it returns too.
func (x *exchange) model(name string) (*modelEntry, *apiError) {
	entry := x.h.models.find(name)
	if entry == nil {
		return nil, modelNotFound(name)
	}
	if !x.key.allows(name) {
		refusal := errorf(http.StatusForbidden, "forbidden", "This API key may not use the model %q.", name)
		refusal.model = name
		return entry, refusal
	}
	return entry, nil
}

func modelNotFound(name string) *apiError {
	e := errorf(http.StatusNotFound, "model_not_found", "The model %.*q does not exist.", maxModelName, name)
	e.param, e.model = "model", name[:min(len(name), maxModelName)]
	return e
}

// noModelNamed is for a request that names no model where the built-in default is none either.
func noModelNamed(preset string) *apiError {
	e := errorf(http.StatusNotFound, "model_not_found", "The request names no model, and the default one, %q, is not configured.", preset)
	e.param = "model"
	return e
}
