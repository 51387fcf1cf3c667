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
	"go.uber.org/zap"
)

// autoModel is what clients ask for that leave the choice to the gateway.
const autoModel = "auto"

// Auto sets up the model `auto`: another model reads each conversation that asks for it, and chooses who answers.
type Auto struct {
	// The model that chooses. A key need not be allowed to use it, but pays for it.
	Classifier string `json:"classifier,omitempty"`

	// The models to choose among. Those that a key may not use are not chosen for it.
	Candidates []*AutoCandidate `json:"candidates,omitempty"`

	// How long the choice may take. Default: 3 seconds.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// The model that answers where the classifier fails, is late, or chooses none of the candidates. Default: the first
	// candidate. A key that may not use it gets the first candidate that it may use.
	Default string `json:"default,omitempty"`

	// The `max_tokens` of the classifier's answer, which is short; a model that thinks first needs room for that. It bounds
	// what a choice can cost, as keys with a hard spend cap need where the classifier has no context_length. Default: none is
	// sent.
	MaxTokens int64 `json:"max_tokens,omitempty"`
}

// AutoCandidate is a model that may be chosen.
type AutoCandidate struct {
	// Its name.
	Model string `json:"model,omitempty"`

	// What it is good for, in one line. The classifier goes by that.
	Description string `json:"description,omitempty"`
}

const defaultAutoTimeout = 3 * time.Second

func (a *Auto) check(models modelTable) error {
	if models.exact[autoModel] != nil {
		return fmt.Errorf("auto: there is a model %s too", autoModel)
	}
	if a.Classifier == "" {
		return errors.New("auto: it needs a classifier")
	}
	if a.Classifier == autoModel {
		return fmt.Errorf("auto: classifier: %s cannot choose for itself", autoModel)
	}
	if models.find(a.Classifier) == nil {
		return fmt.Errorf("auto: classifier: no model matches %s", a.Classifier)
	}
	if len(a.Candidates) == 0 {
		return errors.New("auto: it needs candidates")
	}
	seen := make(map[string]bool, len(a.Candidates))
	for i, c := range a.Candidates {
		switch {
		case c == nil:
			return fmt.Errorf("auto: candidate #%d: %w", i+1, errNull)
		case models.find(c.Model) == nil:
			return fmt.Errorf("auto: candidate %s: no model matches it", nameOr(c.Model, i))
		case c.Model == autoModel:
			return fmt.Errorf("auto: candidate %s: it is who chooses", c.Model)
		case strings.HasSuffix(c.Model, "*"):
			return fmt.Errorf("auto: candidate %s: it has to be a name, not a pattern", c.Model)
		case seen[c.Model]:
			return fmt.Errorf("auto: candidate %s is given twice", c.Model)
		case strings.TrimSpace(c.Description) == "" || strings.ContainsAny(c.Description, "\r\n"):
			return fmt.Errorf("auto: candidate %s: its description has to be one line", c.Model)
		}
		seen[c.Model] = true
	}
	switch {
	case a.Default == autoModel:
		return fmt.Errorf("auto: default: it cannot be %s", autoModel)
	case a.Default != "" && models.find(a.Default) == nil:
		return fmt.Errorf("auto: default: no model matches %s", a.Default)
	case a.Timeout < 0:
		return fmt.Errorf("auto: timeout: %s is negative", time.Duration(a.Timeout))
	case a.MaxTokens < 0:
		return fmt.Errorf("auto: max_tokens: %d is negative", a.MaxTokens)
	}
	return nil
}

func (a *Auto) timeout() time.Duration {
	return cmp.Or(time.Duration(a.Timeout), defaultAutoTimeout)
}

// fallbackReason says why the default answers.
type fallbackReason string

const (
	reasonTimeout fallbackReason = "classifier_timeout"
	reasonFailed  fallbackReason = "classifier_error"   // no whole answer, for whatever reason
	reasonInvalid fallbackReason = "classifier_invalid" // its answer is not the name of a candidate
)

// autoRoute is a choice of a model, before it is made and after.
type autoRoute struct {
	candidates []AutoCandidate // that may be chosen; at least one
	preset     string          // what answers where none is chosen

	maxCost   Money     // the most that the request can cost, whoever is chosen; 0 where nothing bounds that
	unbounded *apiError // why nothing does

	model  string         // the one that is to answer
	effort string         // how much it should think, in OpenAI's words; empty where the classifier did not say
	reason fallbackReason // empty where the model was chosen
	call   *innerCall     // the classifier's; nil where there was no choice
}

// newAutoRoute returns what may be chosen for the request's key.
func (x *exchange) newAutoRoute() (*autoRoute, *apiError) {
	a := new(autoRoute)
	for _, c := range x.h.Auto.Candidates {
		if x.key.allows(c.Model) {
			a.candidates = append(a.candidates, *c)
		}
	}
	if len(a.candidates) == 0 {
		return nil, errorf(http.StatusForbidden, "forbidden", "This API key may use none of the models that %q chooses among.", autoModel)
	}
	a.preset = x.h.Auto.Default
	if a.preset == "" || !x.key.allows(a.preset) {
		a.preset = a.candidates[0].Model
	}
	return a, nil
}

