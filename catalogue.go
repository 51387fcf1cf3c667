package mesh

import (
	"fmt"
	"slices"
	"strings"
)

// About is what the catalogue says of a model beside its price.
type About struct {
	// What people call it. Default: its name without the first part.
	DisplayName string `json:"display_name,omitempty"`

	// What kind of model it is, in one word, for clients to filter by. Default: `text`.
	Type string `json:"type,omitempty"`

	// What a prompt may contain: `text`, `image`, `audio`, `video`, `file`. Default: `text`.
	InputModalities []string `json:"input_modalities,omitempty"`

	// What an answer may contain, as in input_modalities. Default: `text`.
	OutputModalities []string `json:"output_modalities,omitempty"`

	// What it can do beyond completing text: `tools`, `structured_output`, `thinking`. Default: nothing.
	Supports []string `json:"supports,omitempty"`
}

const (
	canTools            = "tools"
	canStructuredOutput = "structured_output"
	canThinking         = "thinking"
)

var (
	modalities = []string{"text", "image", "audio", "video", "file"}
	abilities  = []string{canTools, canStructuredOutput, canThinking}
)

func (a *About) check() error {
	if strings.ContainsFunc(a.Type, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fmt.Errorf("type: %q is not one word", a.Type)
	}
	if err := checkWords("input_modalities", a.InputModalities, modalities); err != nil {
		return err
	}
	if err := checkWords("output_modalities", a.OutputModalities, modalities); err != nil {
		return err
	}
	return checkWords("supports", a.Supports, abilities)
}

func checkWords(field string, words, known []string) error {
	for i, w := range words {
		if !slices.Contains(known, w) {
			return fmt.Errorf("%s: %q is none of %s", field, w, strings.Join(known, ", "))
		}
		if slices.Contains(words[:i], w) {
			return fmt.Errorf("%s: %s is given twice", field, w)
		}
	}
	return nil
}

// catalogueEntry is a model as the API lists it.
type catalogueEntry struct {
	ID                       string            `json:"id"`
	Object                   string            `json:"object"`
	Created                  int64             `json:"created"`
	OwnedBy                  string            `json:"owned_by"`
	Name                     string            `json:"name"`
	ContextLength            int64             `json:"context_length,omitempty"`
	IsFree                   bool              `json:"is_free"`
	Pricing                  *cataloguePricing `json:"pricing,omitempty"`
	ModelType                string            `json:"model_type"`
	InputModalities          []string          `json:"input_modalities"`
	OutputModalities         []string          `json:"output_modalities"`
	SupportsTools            bool              `json:"supports_tools"`
	SupportsStructuredOutput bool              `json:"supports_structured_output"`
	SupportsThinking         bool              `json:"supports_thinking"`
	SupportsCompletions      bool              `json:"supports_completions_api"`
	SupportsResponses        bool              `json:"supports_responses_api"` // which this gateway does not serve
}

type cataloguePricing struct {
	Unit          string `json:"pricing_unit"`
	PromptPerM    Money  `json:"prompt_usd_per_1m"`
	OutputPerM    Money  `json:"completion_usd_per_1m"`
	PromptPerK    string `json:"prompt_usd_per_1k"`
	OutputPerK    string `json:"completion_usd_per_1k"`
	CacheReadPerM *Money `json:"cache_read_input_usd_per_1m,omitempty"`
	Request       *Money `json:"request_usd,omitempty"`
}

var textOnly = []string{"text"}

// entry describes the model under the name a client may use.
func (m *modelEntry) entry(name string) catalogueEntry {
	owner, short, ok := strings.Cut(name, "/")
	if !ok {
		owner, short = "mesh", name
	}
	if m.DisplayName != "" {
		short = m.DisplayName
	}
	price, context := m.terms(name)
	e := catalogueEntry{
		ID: name, Object: "model", OwnedBy: owner, Name: short,
		ContextLength:    context,
		IsFree:           price.free(),
		Pricing:          price.entry(),
		ModelType:        "text",
		InputModalities:  textOnly,
		OutputModalities: textOnly,
	}
	if l := m.listed(name); l != nil {
		e.describe(&l.about)
	}
	e.describe(&m.About)
	e.SupportsCompletions = slices.Contains(e.OutputModalities, "text") || slices.Contains(e.OutputModalities, "image")
	return e
}

