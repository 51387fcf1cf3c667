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

	// What its tokens cost. Without a price, its requests are free and their answers carry no cost.
	Price *Price `json:"price,omitempty"`

	// How many tokens prompt and answer may have together. Default: not known.
	ContextLength int64 `json:"context_length,omitempty"`

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
}

// Target is one upstream of a model.
type Target struct {
	// The upstream's name.
	Upstream string `json:"upstream,omitempty"`

	// What the model is called there. Default: its name without the first part, so that `openai/gpt-4o` is `gpt-4o`.
	As string `json:"as,omitempty"`

	// How often it is the first to be asked, compared with the others, under the policy `weighted`. Default: 1.
	Weight int64 `json:"weight,omitempty"`

	// What tokens cost there. Default: the model's price.
	Price *Price `json:"price,omitempty"`
}

// Price is what tokens cost, in USD per million, as decimal strings.
type Price struct {
	// Tokens of the prompt.
	Input Money `json:"input"`

	// Tokens of the answer.
	Output Money `json:"output"`

	// Tokens of the prompt that the upstream had cached. Default: as input.
	Cached *Money `json:"cached,omitempty"`
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
}

// modelEntry is a model with its targets' upstreams at hand.
type modelEntry struct {
	*Model
	upstreams []*Upstream // one for each target
	series    []targetSeries
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

// find returns the model that serves a name, or nil.
func (t modelTable) find(name string) *modelEntry {
	if checkName(name) != nil {
		return nil
	}
	if m := t.exact[name]; m != nil {
		return m
	}
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

// candidate is one way to serve a request.
type candidate struct {
	model    string // as clients call it
	price    *Price
	upstream *Upstream
	as       string // what the upstream calls the model
	context  int64  // how many tokens prompt and answer may have together; 0: not known
	series   *targetSeries

	weight    int64
	firstByte time.Duration // 0: the handler's
	hedge     time.Duration // 0: never
	measured  bool          // its latency decides on the order
}

// maxWeight keeps sums of weights from overflowing.
const maxWeight = 1_000_000

// candidates returns the ways to serve a model under a name, in order of preference.
func (m *modelEntry) candidates(name string) []candidate {
	list := make([]candidate, len(m.Targets))
	for i, t := range m.Targets {
		list[i] = candidate{
			model: name, price: cmp.Or(t.Price, m.Price), upstream: m.upstreams[i], as: t.nameThere(name),
			context: m.ContextLength, series: &m.series[i], weight: max(t.Weight, 1),
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
	name := cmp.Or(req.model, x.key.DefaultModel, req.templateModel, x.h.DefaultModel)
	entry, refusal := x.find(name)
	if entry != nil {
		x.event.Model = name
	}
	if refusal != nil {
		return nil, refusal
	}
	list := entry.candidates(name)
	x.order(entry.Policy, req, list)
	if len(req.fallbacks) == 0 && len(entry.fallbacks) == 0 {
		return list, nil
	}
	return x.withFallbacks(req, list, entry.fallbacks)
}

// find returns the model of a name that the client asks for. One that the key may not use it returns too.
func (x *exchange) find(name string) (*modelEntry, *apiError) {
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

// catalogueEntry is a model as the API lists it.
type catalogueEntry struct {
	ID            string            `json:"id"`
	Object        string            `json:"object"`
	Created       int64             `json:"created"`
	OwnedBy       string            `json:"owned_by"`
	Name          string            `json:"name"`
	ContextLength int64             `json:"context_length,omitempty"`
	IsFree        bool              `json:"is_free"`
	Pricing       *cataloguePricing `json:"pricing,omitempty"`
}

type cataloguePricing struct {
	Unit          string `json:"pricing_unit"`
	PromptPerM    Money  `json:"prompt_usd_per_1m"`
	OutputPerM    Money  `json:"completion_usd_per_1m"`
	PromptPerK    string `json:"prompt_usd_per_1k"`
	OutputPerK    string `json:"completion_usd_per_1k"`
	CacheReadPerM *Money `json:"cache_read_input_usd_per_1m,omitempty"`
}

// entry describes the model under the name a client may use.
func (m *modelEntry) entry(name string) catalogueEntry {
	owner, short, ok := strings.Cut(name, "/")
	if !ok {
		owner, short = "mesh", name
	}
	e := catalogueEntry{
		ID: name, Object: "model", OwnedBy: owner, Name: short,
		ContextLength: m.ContextLength,
		IsFree:        m.Price != nil && m.Price.Input == 0 && m.Price.Output == 0,
	}
	if p := m.Price; p != nil {
		e.Pricing = &cataloguePricing{
			Unit:          "per_1m_tokens",
			PromptPerM:    p.Input,
			OutputPerM:    p.Output,
			PromptPerK:    p.Input.thousandth(),
			OutputPerK:    p.Output.thousandth(),
			CacheReadPerM: p.Cached,
		}
	}
	return e
}

// listModels serves GET /v1/models: the models with an exact name that the key may use.
func (x *exchange) listModels() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	list := make([]catalogueEntry, 0, len(x.h.models.names))
	for _, m := range x.h.models.names {
		if x.key.allows(m.Name) {
			list = append(list, m.entry(m.Name))
		}
	}
	if x.meshClient() {
		return x.answer(list)
	}
	return x.answer(struct {
		Object string           `json:"object"`
		Data   []catalogueEntry `json:"data"`
	}{"list", list})
}

// reservedNames are paths of the Mesh API below /v1/models that name no model.
var reservedNames = map[string]bool{"free": true, "paid": true, "search": true}

// getModel serves GET /v1/models/{id}. A name that only a pattern covers is there too: a client can use it.
func (x *exchange) getModel() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	name := strings.TrimPrefix(x.r.URL.Path, modelsPath+"/")
	m := x.h.models.find(name)
	if m == nil || !x.key.allows(name) || reservedNames[name] {
		return modelNotFound(name)
	}
	return x.answer(m.entry(name))
}
