package mesh

import (
	"fmt"
	"slices"
	"strings"
)

// warnings says which models of a key's the running configuration does not have, and which cost it nothing. Another may have
// them, or prices: a key outlives many.
func (k *keysRequest) warnings(terms *Key) (all []string) {
	if len(k.handlers) == 0 {
		return nil
	}
	for _, pattern := range terms.Models {
		if !slices.ContainsFunc(k.handlers, func(h *Handler) bool { return h.mayServe(pattern) }) {
			all = append(all, fmt.Sprintf("models: the running configuration has no model for %s", pattern))
		}
	}
	name := terms.DefaultModel
	if name != "" && !slices.ContainsFunc(k.handlers, func(h *Handler) bool { return h.models.knows(name) }) {
		all = append(all, fmt.Sprintf("default_model: the running configuration has no model %s", name))
	}
	if free := k.unpriced(terms); len(free) > 0 {
		all = append(all, "spend_cap_usd: the key may use models without a price, which cost it nothing: "+strings.Join(free, ", "))
	}
	return all
}

// unpriced returns the models that are outside of a key's spend cap: some of them, where they are many.
func (k *keysRequest) unpriced(terms *Key) (names []string) {
	if terms.SpendCap == 0 {
		return nil
	}
	for _, h := range k.handlers {
		names = append(names, h.unpricedOf(terms)...)
	}
	slices.Sort(names)
	const most = 10
	if names = slices.Compact(names); len(names) > most {
		names = append(names[:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return names
}
