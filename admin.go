package mesh

import (
	"cmp"
	"errors"
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2"
)

func init() { caddy.RegisterModule(adminAPI{}) }

// adminAPI adds to Caddy's admin endpoint what operators want to know of the gateway:
//
//	GET /mesh/health   the open stores, and whether each is degraded; 503 if one is
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
	return []caddy.AdminRoute{{Pattern: "/mesh/health", Handler: caddy.AdminHandlerFunc(health)}}
}

// storeStatus is how an open store is.
type storeStatus struct {
	Store     string `json:"store"`      // its kind, and where it is
	Degraded  bool   `json:"degraded"`   // it cannot be reached at the moment
	OnFailure string `json:"on_failure"` // what happens to requests meanwhile; empty where it cannot happen
	Waiting   int    `json:"waiting"`    // settlements that wait in a journal until it can be reached again
}

// eachOpenStore calls fn for each open store that has a status, with its key in stores.
func eachOpenStore(fn func(key string, s storeStatus)) {
	stores.Range(func(key, v any) bool {
		if s, ok := v.(interface{ status() storeStatus }); ok {
			fn(key.(string), s.status())
		}
		return true
	})
}

func health(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: errors.New("method not allowed")}
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
