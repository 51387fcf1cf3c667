package mesh

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// maxFallbackModels is how many models a request may name beside its own.
const maxFallbackModels = 10

// fallbackModels reads the models that a client wants to be asked after its own.
func (p *parser) fallbackModels() {
	p.req.fallbacks = p.modelNames(maxFallbackModels)
}

// modelNames reads a list of up to most names.
func (p *parser) modelNames(most int) (names []string) {
	n := p.list(func(p *parser) {
		if name, ok := p.text(); ok && len(names) < most {
			names = append(names, string(name))
		}
	})
	if n > most {
		p.faultf("too_long", fmt.Sprintf("List should have at most %d items after validation, not %d", most, n))
	}
	return names
}

// fallbackModel is a model that is asked after another.
type fallbackModel struct {
	name  string
	entry *modelEntry
}

// linkFallbacks has each model know which others to ask after it, their own fallbacks included.
func (t modelTable) linkFallbacks() {
	for _, m := range t.exact {
		m.fallbacks = t.after(m, m.Name, nil)
	}
	for _, m := range t.patterns {
		m.fallbacks = t.after(m, m.Name, nil)
	}
}

// after adds the fallbacks of m, asked for by name, to list. It passes over what is not there, and ends in a cycle too:
// both are found by checkFallbacks.
func (t modelTable) after(m *modelEntry, name string, list []fallbackModel) []fallbackModel {
	for _, next := range m.Fallback {
		entry := t.find(next)
		known := slices.ContainsFunc(list, func(f fallbackModel) bool { return f.name == next })
		if entry == nil || known || next == name {
			continue
		}
		list = t.after(entry, next, append(list, fallbackModel{next, entry}))
	}
	return list
}

// checkFallbacks finds fallbacks that lead nowhere, or back.
func (h *Handler) checkFallbacks(table modelTable) error {
	for _, m := range h.Models {
		for _, next := range m.Fallback {
			if table.find(next) == nil {
				return wrongf(&m.Fallback, "model %s: fallback: no model matches %s", m.Name, next)
			}
		}
		if cycle := table.cycle(m, []string{m.Name}); cycle != nil {
			return wrongf(&m.Fallback, "model %s: fallback: it leads back to itself: %s", m.Name, strings.Join(cycle, " → "))
		}
	}
	return nil
}

// cycle returns the way back to path's first model, whose last is m; nil where there is none.
func (t modelTable) cycle(m *Model, path []string) []string {
	for _, next := range m.Fallback {
		way := append(slices.Clip(path), next)
		if next == path[0] {
			return way
		}
		entry := t.find(next)
		if entry == nil || slices.Contains(path, next) || entry.Model == m && entry.Name != next {
			continue // a pattern may have one of its own names as a fallback
		}
		if found := t.cycle(entry.Model, way); found != nil {
			return found
		}
	}
	return nil
}

// withFallbacks adds the candidates of the models that the client names, and of those that are configured, each once.
func (x *exchange) withFallbacks(req *chatRequest, list []candidate, configured []fallbackModel) ([]candidate, *apiError) {
	for _, name := range req.fallbacks {
		entry, refusal := x.model(name)
		if refusal != nil {
			refusal.param = "models"
			return nil, refusal
		}
		list = x.addCandidates(req, list, entry, name)
	}
	for _, f := range configured {
		if x.key.allows(f.name) {
			list = x.addCandidates(req, list, f.entry, f.name)
		}
	}
	return list, nil
}

func (x *exchange) addCandidates(req *chatRequest, list []candidate, entry *modelEntry, name string) []candidate {
	more := entry.candidates(name)
	x.order(entry.Policy, req, more)
	return addNew(list, more)
}

// addNew adds those candidates that list does not have.
func addNew(list, more []candidate) []candidate {
	for _, c := range more {
		known := slices.ContainsFunc(list, func(k candidate) bool {
			return k.model == c.model && k.upstream == c.upstream && k.as == c.as
		})
		if !known {
			list = append(list, c)
		}
	}
	return list
}

// overCap reports whether a candidate may not be asked any more, because the key has reached its cap since the request
// was let through. A hard cap need not be looked at again: room for the dearest candidate is reserved. Nor does a store
// that cannot say keep anybody from an answer.
func (x *exchange) overCap(store Store, c *candidate) bool {
	limits := x.key.limits()
	if c.price == nil || limits.SpendCap == 0 || limits.Hard {
		return false
	}
	spent, err := store.Spent(x.r.Context(), x.key.id, limits.SpendPeriod)
	return err == nil && spent >= limits.SpendCap
}

var errOverCap = errors.New("the key has reached its spend cap meanwhile")

func overCap() *failure {
	return &failure{
		retriable: true, skipped: true, reason: "spend_cap", cause: errOverCap,
		tell: errorf(http.StatusPaymentRequired, "spend_limit_exceeded", "This API key has reached its spend cap."),
	}
}

// Prices that nobody asks, in USD per million tokens: these are amounts for one token, or for a million times as many.
const (
	leastPrice Money = usd / 10_000
	mostPrice  Money = 100_000 * usd
)

func (p *Price) check() error {
	if p == nil {
		return nil
	}
	if p.Request < 0 || p.Image < 0 {
		return errors.New("an amount is negative")
	}
	for _, amount := range []Money{p.Input, p.Output, p.cachedInput(), p.audioInput(), p.audioOutput()} {
		switch {
		case amount < 0:
			return errors.New("an amount is negative")
		case amount > 0 && amount < leastPrice, amount > mostPrice:
			return fmt.Errorf("%s is implausible: it is USD per million tokens, between %s and %s", amount, leastPrice, mostPrice)
		}
	}
	return nil
}
