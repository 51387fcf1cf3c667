// Package mesh is a Caddy module that turns a site into an LLM gateway: an OpenAI-compatible API with its own keys,
// limits and accounting, whose bytes are carried by Caddy's own reverse_proxy.
package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(Handler{})
	caddy.RegisterModule(App{})
	httpcaddyfile.RegisterHandlerDirective("mesh", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("mesh", httpcaddyfile.Before, "reverse_proxy")
}

const (
	defaultModel       = "openai/gpt-4o"
	defaultMaxBodySize = 32_000_000
	defaultTimeout     = 300 * time.Second
)

// Handler turns a site into an LLM gateway: clients send OpenAI's chat completions with a key of the gateway's, and
// the upstream of the model they ask for answers them. It serves `/v1/chat/completions`, `/v1/chat/compare`, `/v1/chat/jobs`, `/v1/router/select`, `/v1/templates`, `/v1/usage` and `/v1/models`; every
// other path, and OPTIONS, goes to the next handler.
//
// It sets these placeholders, which the access log shows as the object `mesh` as well:
//
// Placeholder | Description
// ------------|-------------
// `{http.mesh.request_id}` | The request's id, as in the X-Request-Id header
// `{http.mesh.key.id}` | What identifies the key in the ledger; not a secret
// `{http.mesh.key.name}` | The key's name
// `{http.mesh.key.owner}` | The key's owner
// `{http.mesh.session_id}` | The session the client named
// `{http.mesh.model}` | The model that served
// `{http.mesh.upstream}` | The upstream that served
// `{http.mesh.attempts}` | How many upstreams were tried
// `{http.mesh.outcome}` | completed, error, timeout, cut or client_gone; refused where the request was not let through
// `{http.mesh.error}` | The code of the error the client got
// `{http.mesh.usage.prompt_tokens}` | Tokens of the prompt
// `{http.mesh.usage.cached_tokens}` | Those of them that the upstream had cached
// `{http.mesh.usage.completion_tokens}` | Tokens of the answer
// `{http.mesh.usage.total_tokens}` | Both
// `{http.mesh.usage.estimated}` | Whether the tokens are an estimate of the gateway's, because the upstream did not say
// `{http.mesh.cost}` | What the request cost, in USD
type Handler struct {
	// Where each key's counters and the ledger are kept. Default: `local`, an embedded database.
	StoreRaw json.RawMessage `json:"store,omitempty" caddy:"namespace=mesh.stores inline_key=module"`

	// The keys that clients may use.
	Keys []*Key `json:"keys,omitempty"`

	// The providers that answer.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// The models that clients may ask for, and who serves them. The most specific name wins.
	Models []*Model `json:"models,omitempty"`

	// Prompts that requests of all keys can name.
	Templates []*Template `json:"templates,omitempty"`

	// Files with such prompts, one in each, as JSON: paths, in which `*` stands for any name. They are read when the
	// configuration is loaded.
	TemplateFiles []string `json:"template_files,omitempty"`

	// Files that say what models cost, how long their context is and what they can do, in the format of LiteLLM's
	// `model_prices_and_context_window.json`. What a model here says of itself goes before them. They are read when a
	// configuration is loaded; a relative path starts at the folder that Caddy runs in.
	Prices []string `json:"prices,omitempty"`

	// The model of a request that names none and whose key has no default either. Default: `openai/gpt-4o`.
	DefaultModel string `json:"default_model,omitempty"`

	// How many bytes the body of a request may have. Default: 32 MB.
	MaxBodySize int64 `json:"max_body_size,omitempty"`

	// How long an upstream may take for its whole answer, unless the request says otherwise. Default: 5 minutes.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// How soon the answer of an upstream has to begin, a stream's with its first event, before the next one is asked.
	// Default: only the timeout counts.
	FirstByteTimeout caddy.Duration `json:"first_byte_timeout,omitempty"`

	// How /v1/chat/compare works.
	Compare *Compare `json:"compare,omitempty"`

	// How the gateway chooses the model of requests for the model `auto`. Default: there is no such model.
	Auto *Auto `json:"auto,omitempty"`

	// How requests with `async_mode` become jobs. They do by default.
	Async *Async `json:"async,omitempty"`

	// Whether answers say in X-Mesh-Upstream which upstream served them. Default: false.
	ExposeUpstream bool `json:"expose_upstream,omitempty"`

	// What is counted beside the metrics that are always there.
	Metrics *Metrics `json:"metrics,omitempty"`

	// What the gateway adds to the spans of Caddy's `tracing`.
	Tracing *Tracing `json:"tracing,omitempty"`

	store     *storeRef
	keys      keyring
	templates *TemplateShelf // of the configuration
	models    modelTable
	asks      *storeSeries
	answers   *answerLength
	pingEvery time.Duration
	usesUUID  bool // one of the upstreams' handlers does
	logger    *zap.Logger

	keepAliveEvery time.Duration
	async          asyncRules
	serves         string // what its requests mean: see modelsDigest
	jobs           *jobRunner
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.mesh",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets up the handler. It opens nothing: see App.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	h.answers, h.pingEvery, h.keepAliveEvery = new(answerLength), pingInterval, keepAliveInterval
	if err := h.check(); err != nil {
		return err
	}
	h.async, h.serves = h.Async.rules(), h.modelsDigest()
	h.jobs = newJobRunner(h)
	if err := collectors.register(ctx.GetMetricsRegistry()); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	if h.DefaultModel == "" {
		h.DefaultModel = defaultModel
	}
	if h.MaxBodySize == 0 {
		h.MaxBodySize = defaultMaxBodySize
	}
	if h.Timeout == 0 {
		h.Timeout = caddy.Duration(defaultTimeout)
	}
	if err := h.provisionStore(ctx); err != nil {
		return err
	}
	upstreams := make(map[string]*Upstream, len(h.Upstreams))
	for _, u := range h.Upstreams {
		h.usesUUID = h.usesUUID || bytes.Contains(u.HandlerRaw, []byte(uuidPlaceholder))
		if err := u.provision(ctx); err != nil {
			return fmt.Errorf("provisioning upstream %s: %w", u.Name, err)
		}
		upstreams[u.Name] = u
	}
	var err error
	h.models = newModelTable(h.Models, upstreams)
	h.models.auto = h.Auto != nil
	if len(h.Prices) > 0 {
		book, err := readPrices(h.Prices, h.logger)
		if err != nil {
			return err
		}
		h.models.addPrices(book)
	}
	if h.templates, err = h.configuredTemplates(); err != nil {
		return err
	}
	keys, err := newKeyring(h.Keys)
	if err != nil {
		return err
	}
	h.keys = keys
	h.warn()
	return nil
}

