package mesh

import (
	"context"
	"maps"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// apart returns the client's request for something that runs at the same time as others in its course. What Caddy's
// handlers write into a request's context is its own: reverse_proxy keeps there what it has chosen. What the site's
// handlers have put there before, it has too; own has the {http.mesh.*} placeholders.
func (x *exchange) apart(ctx context.Context, own caddy.ReplacerFunc) *http.Request {
	r := x.r.WithContext(ctx)
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return r
	}
	x.gate.lock() // of pings, which write to the client
	defer x.gate.unlock()
	site := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if x.h.usesUUID {
		site.Get(uuidPlaceholder) // Caddy makes it when it is first asked for, which must not be by two at once
	}
	repl := caddy.NewReplacer()
	header := &answerTaker{header: x.w.Header().Clone()}
	r = caddyhttp.PrepareRequest(r, repl, header, server)
	vars := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	maps.Copy(vars, ctx.Value(caddyhttp.VarsCtxKey).(map[string]any))
	original := context.WithValue(r.Context(), caddyhttp.OriginalRequestCtxKey, ctx.Value(caddyhttp.OriginalRequestCtxKey))
	*r = *r.WithContext(original) // the replacer has the pointer
	repl.Map(own)
	repl.Map(siteValues(site))
	return r
}

const uuidPlaceholder = "http.request.uuid"

// siteValues provides what the replacer of the site's request has: captures of matchers, what `map` maps, and what
// other handlers have set. What reverse_proxy sets is of one attempt only. A Replacer may be read by several.
func siteValues(site *caddy.Replacer) caddy.ReplacerFunc {
	return func(name string) (any, bool) {
		if strings.HasPrefix(name, "http.reverse_proxy.") {
			return nil, false
		}
		return site.Get(name)
	}
}

// placeholder returns the value of one of the {http.mesh.*} placeholders.
func (x *exchange) placeholder(name string) (any, bool) {
	x.asking.Lock()
	defer x.asking.Unlock()
	return x.event.placeholder(name)
}

// besides returns a context for asking a candidate at the same time as others. Its placeholders are those of now.
func (x *exchange) besides(c *candidate) context.Context {
	event := x.event
	event.Upstream = c.upstream.Name
	return x.apart(x.r.Context(), event.placeholder).Context()
}