// routeAuto finds all who may come to serve a request for autoModel, the default's first, so that there is room for each
// under a hard cap. Who does is left to choose, once the request is let through.
func (x *exchange) routeAuto(req *chatRequest) ([]candidate, *apiError) {
	a, refusal := x.newAutoRoute()
	if refusal != nil {
		return nil, refusal
	}
	if req.image.modality { // which any model can be asked for, but not every one has
		a.keep(func(model string) bool { return x.h.models.find(model).kind(model) == kindImage })
	}
	var list []candidate
	var unfit *apiError // of the default
	some := a.keep(func(model string) bool {
		more, refusal := x.routeOneOf(req, a, model)
		list, unfit = addNew(list, more), cmp.Or(unfit, refusal)
		return refusal == nil
	})
	x.event.Model = a.preset
	if !some {
		return nil, unfit
	}
	if a.unbounded != nil {
		a.maxCost = 0
	}
	x.auto = a
	req.asImages(x.h.models.find(a.preset).kind(a.preset)) // once more: others have made something else of it
	return list, nil
}

// routeOneOf finds who may serve a request by one of the models to choose among, and notes what that can cost.
func (x *exchange) routeOneOf(req *chatRequest, a *autoRoute, model string) ([]candidate, *apiError) {
	list, refusal := x.routeTo(req, model)
	if refusal == nil && req.images != nil && x.event.ComparisonID != "" {
		refusal = imagesNotCompared(model)
	}
	if refusal != nil {
		return nil, refusal
	}
	most, bounded := req.maxCost(list)
	a.maxCost = max(a.maxCost, most)
	if !bounded {
		a.unbounded = cmp.Or(a.unbounded, req.unbounded())
	}
	return list, nil
}

// keep leaves the models that can take the request, if there are any, and reports whether there are. The default is asked
// first; where it cannot, it is the first candidate that can.
func (a *autoRoute) keep(can func(model string) bool) bool {
	canPreset := can(a.preset)
	var left []AutoCandidate
	for _, c := range a.candidates {
		if can(c.Model) {
			left = append(left, c)
		}
	}
	switch {
	case len(left) > 0 && !canPreset:
		a.preset = left[0].Model
	case len(left) == 0 && !canPreset:
		return false
	case len(left) == 0:
		left = []AutoCandidate{{Model: a.preset}}
	}
	a.candidates = left
	return true
}

// choose has the model of a request chosen, and returns who may serve it: nobody where that took all the time there was.
func (x *exchange) choose(store Store, req *chatRequest) []candidate {
	a, began := x.auto, time.Now()
	if len(a.candidates) == 1 {
		a.model = a.candidates[0].Model
	} else {
		limit := x.h.Auto.timeout()
		if req.timeout > 0 {
			limit = min(limit, req.timeout)
		}
		x.classify(a, shownConversation(req.body, req.messages, req.prompt.front), limit)
		a.call.asPartOf(&x.event)
		a.call.admitAndRun(store)
		a.take()
	}
	if req.timeout > 0 { // is the client's whole patience
		if req.timeout -= time.Since(began); req.timeout <= 0 {
			return nil
		}
	}
	x.noteAuto(a)
	x.gate.lock()
	defer x.gate.unlock()
	header := x.w.Header() // is not read any more where there were pings
	header.Set("X-Auto-Routed", "true")
	header.Set("X-Resolved-Model-Id", a.model)
	if a.reason != "" {
		header.Set("X-Auto-Routed-Fallback", "true")
		header.Set("X-Auto-Routed-Fallback-Reason", string(a.reason))
	}
	list, _ := x.routeTo(req, a.model) // was found before
	x.gate.suit(req)
	return list
}

// noteAuto tells metrics and log of a choice.
func (x *exchange) noteAuto(a *autoRoute) {
	collectors.autoRoutes.WithLabelValues(x.h.models.find(a.model).Name, cmp.Or(string(a.reason), "chosen")).Inc()
	if a.reason == "" || x.r.Context().Err() != nil {
		return
	}
	x.h.logger.Warn("the classifier did not choose a model",
		zap.String("request_id", x.event.RequestID),
		zap.String("classifier", a.call.model),
		zap.String("reason", string(a.reason)),
		zap.String("model", a.model))
}

// take takes in what the classifier said.
func (a *autoRoute) take() {
	a.model = a.preset
	switch code, _ := a.call.failed(); code {
	case "":
	case errTimeout.code:
		a.reason = reasonTimeout
		return
	default:
		a.reason = reasonFailed
		return
	}
	names := make([]string, 0, len(a.candidates))
	for _, c := range a.candidates {
		names = append(names, c.Model)
	}
	model, effort := readChoice(a.call.taker.text(), names)
	if model == "" {
		a.reason = reasonInvalid
		return
	}
	a.model, a.effort = model, effort
}

// readChoice returns the model that a classifier's answer names, if it names one of them, and how much that should think.
// The answer should be `<name> <effort>`; models like to say more.
func readChoice(answer string, names []string) (model, effort string) {
	var named []string
	first := false // the first word is a name
	for i, word := range strings.Fields(answer) {
		word = strings.Trim(word, "\"'`*.,:;()[]{}<>")
		switch strings.ToLower(word) {
		case "low", "medium", "high":
			effort = strings.ToLower(word)
			continue
		}
		at := slices.IndexFunc(names, func(name string) bool { return strings.EqualFold(name, word) })
		if at < 0 {
			continue
		}
		first = first || i == 0
		if !slices.Contains(named, names[at]) {
			named = append(named, names[at])
		}
	}
	if len(named) == 1 || first {
		return named[0], effort
	}
	return "", ""
}