func (h *Handler) provisionStore(ctx caddy.Context) error {
	module, err := ctx.LoadModuleByID("mesh.stores.local", nil)
	if h.StoreRaw != nil {
		module, err = ctx.LoadModule(h, "StoreRaw")
	}
	if err != nil {
		return fmt.Errorf("loading store: %w", err)
	}
	h.store = &storeRef{module: module.(StoreModule)}
	h.asks = collectors.ofStore(storeKind(h.store.module.StoreKey()))
	app, err := ctx.App("mesh")
	if err != nil {
		return err
	}
	app.(*App).starts(h)
	return nil
}

// start opens the store, and says what is there.
func (h *Handler) start() error {
	if err := h.store.keep(); err != nil {
		return err
	}
	h.logger.Info("gateway started",
		zap.String("store", h.store.module.(caddy.Module).CaddyModule().ID.Name()),
		zap.Int("keys", len(h.Keys)),
		zap.Int("models", len(h.Models)),
		zap.Int("upstreams", len(h.Upstreams)))
	h.warnOfDetached()
	return h.jobs.start()
}

// Cleanup gives back what this configuration holds. Requests that are still under way keep the store open.
func (h *Handler) Cleanup() error {
	h.jobs.stop()
	endRequests()
	for _, u := range h.Upstreams {
		u.leaveHealth()
	}
	if h.store == nil {
		return nil
	}
	return h.store.letGo()
}

// configError is an error in one part of the configuration.
type configError struct {
	part any // *Key, *Upstream, *Model, *Target, a pointer to a field; nil for the handler as a whole
	err  error
}

