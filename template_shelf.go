package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"
)

// TemplateStore is a Store that has templates of its own, beside those of the configuration.
type TemplateStore interface {
	Store

	// TemplateShelf returns the templates of one scope, which is not older than half a second. It must not be changed.
	TemplateShelf(ctx context.Context, scope string) (*TemplateShelf, error)

	// ChangeTemplates changes one scope in one atomic step, which is durable when it returns. change is given the scope's
	// templates, makes a new shelf of them or an error, and may be called again where another change came first.
	ChangeTemplates(ctx context.Context, scope string, change func(*TemplateShelf) (*TemplateShelf, error)) error

	// TemplateScopes returns the scopes that have templates.
	TemplateScopes(ctx context.Context) ([]string, error)
}

// TemplateShelf has the templates of one scope. It is immutable.
type TemplateShelf struct {
	byID   map[string]*Template
	byName map[string]*Template
	size   int // bytes of all of them, as JSON
}

var emptyShelf = new(TemplateShelf)

func shelfOf(templates map[string]*Template) *TemplateShelf {
	s := &TemplateShelf{byID: templates, byName: make(map[string]*Template, len(templates))}
	for _, t := range templates {
		s.byName[t.Name] = t
		s.size += t.size
	}
	return s
}

// The reasons why a shelf does not take a template.
var (
	errNameTaken    = errors.New("the name is taken")
	errManyOnShelf  = errors.New("there are too many templates")
	errNoTemplate   = errors.New("there is no such template")
	errTemplateSize = errors.New("the template is too large")
)

// with returns the shelf with one more template, or with a changed one.
func (s *TemplateShelf) with(t *Template) (*TemplateShelf, error) {
	if other := s.byName[t.Name]; other != nil && other.id != t.id {
		return nil, errNameTaken
	}
	encoded, err := encodeJSON(t.stored())
	if err != nil {
		return nil, err
	}
	if len(encoded) > maxTemplateSize+1024 { // a PATCH can make one larger than any body is
		return nil, errTemplateSize
	}
	all := maps.Clone(s.byID)
	if all == nil {
		all = make(map[string]*Template, 1)
	}
	t.size = len(encoded)
	all[t.id] = t
	next := shelfOf(all)
	if len(all) > max(maxTemplates, len(s.byID)) || next.size > max(maxTemplatesSize, s.size) {
		return nil, errManyOnShelf
	}
	return next, nil
}

// without returns the shelf without a template.
func (s *TemplateShelf) without(id string) (*TemplateShelf, error) {
	if s.byID[id] == nil {
		return nil, errNoTemplate
	}
	all := maps.Clone(s.byID)
	delete(all, id)
	return shelfOf(all), nil
}

// changes returns what makes next of s: what to put, as JSON by id, and what to delete.
func (s *TemplateShelf) changes(next *TemplateShelf) (put map[string][]byte, gone []string, err error) {
	put = make(map[string][]byte)
	for id, t := range next.byID {
		if s.byID[id] == t {
			continue
		}
		if put[id], err = encodeJSON(t.stored()); err != nil {
			return nil, nil, err
		}
	}
	for id := range s.byID {
		if next.byID[id] == nil {
			gone = append(gone, id)
		}
	}
	return put, gone, nil
}

// decodeTemplate reads a template as a store keeps it.
func decodeTemplate(scope templateScope, data []byte) (*Template, error) {
	var s storedTemplate
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("reading a template: %w", err)
	}
	t := s.template(scope)
	t.size = len(data)
	return t, nil
}

// newest returns templates with the newest first.
func newest(shelves ...*TemplateShelf) (all []*Template) {
	for _, s := range shelves {
		for _, t := range s.byID {
			all = append(all, t)
		}
	}
	slices.SortFunc(all, func(a, b *Template) int {
		if c := b.created.Compare(a.created); c != 0 {
			return c
		}
		return strings.Compare(b.id, a.id)
	})
	return all
}

// errNoTemplates is for a store that keeps none.
var errNoTemplates = errorf(http.StatusServiceUnavailable, "store_unavailable", "The gateway's store keeps no templates.")

// templateStore returns the store where it keeps templates, until release is called.
func (h *Handler) templateStore() (store TemplateStore, release func(), err error) {
	opened, err := h.store.acquire()
	if err != nil {
		return nil, nil, err
	}
	if store, ok := opened.(TemplateStore); ok {
		return store, h.releaseStore, nil
	}
	h.releaseStore()
	return nil, nil, errNoTemplates
}

// shelves returns the templates that a key's requests can name: the owner's own, those of the configuration, and those
// that operators have put into the store for everybody. Of one name the first counts.
func (x *exchange) shelves() ([]*TemplateShelf, *apiError) {
	store, release, err := x.h.templateStore()
	if errors.Is(err, errNoTemplates) {
		return []*TemplateShelf{emptyShelf, x.h.templates, emptyShelf}, nil
	}
	if err != nil {
		return nil, x.storeFailed(err)
	}
	defer release()
	own, err := store.TemplateShelf(x.r.Context(), string(x.key.templateScope()))
	if err != nil {
		return nil, x.storeFailed(err)
	}
	global, err := store.TemplateShelf(x.r.Context(), string(globalScope))
	if err != nil {
		return nil, x.storeFailed(err)
	}
	return []*TemplateShelf{own, x.h.templates, global}, nil
}

// findTemplate returns the template that a request names: by its name, or else by its id.
func (x *exchange) findTemplate(name string) (*Template, *apiError) {
	shelves, refusal := x.shelves()
	if refusal != nil {
		return nil, refusal
	}
	for _, s := range shelves {
		if t := s.byName[name]; t != nil {
			return t, nil
		}
	}
	if id, err := uuid.Parse(name); err == nil {
		for _, s := range shelves {
			if t := s.byID[id.String()]; t != nil {
				return t, nil
			}
		}
	}
	return nil, templateNotFound(name)
}

func templateNotFound(name string) *apiError {
	e := errorf(http.StatusNotFound, "not_found", "There is no template %.*q.", maxTemplateName, name)
	e.param = "template"
	return e
}