// describe takes over what a says.
func (e *catalogueEntry) describe(a *About) {
	if a.Type != "" {
		e.ModelType = a.Type
	}
	if a.InputModalities != nil {
		e.InputModalities = a.InputModalities
	}
	if a.OutputModalities != nil {
		e.OutputModalities = a.OutputModalities
	}
	if a.Supports != nil {
		e.SupportsTools = slices.Contains(a.Supports, canTools)
		e.SupportsStructuredOutput = slices.Contains(a.Supports, canStructuredOutput)
		e.SupportsThinking = slices.Contains(a.Supports, canThinking)
	}
}

// onlyImages reports whether images are all that has a price: the catalogue's pricing has no place for that.
func (p *Price) onlyImages() bool {
	rest := *p
	rest.Image = 0
	return p.Image > 0 && rest.free()
}

func (p *Price) entry() *cataloguePricing {
	if p == nil || p.onlyImages() {
		return nil
	}
	e := &cataloguePricing{
		Unit:          "per_1m_tokens",
		PromptPerM:    p.Input,
		OutputPerM:    p.Output,
		PromptPerK:    p.Input.thousandth(),
		OutputPerK:    p.Output.thousandth(),
		CacheReadPerM: p.Cached,
	}
	if p.Request > 0 {
		e.Request = &p.Request
	}
	return e
}

// listModels serves GET /v1/models: the models with an exact name that the key may use, and autoModel.
func (x *exchange) listModels() *apiError { return x.list(nil) }

func (x *exchange) listFreeModels() *apiError { free := true; return x.list(&free) }

func (x *exchange) listPaidModels() *apiError { free := false; return x.list(&free) }

// list answers with the models that the query's filters let through, or those that are free, or not, where the path
// says so.
func (x *exchange) list(free *bool) *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	q := newModelQuery(x.r.URL.Query())
	if free != nil {
		q.free = free
	}
	if len(q.faults) > 0 {
		return validationError(q.faults)
	}
	list := x.find(q)
	if x.meshClient() {
		return x.answer(list)
	}
	return x.answer(struct {
		Object string           `json:"object"`
		Data   []catalogueEntry `json:"data"`
	}{"list", list})
}

// searchModels serves GET /v1/models/search.
func (x *exchange) searchModels() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	q := newModelSearch(x.r.URL.Query())
	if len(q.faults) > 0 {
		return validationError(q.faults)
	}
	list := x.find(q)
	brands := make([]string, 0, 8)
	for _, e := range list {
		if !slices.Contains(brands, e.OwnedBy) {
			brands = append(brands, e.OwnedBy)
		}
	}
	slices.Sort(brands)
	from := min(q.offset, int64(len(list)))
	return x.answer(struct {
		Items  []catalogueEntry `json:"items"`
		Total  int              `json:"total"`
		Limit  int64            `json:"limit"`
		Offset int64            `json:"offset"`
		Brands []string         `json:"brands"`
	}{list[from:min(from+q.limit, int64(len(list)))], len(list), q.limit, q.offset, brands})
}

// find returns the models with an exact name that the key may use and that q asks for, autoModel among them.
func (x *exchange) find(q *modelQuery) []catalogueEntry {
	list := make([]catalogueEntry, 0, len(x.h.models.names))
	for _, m := range x.h.models.names {
		if !x.key.allows(m.Name) {
			continue
		}
		if e := m.entry(m.Name); q.matches(&e) {
			list = append(list, e)
		}
	}
	if e, ok := x.autoEntry(); ok && q.matches(&e) {
		list = append(list, e)
	}
	return list
}

// autoEntry describes autoModel, if the key may use it. Price and abilities are those of whoever is chosen.
func (x *exchange) autoEntry() (e catalogueEntry, ok bool) {
	if x.h.Auto == nil {
		return e, false
	}
	if _, refusal := x.newAutoRoute(); refusal != nil {
		return e, false
	}
	return catalogueEntry{
		ID: autoModel, Object: "model", OwnedBy: "mesh", Name: autoModel,
		ModelType: "text", InputModalities: textOnly, OutputModalities: textOnly, SupportsCompletions: true,
	}, true
}

// getModel serves GET /v1/models/{id}. A name that only a pattern covers is there too: a client can use it.
func (x *exchange) getModel() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	name := strings.TrimPrefix(x.r.URL.Path, modelsPath+"/")
	if name == autoModel {
		if e, ok := x.autoEntry(); ok {
			return x.answer(e)
		}
	}
	m := x.h.models.find(name)
	if m == nil || !x.key.allows(name) {
		return modelNotFound(name)
	}
	return x.answer(m.entry(name))
}
