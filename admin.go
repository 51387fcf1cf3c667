package mesh

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

func init() { caddy.RegisterModule(adminAPI{}) }

// adminAPI adds to Caddy's admin endpoint what operators want to know of the gateway, and to change in it:
//
//	GET    /mesh/health             the open stores, and whether each is degraded; 503 if one is
//	GET    /mesh/keys               the keys, by id: ?limit, ?after, ?owner
//	POST   /mesh/keys               creates a key, or a list of them; the answer has the secret
//	GET    /mesh/keys/{id}          a key, and what it has used; by its name, too, where no other has it
//	PATCH  /mesh/keys/{id}          changes what the body names; null takes it back
//	DELETE /mesh/keys/{id}          revokes a key
//	POST   /mesh/keys/{id}/rotate   gives a key a new secret; the old one is valid for {"grace": "1h"}
//
// Its errors have the form of Caddy's own. What is about a store takes the query parameter `store`, the store's name as in
// /mesh/health, where the running configuration has several.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.mesh",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes returns the routes of the API.
func (adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: "/mesh/health", Handler: caddy.AdminHandlerFunc(health)},
		{Pattern: "/mesh/usage", Handler: caddy.AdminHandlerFunc(adminUsage)},
		{Pattern: "/mesh/templates", Handler: caddy.AdminHandlerFunc(adminTemplates)},
		{Pattern: "/mesh/templates/", Handler: caddy.AdminHandlerFunc(adminTemplate)},
		{Pattern: keysPath, Handler: caddy.AdminHandlerFunc(serveKeys)},
		{Pattern: keysPath + "/", Handler: caddy.AdminHandlerFunc(serveKeys)},
	}
}

// running returns the mesh handlers of the running configuration.
func running() []*Handler {
	app, err := caddy.ActiveContext().AppIfConfigured("mesh")
	if err != nil {
		return nil // no site has a mesh block
	}
	return app.(*App).handlers
}

// managedStore returns the store that an admin request is about: the one it names, or the only one there is.
func managedStore(r *http.Request) (*storeRef, error) {
	if caddy.ActiveContext().Context == nil { // Caddy's admin endpoint is there before the first configuration is
		return nil, adminError(http.StatusServiceUnavailable, "no configuration is running yet")
	}
	asked := r.URL.Query().Get("store")
	found := make(map[string]*storeRef)
	for _, h := range running() {
		name := storeName(h.store.module.StoreKey())
		if found[name] == nil && (asked == "" || asked == name) {
			found[name] = h.store
		}
	}
	names := slices.Sorted(maps.Keys(found))
	switch {
	case len(names) == 1:
		return found[names[0]], nil
	case len(names) > 1:
		return nil, adminError(http.StatusBadRequest, "there are several stores; name one of them as `store`: %s", strings.Join(names, ", "))
	case asked != "":
		return nil, adminError(http.StatusNotFound, "the running configuration has no store %q", asked)
	}
	return nil, adminError(http.StatusNotFound, "the running configuration has no mesh handler")
}

func adminError(status int, format string, args ...any) error {
	return caddy.APIError{HTTPStatus: status, Err: fmt.Errorf(format, args...)}
}

// storeName returns what operators call the store with this StoreKey. The digest that the key of a redis store ends in is
// made of its password, among others.
func storeName(key string) string {
	if storeKind(key) != "redis" {
		return key
	}
	return key[:strings.LastIndexByte(key, ':')]
}

// storeStatus is how an open store is.
type storeStatus struct {
	Name      string `json:"name"`
	Store     string `json:"store"`      // its kind, and where it is
	Degraded  bool   `json:"degraded"`   // it cannot be reached at the moment
	OnFailure string `json:"on_failure"` // what happens to requests meanwhile; empty where it cannot happen
	Waiting   int    `json:"waiting"`    // settlements that wait in a journal until it can be reached again
}

// eachOpenStore calls fn for each open store that has a status, with its key in stores.
func eachOpenStore(fn func(key string, s storeStatus)) {
	stores.Range(func(key, v any) bool {
		if s, ok := v.(interface{ status() storeStatus }); ok {
			status := s.status()
			status.Name = storeName(key.(string))
			fn(key.(string), status)
		}
		return true
	})
}

func health(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return adminError(http.StatusMethodNotAllowed, "method not allowed")
	}
	answer := struct {
		Status string        `json:"status"` // ok or degraded
		Stores []storeStatus `json:"stores"`
	}{Status: "ok", Stores: []storeStatus{}}
	code := http.StatusOK
	eachOpenStore(func(_ string, s storeStatus) { answer.Stores = append(answer.Stores, s) })
	slices.SortFunc(answer.Stores, func(a, b storeStatus) int { return cmp.Compare(a.Store, b.Store) })
	if slices.ContainsFunc(answer.Stores, func(s storeStatus) bool { return s.Degraded }) {
		answer.Status, code = "degraded", http.StatusServiceUnavailable
	}
	return writeJSON(w, code, answer)
}

var _ caddy.AdminRouter = (*adminAPI)(nil)
