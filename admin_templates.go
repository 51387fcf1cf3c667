package mesh

import (
	"errors"
	"io"
	"net/http"
	"strings"
)

// Operators see and change the templates of all owners:
//
//	GET    /mesh/templates          all of a store, and those of the configuration; of one owner with ?owner=
//	PUT    /mesh/templates          creates or changes the one of this name, of an owner or of everybody
//	GET    /mesh/templates/{id}     one
//	DELETE /mesh/templates/{id}     one

// adminTemplates serves /mesh/templates.
func adminTemplates(w http.ResponseWriter, r *http.Request) error {
	store, release, err := managedTemplates(r)
	if err != nil {
		return err
	}
	defer release()
	switch r.Method {
	case http.MethodGet:
		all, err := allTemplates(r, store)
		if err != nil {
			return adminStoreError(err)
		}
		list := []storedTemplate{}
		owner, only := r.URL.Query().Get("owner"), r.URL.Query().Has("owner")
		for _, t := range newest(all...) {
			if !only || t.owner == owner {
				list = append(list, t.stored())
			}
		}
		return writeJSON(w, http.StatusOK, list)
	case http.MethodPut:
		return putTemplate(w, r, store)
	}
	return adminError(http.StatusMethodNotAllowed, "method not allowed")
}

// adminTemplate serves /mesh/templates/{id}.
func adminTemplate(w http.ResponseWriter, r *http.Request) error {
	store, release, err := managedTemplates(r)
	if err != nil {
		return err
	}
	defer release()
	all, err := allTemplates(r, store)
	if err != nil {
		return adminStoreError(err)
	}
	id := strings.TrimPrefix(r.URL.Path, "/mesh/templates/")
	for i, shelf := range all {
		t := shelf.byID[id]
		if t == nil {
			continue
		}
		switch {
		case r.Method == http.MethodGet:
			return writeJSON(w, http.StatusOK, t.stored())
		case r.Method != http.MethodDelete:
			return adminError(http.StatusMethodNotAllowed, "method not allowed")
		case i == 0:
			return errConfiguredTemplate
		}
		err := store.ChangeTemplates(r.Context(), string(t.scope), func(s *TemplateShelf) (*TemplateShelf, error) { return s.without(id) })
		if err != nil {
			return adminStoreError(err)
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return adminError(http.StatusNotFound, "there is no template %q", id)
}

var errConfiguredTemplate = adminError(http.StatusConflict, "this template is part of the configuration; change it there")

func managedTemplates(r *http.Request) (TemplateStore, func(), error) {
	ref, err := managedStore(r)
	if err != nil {
		return nil, nil, err
	}
	opened, err := ref.acquire()
	if err != nil {
		return nil, nil, adminStoreError(err)
	}
	release := func() { ref.release() } //nolint:errcheck // closing is logged by the store
	store, ok := opened.(TemplateStore)
	if !ok {
		release()
		return nil, nil, adminError(http.StatusNotImplemented, "the store keeps no templates")
	}
	return store, release, nil
}

// allTemplates returns those of the configuration first.
func allTemplates(r *http.Request, store TemplateStore) ([]*TemplateShelf, error) {
	configured := make(map[string]*Template)
	for _, h := range running() {
		for id, t := range h.templates.byID {
			configured[id] = t
		}
	}
	all := []*TemplateShelf{shelfOf(configured)}
	scopes, err := store.TemplateScopes(r.Context())
	if err != nil {
		return nil, err
	}
	for _, scope := range scopes {
		shelf, err := store.TemplateShelf(r.Context(), scope)
		if err != nil {
			return nil, err
		}
		all = append(all, shelf)
	}
	return all, nil
}

// putTemplate makes the template of a name be what was sent. What is not said has its default.
func putTemplate(w http.ResponseWriter, r *http.Request, store TemplateStore) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxTemplateSize))
	if err != nil {
		return adminError(http.StatusRequestEntityTooLarge, "a template has up to %d bytes", maxTemplateSize)
	}
	draft, refusal := parseTemplate(body)
	if refusal == nil {
		refusal = unknownTemplateMembers(body)
	}
	if refusal == nil {
		refusal = draft.missingName()
	}
	if refusal != nil {
		return adminError(refusal.status, "%s", refusal.message)
	}
	scope := globalScope
	if draft.ownerAsked != "" {
		scope = templateScope("o:" + draft.ownerAsked)
	}
	if draft.global && draft.ownerAsked != "" {
		return adminError(http.StatusUnprocessableEntity, "a template is everybody's (is_global), or it has an owner, but not both")
	}
	status := http.StatusOK
	var t *Template
	err = store.ChangeTemplates(r.Context(), string(scope), func(s *TemplateShelf) (*TemplateShelf, error) {
		t, status = newTemplate(draft, scope, draft.ownerAsked), http.StatusCreated
		if before := s.byName[draft.Name]; before != nil {
			t.id, t.created, status = before.id, before.created, http.StatusOK
		}
		return s.with(t)
	})
	if err != nil {
		return adminStoreError(err)
	}
	return writeJSON(w, status, t.stored())
}

// adminStoreError is the error of an admin request for one of a store.
func adminStoreError(err error) error {
	if refusal := shelfRefusal(err); refusal != nil {
		return adminError(refusal.status, "%s", refusal.message)
	}
	if errors.Is(err, errUnavailable) {
		return adminError(http.StatusServiceUnavailable, "%w", err)
	}
	return err
}
