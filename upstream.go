package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Upstream is one provider of models.
type Upstream struct {
	// The name that models refer to.
	Name string `json:"name,omitempty"`

	// What the files of prices call the provider, in the names of models that begin with it. Default: the upstream's name.
	Provider string `json:"provider,omitempty"`

	// What stands before `/chat/completions` and `/images/generations` in its URLs, such as `/v1`; a query, where it needs one, goes with
	// every request.
	BasePath string `json:"base_path,omitempty"`

	// The provider's API key. May be a placeholder, such as `{env.OPENAI_API_KEY}`, which is
	// resolved at start. Default: none is sent.
	APIKey string `json:"api_key,omitempty"`

	// The header that carries the API key as it is, such as Azure's `api-key`. Default: Authorization, as a bearer token.
	APIKeyHeader string `json:"api_key_header,omitempty"`

	// Whether it gets no stream_options, because it would refuse them. Where it does not report the usage of a stream on
	// its own, that is estimated then. Default: false.
	NoStreamOptions bool `json:"no_stream_options,omitempty"`

	// Headers that go with every request. Values may be placeholders, which are resolved at start.
	Headers map[string]string `json:"headers,omitempty"`

	// What becomes of a request whose client leaves before its end.
	OnHangup *Hangup `json:"on_hangup,omitempty"`

	// When it is left alone for a while because it fails.
	Circuit *Circuit `json:"circuit,omitempty"`

	// The handler that carries the request; normally `reverse_proxy`. Headers that it sets from
	// `{http.request.header.*}` are those of the client's request, its key included.
	HandlerRaw json.RawMessage `json:"handle,omitempty" caddy:"namespace=http.handlers inline_key=handler"`

	handler  caddyhttp.MiddlewareHandler
	path     string      // of BasePath
	query    string      // of BasePath
	host     string      // of Headers
	detached bool        // reverse_proxy would not cancel it when the client leaves
	header   http.Header // resolved, the API key with it; nil where the handler's transport has them

	rules     *Circuit // of Circuit, with its defaults
	health    *upstreamHealth
	healthKey string // while the configuration lives
}

func (u *Upstream) provider() string { return cmp.Or(u.Provider, u.Name) }

func (u *Upstream) check() error {
	if u.Name == "" {
		return errors.New("it needs a name")
	}
	if u.HandlerRaw == nil {
		return errors.New("it needs an address, or a handler")
	}
	if u.OnHangup != nil {
		if err := u.OnHangup.check(); err != nil {
			return err
		}
	}
	if err := u.Circuit.check(); err != nil {
		return err
	}
	_, err := u.base()
	return err
}

// base reads BasePath.
func (u *Upstream) base() (*url.URL, error) {
	if u.BasePath == "" {
		return new(url.URL), nil
	}
	base, err := url.Parse(u.BasePath)
	if err != nil || !strings.HasPrefix(u.BasePath, "/") || base.Host != "" || base.Fragment != "" {
		return nil, fmt.Errorf("base_path: %q is not the path of a URL", u.BasePath)
	}
	return base, nil
}

func (u *Upstream) provision(ctx caddy.Context) error {
	base, err := u.base()
	if err != nil {
		return err
	}
	u.path, u.query = strings.TrimSuffix(base.Path, "/"), base.RawQuery
	if u.OnHangup == nil {
		u.OnHangup = new(Hangup)
	}
	u.OnHangup.provision()
	u.rules = u.Circuit.withDefaults()
	u.shareHealth()
	header := make(http.Header, len(u.Headers)+1)
	if u.APIKey != "" {
		key, err := caddy.NewReplacer().ReplaceOrErr(u.APIKey, true, true)
		if err != nil {
			return fmt.Errorf("api_key: %w", err)
		}
		if key = strings.TrimSpace(key); u.APIKeyHeader != "" {
			header.Set(u.APIKeyHeader, key)
		} else {
			header.Set("Authorization", "Bearer "+key)
		}
	}
	for name, value := range u.Headers {
		resolved, err := caddy.NewReplacer().ReplaceOrErr(value, true, true)
		if err != nil {
			return fmt.Errorf("header %s: %w", name, err)
		}
		header.Set(name, resolved)
	}
	u.host = header.Get("Host") // which net/http has elsewhere
	header.Del("Host")
	handler, err := ctx.LoadModule(u, "HandlerRaw")
	if err != nil {
		return fmt.Errorf("loading its handler: %w", err)
	}
	u.handler = handler.(caddyhttp.MiddlewareHandler)
	if proxy, ok := handler.(*reverseproxy.Handler); ok {
		u.detached = proxy.FlushInterval < 0
		proxy.Transport = &concealingTransport{RoundTripper: proxy.Transport, header: header, host: u.host}
		return nil
	}
	u.header = header
	return nil
}

// concealingTransport adds the upstream's own headers, its credentials among them, below reverse_proxy. What
// reverse_proxy knows of a request it logs, with warnings too, and of the headers Caddy redacts only Authorization.
type concealingTransport struct {
	http.RoundTripper
	header http.Header
	host   string // empty: as it is
}

// RoundTrip sends r with the headers.
func (t *concealingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	out := new(http.Request)
	*out = *r
	out.Header = make(http.Header, len(r.Header)+len(t.header))
	maps.Copy(out.Header, r.Header)
	maps.Copy(out.Header, t.header)
	if t.host != "" {
		out.Host = t.host
	}
	return t.RoundTripper.RoundTrip(out)
}

// ProxyProtocolEnabled is for reverse_proxy, which asks its transport.
func (t *concealingTransport) ProxyProtocolEnabled() bool {
	inner, ok := t.RoundTripper.(reverseproxy.ProxyProtocolTransport)
	return ok && inner.ProxyProtocolEnabled()
}

// passedOn are the headers of a client that an upstream receives: what describes the request, and trace context.
// Cookies, credentials and everything else stay here.
var passedOn = []string{"Accept", "Content-Type", "User-Agent", "Traceparent", "Tracestate", "Baggage"}

// notAdded are the headers that reverse_proxy adds unless they are there and nil.
var notAdded = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

// outbound returns r as the upstream gets it at a path, under a context of its own and without a body.
func (u *Upstream) outbound(ctx context.Context, r *http.Request, path string) *http.Request {
	header := make(http.Header, 8) // as many as there mostly are; a map of more takes twice the room
	for _, name := range passedOn {
		if values := r.Header[name]; len(values) > 0 {
			header[name] = values
		}
	}
	header["Accept-Encoding"] = []string{"identity"} // the meter must be able to read the answer
	for _, name := range notAdded {
		header[name] = nil
	}
	maps.Copy(header, u.header)
	out := r.WithContext(ctx)
	out.Header = header
	out.Trailer = nil
	out.TransferEncoding = nil
	out.URL = &url.URL{Path: u.path + path, RawQuery: u.query}
	out.RequestURI = out.URL.RequestURI()
	out.Host = u.host // if empty, net/http takes that of the address reverse_proxy has chosen
	return out
}

var _ reverseproxy.ProxyProtocolTransport = (*concealingTransport)(nil)