func (e *configError) Error() string { return e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

// errNull is for JSON that has null in place of a part.
var errNull = errors.New("it is null")

func wrongf(part any, format string, args ...any) error {
	return &configError{part: part, err: fmt.Errorf(format, args...)}
}

// check finds what is wrong with the configuration as it is written, before any placeholder is resolved. What it
// returns is a *configError.
func (h *Handler) check() error {
	if h.MaxBodySize < 0 {
		return wrongf(nil, "max_body_size: %d is negative", h.MaxBodySize)
	}
	if h.Timeout < 0 {
		return wrongf(nil, "timeout: %s is negative", time.Duration(h.Timeout))
	}
	if h.FirstByteTimeout < 0 {
		return wrongf(nil, "first_byte_timeout: %s is negative", time.Duration(h.FirstByteTimeout))
	}
	upstreams := make(map[string]bool, len(h.Upstreams))
	for i, u := range h.Upstreams {
		if u == nil {
			return wrongf(nil, "upstream #%d: %w", i+1, errNull)
		}
		if err := u.check(); err != nil {
			return wrongf(u, "upstream %s: %w", nameOr(u.Name, i), err)
		}
		if upstreams[u.Name] {
			return wrongf(u, "upstream %s is defined twice", u.Name)
		}
		upstreams[u.Name] = true
	}
	models := make(map[string]bool, len(h.Models))
	for i, m := range h.Models {
		if m == nil {
			return wrongf(nil, "model #%d: %w", i+1, errNull)
		}
		if err := m.check(upstreams); err != nil {
			part := any(m)
			if inner, ok := errors.AsType[*configError](err); ok {
				part = inner.part
			}
			return wrongf(part, "model %s: %w", nameOr(m.Name, i), err)
		}
		if models[m.Name] {
			return wrongf(m, "model %s is defined twice", m.Name)
		}
		models[m.Name] = true
	}
	table := newModelTable(h.Models, nil)
	table.auto = h.Auto != nil
	if h.DefaultModel != "" && !table.knows(h.DefaultModel) {
		return wrongf(&h.DefaultModel, "default_model: no model matches %s", h.DefaultModel)
	}
	if err := h.checkFallbacks(table); err != nil {
		return err
	}
	if err := h.checkTemplates(table); err != nil {
		return err
	}
	if h.Compare != nil {
		if err := h.Compare.check(table); err != nil {
			return &configError{part: h.Compare, err: err}
		}
	}
	if h.Auto != nil {
		if err := h.Auto.check(table); err != nil {
			return &configError{part: h.Auto, err: err}
		}
	}
	if h.Async != nil {
		if err := h.Async.check(); err != nil {
			return &configError{part: h.Async, err: err}
		}
	}
	return h.checkKeys(table)
}

func (h *Handler) checkKeys(table modelTable) error {
	secrets := make(map[string]bool, len(h.Keys))
	for i, k := range h.Keys {
		if k == nil {
			return wrongf(nil, "key #%d: %w", i+1, errNull)
		}
		if err := k.check(table); err != nil {
			return wrongf(k, "key %s: %w", nameOr(k.Name, i), err)
		}
		if secrets[k.Secret] {
			return wrongf(k, "key %s is defined twice", nameOr(k.Name, i))
		}
		secrets[k.Secret] = true
	}
	return nil
}

// nameOr names a part of the configuration in an error: by its name, or by its place where it has none.
func nameOr(name string, i int) string {
	if name == "" {
		return fmt.Sprintf("#%d", i+1)
	}
	return name
}

// ServeHTTP serves the gateway's endpoints and leaves everything else to next.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	e := findEndpoint(r.URL.Path)
	if e == nil || r.Method == http.MethodOptions {
		return next.ServeHTTP(w, r)
	}
	x := h.newExchange(w, r)
	defer x.leave()
	defer x.log()
	defer x.count()
	serve := e.method(r.Method)
	if serve == nil {
		return x.refuse(e.wrongMethod())
	}
	if refusal := serve(x); refusal != nil {
		return x.refuse(refusal)
	}
	return nil
}

// App starts what the mesh handlers of a configuration need. It has no settings of its own and need not be
// configured. It is there because a configuration is provisioned without being started when it is only validated,
// and only an app is told of the start. The gateway's events come from it.
type App struct {
	handlers []*Handler
	events   *caddyevents.App
	ctx      caddy.Context // events are emitted in it
	logger   *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "mesh",
		New: func() caddy.Module { return new(App) },
	}
}

func (a *App) starts(h *Handler) { a.handlers = append(a.handlers, h) }

// Start opens the handlers' stores.
func (a *App) Start() error {
	a.settleQueues()
	for _, h := range a.handlers {
		if err := h.start(); err != nil {
			return err
		}
	}
	return nil
}

// Stop ends the events of this configuration, and has its handlers begin no more jobs. Each handler's Cleanup lets go of
// its store.
func (a *App) Stop() error {
	var stopping sync.WaitGroup
	for _, h := range a.handlers {
		stopping.Go(h.jobs.stop)
	}
	if caddy.Exiting() {
		stopping.Go(exitJobs)
	}
	stopping.Wait()
	notices.leave(a)
	return nil
}

var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
	_ caddy.App                   = (*App)(nil)
)
