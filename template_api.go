package mesh

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"
)

const templatesPath = "/v1/templates"

// listTemplates serves GET /v1/templates: the owner's own and the global ones.
func (x *exchange) listTemplates() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	shelves, refusal := x.shelves()
	if refusal != nil {
		return refusal
	}
	list := []storedTemplate{}
	for _, t := range newest(shelves...) {
		list = append(list, t.stored())
	}
	return x.answer(list)
}

// createTemplate serves POST /v1/templates.
func (x *exchange) createTemplate() *apiError {
	draft, refusal := x.readTemplate()
	if refusal != nil {
		return refusal
	}
	if refusal := draft.missingName(); refusal != nil {
		return refusal
	}
	t := newTemplate(draft, x.key.templateScope(), x.key.templateOwner())
	if refusal := x.changeTemplates(func(s *TemplateShelf) (*TemplateShelf, error) { return s.with(t) }); refusal != nil {
		return refusal
	}
	x.locate(templatesPath + "/" + t.id)
	return x.answerWith(http.StatusCreated, t.stored())
}

// newTemplate returns a template that was not there before.
func newTemplate(draft *templateDraft, scope templateScope, owner string) *Template {
	now := time.Now().UTC().Truncate(time.Microsecond)
	t := &Template{id: uuid.NewString(), scope: scope, owner: owner, created: now, updated: now}
	draft.apply(t)
	t.prompt = t.compile()
	return t
}

// changed returns the template with what a draft changes.
func (t *Template) changed(draft *templateDraft) *Template {
	next := *t
	draft.apply(&next)
	next.updated = time.Now().UTC().Truncate(time.Microsecond)
	next.prompt = next.compile()
	return &next
}

// readTemplate authenticates, and reads a template from the body.
func (x *exchange) readTemplate() (*templateDraft, *apiError) {
	if refusal := x.authenticate(); refusal != nil {
		return nil, refusal
	}
	body, refusal := readBody(x.w, x.r, min(maxTemplateSize, x.h.MaxBodySize))
	if refusal != nil {
		return nil, refusal
	}
	x.taken = true
	return parseTemplate(body)
}

// getTemplate serves GET /v1/templates/{id}.
func (x *exchange) getTemplate() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	t, refusal := x.templateByID()
	if refusal != nil {
		return refusal
	}
	return x.answer(t.stored())
}

// templateID returns the id that the path names.
func (x *exchange) templateID() (string, *apiError) {
	name := strings.TrimPrefix(x.r.URL.Path, templatesPath+"/")
	id, err := uuid.Parse(name)
	if err != nil || len(name) != len(id.String()) { // the package takes other forms too
		return "", templateNotFound(name)
	}
	return id.String(), nil
}

// templateByID returns the template that the path names, if it is the owner's or everybody's.
func (x *exchange) templateByID() (*Template, *apiError) {
	id, refusal := x.templateID()
	if refusal != nil {
		return nil, refusal
	}
	shelves, refusal := x.shelves()
	if refusal != nil {
		return nil, refusal
	}
	for _, s := range shelves {
		if t := s.byID[id]; t != nil {
			return t, nil
		}
	}
	return nil, templateNotFound(id)
}

// ownID returns the id that the path names, unless it is that of a template that is everybody's. Whether the owner has
// it shows when it is changed: another instance may have created it just now.
func (x *exchange) ownID() (string, *apiError) {
	id, refusal := x.templateID()
	if refusal != nil {
		return "", refusal
	}
	if t, _ := x.templateByID(); t != nil && t.scope == globalScope {
		return "", errorf(http.StatusForbidden, "forbidden", "The template %q is everybody's and cannot be changed with an API key.", t.Name)
	}
	return id, nil
}

// updateTemplate serves PATCH /v1/templates/{id}.
func (x *exchange) updateTemplate() *apiError {
	draft, refusal := x.readTemplate()
	if refusal != nil {
		return refusal
	}
	id, refusal := x.ownID()
	if refusal != nil {
		return refusal
	}
	if draft.gave("name") {
		if refusal := draft.missingName(); refusal != nil {
			return refusal
		}
	}
	var next *Template
	refusal = x.changeTemplates(func(s *TemplateShelf) (*TemplateShelf, error) {
		last := s.byID[id]
		if last == nil {
			return nil, errNoTemplate
		}
		next = last.changed(draft)
		return s.with(next)
	})
	if refusal != nil {
		return refusal
	}
	return x.answer(next.stored())
}

// deleteTemplate serves DELETE /v1/templates/{id}.
func (x *exchange) deleteTemplate() *apiError {
	if refusal := x.authenticate(); refusal != nil {
		return refusal
	}
	id, refusal := x.ownID()
	if refusal != nil {
		return refusal
	}
	if refusal := x.changeTemplates(func(s *TemplateShelf) (*TemplateShelf, error) { return s.without(id) }); refusal != nil {
		return refusal
	}
	x.event.Outcome = OutcomeCompleted
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

// changeTemplates changes the owner's templates.
func (x *exchange) changeTemplates(change func(*TemplateShelf) (*TemplateShelf, error)) *apiError {
	store, release, err := x.h.templateStore()
	if errors.Is(err, errNoTemplates) {
		return errNoTemplates
	}
	if err != nil {
		return x.storeFailed(err)
	}
	defer release()
	err = store.ChangeTemplates(x.r.Context(), string(x.key.templateScope()), change)
	if refusal := shelfRefusal(err); refusal != nil {
		return refusal
	}
	if err != nil {
		return x.storeFailed(err)
	}
	return nil
}

// shelfRefusal is the error for a change that a shelf does not take, or nil.
func shelfRefusal(err error) *apiError {
	switch {
	case errors.Is(err, errNameTaken):
		e := errorf(http.StatusConflict, "conflict", "There is a template of this name already.")
		e.param = "name"
		return e
	case errors.Is(err, errManyOnShelf):
		return errorf(http.StatusUnprocessableEntity, "unprocessable_entity", "There can be up to %d templates, of %d bytes together.", maxTemplates, maxTemplatesSize)
	case errors.Is(err, errTemplateSize):
		return tooLarge(maxTemplateSize)
	case errors.Is(err, errNoTemplate):
		return errorf(http.StatusNotFound, "not_found", "There is no such template.")
	}
	return nil
}
