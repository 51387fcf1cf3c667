package mesh

import (
	"cmp"
	"net/http"
	"slices"
)

const selectPath = "/v1/router/select"

// selectRequest is a request to /v1/router/select.
type selectRequest struct {
	messages span
	models   []string // nil: the configured candidates
	excluded []string
}

var selectFields = []string{"messages", "api_type", "candidate_models", "exclude_models"}

// maxSelectable is how many models a request may name.
const maxSelectable = 100

func parseSelect(body []byte) (*selectRequest, *apiError) {
	req := new(selectRequest)
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}, req: &chatRequest{body: body}}
	var given uint64
	refusal := p.wholeObject(func(*parser) {
		given, _, _ = p.fields(selectFields, func(i int) {
			switch i {
			case 0:
				from := p.start()
				p.messages()
				req.messages = span{from, p.pos}
			case 1:
				p.text() // every model here has the same
			case 2:
				req.models = p.modelNames(maxSelectable)
			case 3:
				req.excluded = p.modelNames(maxSelectable)
			}
		})
	})
	if refusal != nil {
		return nil, refusal
	}
	p.require(selectFields, 1, given)
	if p.noMessages {
		p.tooFewMessages()
	}
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	return req, nil
}

// selection is the answer of /v1/router/select.
type selection struct {
	Model      string     `json:"model"`
	Effort     *string    `json:"reasoning_effort"`
	AutoRouter autoRouter `json:"auto_router"`
}

type autoRouter struct {
	Fallback bool           `json:"fallback_used"`
	Reason   fallbackReason `json:"fallback_reason,omitempty"`
}

// selectModel serves POST /v1/router/select. It counts as a request where a classifier is asked, and costs what that does. Where
// nobody need be asked it is none: nothing is admitted, and the ledger has no entry.
func (x *exchange) selectModel() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	if x.h.Auto == nil {
		return errorf(http.StatusNotFound, "not_found", "This gateway does not choose models.")
	}
	body, refusal := readBody(x.w, x.r, x.h.MaxBodySize)
	if refusal != nil {
		return refusal
	}
	x.taken = true
	req, refusal := parseSelect(body)
	if refusal != nil {
		return refusal
	}
	a, refusal := x.selectable(req)
	if refusal != nil {
		return refusal
	}
	if len(a.candidates) == 1 {
		a.model = a.candidates[0].Model
	} else if refusal := x.selectNow(a, shownConversation(body, req.messages, nil)); refusal != nil {
		return refusal
	}
	x.noteAuto(a)
	answer := &selection{Model: a.model, AutoRouter: autoRouter{Fallback: a.reason != "", Reason: a.reason}}
	if a.effort != "" {
		answer.Effort = &a.effort
	}
	return x.answer(answer)
}

// selectNow asks the classifier. Its call is what is counted and has the request's id, so that its limits are told to the
// client, who finds it in the ledger.
func (x *exchange) selectNow(a *autoRoute, conversation string) *apiError {
	store, err := x.acquire()
	if err != nil {
		return x.storeFailed(err)
	}
	defer x.h.releaseStore()
	x.classify(a, conversation, x.h.Auto.timeout())
	call := a.call
	call.x.event.RequestID = x.event.RequestID
	if call.refusal == nil {
		call.x.w = x.w
		refusal := call.x.admit(store, call.req, call.candidates)
		call.x.w = call.taker
		if refusal != nil {
			return refusal
		}
		call.run(store)
	}
	a.take()
	return nil
}

// selectable returns what a request lets be chosen.
func (x *exchange) selectable(req *selectRequest) (*autoRoute, *apiError) {
	a := new(autoRoute)
	if req.models == nil {
		all, refusal := x.newAutoRoute()
		if refusal != nil {
			return nil, refusal
		}
		a = all
	}
	for _, name := range req.models {
		if _, refusal := x.model(name); refusal != nil {
			refusal.param = "candidate_models"
			return nil, refusal
		}
		if !slices.ContainsFunc(a.candidates, func(c AutoCandidate) bool { return c.Model == name }) {
			a.candidates = append(a.candidates, AutoCandidate{Model: name, Description: x.h.describe(name)})
		}
	}
	isOut := func(c AutoCandidate) bool { return slices.Contains(req.excluded, c.Model) }
	a.candidates = slices.DeleteFunc(a.candidates, isOut)
	if len(a.candidates) == 0 {
		e := errorf(http.StatusUnprocessableEntity, "unprocessable_entity", "No model is left to choose.")
		e.param = "exclude_models"
		return nil, e
	}
	preset := cmp.Or(a.preset, x.h.Auto.Default)
	if !slices.ContainsFunc(a.candidates, func(c AutoCandidate) bool { return c.Model == preset }) {
		preset = a.candidates[0].Model
	}
	a.preset = preset
	return a, nil
}

// describe returns what a model is good for.
func (h *Handler) describe(name string) string {
	for _, c := range h.Auto.Candidates {
		if c.Model == name {
			return c.Description
		}
	}
	return "no description"
}
