package mesh

import (
	"encoding/json"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// upstream parses an upstream. Its addresses go through reverse_proxy's own parser, so that they mean here what
// they mean there.
func (p *blockParser) upstream(h *Handler) error {
	u := new(Upstream)
	p.places[u] = *p.Dispenser
	name := p.Token()
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	u.Name = args[0]
	h.Upstreams = append(h.Upstreams, u)
	addresses, err := args[1:], error(nil)
	if len(addresses) > 0 && addresses[0] == "preset" {
		if addresses, err = p.preset(u, addresses[1:]); err != nil {
			return err
		}
	}
	if addresses, err = p.splitAddresses(u, addresses); err != nil {
		return err
	}
	var proxy, handle []caddyfile.Token // the segments of these words
	err = p.block(words{
		"api_key":           {parse: func() error { return p.text(&u.APIKey) }},
		"api_key_header":    {parse: func() error { return p.text(&u.APIKeyHeader) }},
		"no_stream_options": {parse: func() error { return p.flag(&u.NoStreamOptions) }},
		"provider":          {parse: func() error { return p.text(&u.Provider) }},
		"header":            {parse: func() error { return p.header(u) }, many: true},
		"on_hangup":         {parse: func() error { return p.onHangup(u) }},
		"base_path":         {parse: func() error { return p.text(&u.BasePath) }},
		"reverse_proxy":     {parse: func() error { proxy = p.NextSegment(); return nil }},
		"handle":            {parse: func() error { handle = p.NextSegment(); return nil }},
		"circuit":           {parse: func() error { return p.circuit(u) }},
	})
	switch {
	case err != nil:
		return err
	case handle != nil && (proxy != nil || len(addresses) > 0):
		return p.locate(wrongf(u, "upstream %s: handle stands in place of addresses and reverse_proxy", u.Name))
	case handle != nil:
		return p.handler(u, handle)
	case proxy != nil || len(addresses) > 0:
		return p.reverseProxy(u, name, addresses, proxy)
	}
	return p.locate(wrongf(u, "upstream %s needs an address", u.Name))
}

// onHangup parses cancel, free, or drain with its limits.
func (p *blockParser) onHangup(u *Upstream) error {
	args := p.RemainingArgs()
	if len(args) == 0 || len(args) > 3 || len(args) > 1 && args[0] != hangupDrain {
		return p.ArgErr()
	}
	u.OnHangup = &Hangup{Policy: args[0]}
	if len(args) > 1 {
		d, err := caddy.ParseDuration(args[1])
		if err != nil || d <= 0 {
			return p.Errf("%q is not a duration above zero, such as 30s", args[1])
		}
		u.OnHangup.DrainTimeout = caddy.Duration(d)
	}
	if len(args) > 2 {
		n, err := strconv.ParseInt(args[2], 10, 64)
		if err != nil || n < 1 {
			return p.Errf("%q is not a whole number above zero", args[2])
		}
		u.OnHangup.MaxDrains = n
	}
	if err := u.OnHangup.check(); err != nil {
		return p.WrapErr(err)
	}
	return nil
}

func (p *blockParser) header(u *Upstream) error {
	var name, value string
	if !p.AllArgs(&name, &value) {
		return p.ArgErr()
	}
	if u.Headers == nil {
		u.Headers = make(map[string]string)
	}
	if _, twice := u.Headers[name]; twice {
		return p.Errf("header %s is given twice", name)
	}
	u.Headers[name] = value
	return nil
}

// splitAddresses takes the path off each address, for which reverse_proxy has no place, and makes it the upstream's.
func (p *blockParser) splitAddresses(u *Upstream, addresses []string) (hosts []string, err error) {
	for i, address := range addresses {
		host, path := splitAddress(address)
		if i > 0 && path != u.BasePath {
			return nil, p.Errf("upstream %s: all of its addresses need the same path", u.Name)
		}
		u.BasePath = path
		hosts = append(hosts, host)
	}
	return hosts, nil
}

func splitAddress(address string) (host, path string) {
	if strings.HasPrefix(address, "unix/") || strings.HasPrefix(address, "unix+") {
		return address, "" // its slashes are those of the socket's path
	}
	from := 0
	if i := strings.Index(address, "://"); i >= 0 {
		from = i + len("://")
	}
	if i := strings.IndexByte(address[from:], '/'); i >= 0 {
		host, path = address[:from+i], address[from+i:]
		return host, strings.TrimSuffix(path, "/")
	}
	return address, ""
}

func rawHandler(handler caddyhttp.MiddlewareHandler) json.RawMessage {
	name := handler.(caddy.Module).CaddyModule().ID.Name()
	return caddyconfig.JSONModuleObject(handler, "handler", name, nil)
}

// reverseProxy makes the upstream's handler a reverse_proxy to addresses, with the options of the segment, if any.
func (p *blockParser) reverseProxy(u *Upstream, at caddyfile.Token, addresses []string, segment []caddyfile.Token) error {
	// The parser decides by file and line what belongs together: addresses and the brace of the block must stand on
	// one line.
	head := at
	head.Text = "reverse_proxy"
	if segment != nil {
		head, segment = segment[0], segment[1:]
	}
	tokens := []caddyfile.Token{head}
	for _, address := range addresses {
		head.Text = address
		tokens = append(tokens, head)
	}
	proxy := new(reverseproxy.Handler)
	if err := proxy.UnmarshalCaddyfile(caddyfile.NewDispenser(append(tokens, segment...))); err != nil {
		return err
	}
	if err := proxy.FinalizeUnmarshalCaddyfile(p.Helper); err != nil {
		return err
	}
	if len(proxy.Upstreams) == 0 && proxy.DynamicUpstreamsRaw == nil {
		return p.Errf("upstream %s needs an address", u.Name)
	}
	if proxy.TransportRaw == nil {
		// The transport that reverse_proxy makes for itself is not cleaned up: after a reload its idle connections would
		// stay open for two minutes more.
		proxy.TransportRaw = caddyconfig.JSONModuleObject(new(reverseproxy.HTTPTransport), "protocol", "http", nil)
	}
	u.HandlerRaw = rawHandler(proxy)
	return nil
}

// handler makes the upstream's handler what the segment of a handle block says.
func (p *blockParser) handler(u *Upstream, segment []caddyfile.Token) error {
	handler, err := httpcaddyfile.ParseSegmentAsSubroute(p.WithDispenser(caddyfile.NewDispenser(segment)))
	if err != nil {
		return err
	}
	u.HandlerRaw = rawHandler(handler)
	return nil
}
