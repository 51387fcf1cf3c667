package mesh

import (
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// warn says what in the configuration is right and yet hardly meant. It is part of Provision, so that `caddy validate` says
// it too.
func (h *Handler) warn() {
	if len(h.Models) == 0 {
		h.logger.Warn("no model is configured, so that every request for one is refused")
	} else {
		h.warnOfIdleUpstreams()
	}
	now := time.Now()
	for i, k := range h.Keys {
		name := zap.String("key", nameOr(k.Name, i))
		if !k.Expires.IsZero() && !now.Before(k.Expires) {
			h.logger.Warn("a key has expired", name, zap.Time("expires", k.Expires))
		}
		if gone := h.notServed(k); len(gone) > 0 && len(h.Models) > 0 {
			h.logger.Warn("a key may use models of which none is configured", name, zap.Strings("models", gone))
		}
		if names := h.unpricedOf(k); len(names) > 0 && k.SpendCap > 0 {
			shown := names[:min(len(names), maxNamesInWarning)]
			h.logger.Warn("a key with a spend cap can use models without a price, which cost it nothing",
				name, zap.Strings("models", shown), zap.Int("more", len(names)-len(shown)))
		}
	}
}

// maxNamesInWarning keeps a line readable where a file lacks the prices of hundreds of models.
const maxNamesInWarning = 5

func (h *Handler) warnOfIdleUpstreams() {
	used := make(map[string]bool, len(h.Upstreams))
	for _, m := range h.Models {
		for _, t := range m.Targets {
			used[t.Upstream] = true
		}
	}
	for _, u := range h.Upstreams {
		if !used[u.Name] {
			h.logger.Warn("no model uses an upstream", zap.String("upstream", u.Name))
		}
	}
}

// notServed returns the names and patterns of a key's models that lead to no model.
func (h *Handler) notServed(k *Key) (gone []string) {
	for _, pattern := range k.Models {
		if !h.mayServe(pattern) {
			gone = append(gone, pattern)
		}
	}
	return gone
}

// mayServe reports whether a name, or one that a pattern covers, may be asked for.
func (h *Handler) mayServe(pattern string) bool {
	prefix, isPattern := strings.CutSuffix(pattern, "*")
	if !isPattern {
		return h.models.knows(pattern)
	}
	return slices.ContainsFunc(h.Models, func(m *Model) bool { return h.models.mayLead(prefix, m) })
}

// unpricedOf returns the names, and the patterns of models, by which a key can ask for what has no price.
func (h *Handler) unpricedOf(k *Key) (names []string) {
	allowed := k.Models
	if len(allowed) == 0 {
		allowed = []string{"*"}
	}
	for _, pattern := range allowed {
		prefix, isPattern := strings.CutSuffix(pattern, "*")
		if !isPattern {
			if e := h.models.find(pattern); e != nil && e.unpriced(pattern) {
				names = append(names, pattern)
			}
			continue
		}
		for _, m := range h.Models {
			if h.models.unpriced(m) && h.models.mayLead(prefix, m) {
				names = append(names, m.Name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
