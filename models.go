package mesh

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
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

	About
}

// Target is one upstream of a model.
type Target struct {
	// The upstream's name.
	Upstream string `json:"upstream,omitempty"`

	// What the model is called there. Default: its name without the first part, so that `openai/gpt-4o` is `gpt-4o`.
	As string `json:"as,omitempty"`
}

// Price is what requests cost, in USD, as decimal strings. Tokens have a price per million.
type Price struct {
	// Tokens of the prompt.
	Input Money `json:"input"`

	// Tokens of the answer.
	Output Money `json:"output"`

	// Tokens of the prompt that the upstream had cached. Default: as input.
	Cached *Money `json:"cached,omitempty"`

	// Each request, whatever its tokens. Like a prompt's tokens, it is charged once an upstream has the request and
	// may charge for it. Default: nothing.
	Request Money `json:"request,omitempty"`
}

// free reports whether requests cost nothing at a price that is given.
func (p *Price) free() bool { return p != nil && p.Input == 0 && p.Output == 0 && p.Request == 0 }

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
	if p := m.Price; p != nil && (p.Input < 0 || p.Output < 0 || p.Request < 0 || p.Cached != nil && *p.Cached < 0) {
		return errors.New("price: an amount is negative")
	}
	if err := checkWords("transforms", m.Transforms, []string{middleOut}); err != nil {
		return err
	}
	if err := m.About.check(); err != nil {
		return err
	}
	seen := make(map[Target]bool, len(m.Targets))
	for _, t := range m.Targets {
		if t == nil {
			return errNull
		}
		if !upstreams[t.Upstream] {
			return wrongf(t, "there is no upstream %q", t.Upstream)
		}
		if seen[*t] {
			return wrongf(t, "upstream %s is given twice", t.Upstream)
		}
		seen[*t] = true
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
	patterns []*modelEntry // the longest first
	names    []*modelEntry // those with an exact name, in the configuration's order
}

// modelEntry is a model with its targets' upstreams at hand.
type modelEntry struct {
	*Model
	upstreams []*Upstream // one for each target
	series    []targetSeries
	book      *priceBook   // of a pattern; nil where there is none
	known     *listedModel // of a name, what the book says of it
}

func newModelTable(models []*Model, upstreams map[string]*Upstream) modelTable {
	t := modelTable{exact: make(map[string]*modelEntry, len(models))}
	for _, m := range models {
		e := &modelEntry{Model: m, series: make([]targetSeries, len(m.Targets))}
		for i, target := range m.Targets {
			e.upstreams = append(e.upstreams, upstreams[target.Upstream])
			e.series[i].model, e.series[i].upstream = m.Name, target.Upstream
		}
		if strings.HasSuffix(m.Name, "*") {
			t.patterns = append(t.patterns, e)
			continue
		}
		t.exact[m.Name] = e
		t.names = append(t.names, e)
	}
	slices.SortStableFunc(t.patterns, func(a, b *modelEntry) int { return cmp.Compare(len(b.Name), len(a.Name)) })
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
	for _, m := range t.patterns {
		if matches(m.Name, name) {
			return m
		}
	}
	return nil
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
}

// unpriced reports whether a model has no price, or, of a pattern, whether it may cover a name that has none.
func (t modelTable) unpriced(m *Model) bool {
	if e := t.exact[m.Name]; e != nil {
		price, _ := e.terms(m.Name)
		return price == nil
	}
	return m.Price == nil
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

// candidates returns the ways to serve a model under a name, in order of preference.
func (m *modelEntry) candidates(name string) []candidate {
	list := make([]candidate, len(m.Targets))
	price, context := m.terms(name)
	for i, t := range m.Targets {
		list[i] = candidate{model: name, price: price, upstream: m.upstreams[i], as: t.nameThere(name), context: context, middleOut: len(m.Transforms) > 0, series: &m.series[i]}
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
	name := cmp.Or(req.model, x.key.DefaultModel, req.templateModel, x.h.DefaultModel)
	entry, refusal := x.model(name)
	if entry != nil {
		x.event.Model = name
	}
	if refusal != nil {
		return nil, refusal
	}
	return entry.candidates(name), nil
}

// model returns the model of a name that the client asks for. One that the key may not use it returns too.
func (x *exchange) model(name string) (*modelEntry, *apiError) {
	entry := x.h.models.find(name)
	if entry == nil {
		return nil, modelNotFound(name)
	}
	if !x.key.allows(name) {
		return entry, errorf(http.StatusForbidden, "forbidden", "This API key may not use the model %q.", name)
	}
	return entry, nil
}

func modelNotFound(name string) *apiError {
	e := errorf(http.StatusNotFound, "model_not_found", "The model %.*q does not exist.", maxModelName, name)
	e.param = "model"
	return e
}
