package mesh

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

const (
	keysPath = "/mesh/keys"

	keysTimeout     = 30 * time.Second
	maxKeysBody     = 8 << 20 // bytes
	maxCreated      = 1000    // keys in one request
	defaultKeysPage = 100
	maxKeysPage     = 1000
)

// keysRequest is a request about the keys of one store.
type keysRequest struct {
	KeyManager
	*http.Request
	w        http.ResponseWriter
	handlers []*Handler // that use the store
}

// serveKeys serves everything below /mesh/keys.
func serveKeys(w http.ResponseWriter, r *http.Request) error {
	ref, err := managedStore(r)
	if err != nil {
		return err
	}
	store, err := ref.acquire()
	if err != nil {
		return adminError(http.StatusServiceUnavailable, "the store cannot be opened: %w", err)
	}
	defer ref.release() //nolint:errcheck // the running configuration has it open
	manager, ok := store.(KeyManager)
	if !ok {
		return adminError(http.StatusNotImplemented, "this store has no keys of its own")
	}
	ctx, cancel := context.WithTimeout(r.Context(), keysTimeout)
	defer cancel()
	k := &keysRequest{KeyManager: manager, Request: r.WithContext(ctx), w: w}
	for _, h := range running() {
		if h.store.module.StoreKey() == ref.module.StoreKey() {
			k.handlers = append(k.handlers, h)
		}
	}
	k.Body = http.MaxBytesReader(w, r.Body, maxKeysBody)
	return keysError(k.serve())
}

func (k *keysRequest) serve() error {
	id, action, _ := strings.Cut(strings.Trim(strings.TrimPrefix(k.URL.Path, keysPath), "/"), "/")
	switch {
	case id == "" && k.Method == http.MethodGet:
		return k.list()
	case id == "" && k.Method == http.MethodPost:
		return k.create()
	case action == "rotate" && k.Method == http.MethodPost:
		return k.rotate(id)
	case action != "" && action != "rotate":
		return adminError(http.StatusNotFound, "there is nothing at %s", k.URL.Path)
	case id != "" && action == "" && k.Method == http.MethodGet:
		return k.show(id)
	case id != "" && action == "" && k.Method == http.MethodPatch:
		return k.change(id)
	case id != "" && action == "" && k.Method == http.MethodDelete:
		return k.revoke(id)
	}
	return adminError(http.StatusMethodNotAllowed, "method not allowed")
}

// keysError gives an error of a store its status.
func keysError(err error) error {
	if ready, ok := errors.AsType[caddy.APIError](err); ok {
		return ready // Caddy looks no deeper
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNoSuchKey):
		return adminError(http.StatusNotFound, "%w", err)
	case errors.Is(err, errByHand):
		return adminError(http.StatusConflict, "%w", err)
	case errors.Is(err, errUnavailable):
		return adminError(http.StatusServiceUnavailable, "%w", err)
	}
	return adminError(http.StatusInternalServerError, "%w", err)
}

// body reads the request's JSON, which must have nothing behind it.
func (k *keysRequest) body(to any) error {
	text, err := io.ReadAll(k.Body)
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return adminError(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", maxKeysBody)
	}
	if err != nil {
		return adminError(http.StatusBadRequest, "reading the body: %w", err)
	}
	if err := json.Unmarshal(text, to); err != nil {
		return adminError(http.StatusBadRequest, "the body is not what it should be: %w", err)
	}
	return nil
}

// create creates a key, or as many as there are in a list: all of them, or none where one is wrong.
func (k *keysRequest) create() error {
	var body json.RawMessage
	if err := k.body(&body); err != nil {
		return err
	}
	asked, isList, err := askedKeys(body)
	if err != nil {
		return err
	}
	keys, views := make([]*StoredKey, len(asked)), make([]keyView, len(asked))
	for i, members := range asked {
		var terms Key
		if err := terms.changeTerms(members); err != nil {
			if isList {
				err = fmt.Errorf("key %d: %w", i+1, err)
			}
			return adminError(http.StatusBadRequest, "%w", err)
		}
		var secret string
		keys[i], secret = newStoredKey(terms)
		views[i] = viewOf(keys[i], sourceStore)
		views[i].Secret, views[i].Warnings = secret, k.warnings(&terms)
	}
	if err := k.CreateKeys(k.Context(), keys); err != nil {
		return fmt.Errorf("creating keys: %w", err)
	}
	if isList {
		return writeJSON(k.w, http.StatusCreated, map[string]any{"keys": views})
	}
	return writeJSON(k.w, http.StatusCreated, views[0])
}

// askedKeys reads what keys are to be like.
func askedKeys(body []byte) (asked []map[string]json.RawMessage, isList bool, err error) {
	if isList = bytes.HasPrefix(bytes.TrimSpace(body), []byte("[")); isList {
		err = json.Unmarshal(body, &asked)
	} else {
		asked = make([]map[string]json.RawMessage, 1)
		err = json.Unmarshal(body, &asked[0])
	}
	if err != nil {
		return nil, isList, adminError(http.StatusBadRequest, "the body is neither an object nor a list of them: %w", err)
	}
	if len(asked) > maxCreated {
		return nil, isList, adminError(http.StatusBadRequest, "%d keys in one request are too many; %d is the most", len(asked), maxCreated)
	}
	if slices.ContainsFunc(asked, func(members map[string]json.RawMessage) bool { return members == nil }) {
		return nil, isList, adminError(http.StatusBadRequest, "null is no key; one that may do everything is {}")
	}
	return asked, isList, nil
}

// warnings says which models of a key's the running configuration does not have. Another may have them: a key outlives many.
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
	return all
}

// configured returns the keys of the configuration, by id.
func (k *keysRequest) configured() map[string]*StoredKey {
	keys := make(map[string]*StoredKey)
	for _, h := range k.handlers {
		for _, key := range h.Keys {
			keys[key.id] = &StoredKey{Terms: *key}
		}
	}
	return keys
}

// list answers with a page of keys, those of the configuration among them. next is what to send as after for more.
func (k *keysRequest) list() error {
	query := k.URL.Query()
	limit, owner, after := defaultKeysPage, query.Get("owner"), query.Get("after")
	if text := query.Get("limit"); text != "" {
		var err error
		if limit, err = strconv.Atoi(text); err != nil || limit < 1 || limit > maxKeysPage {
			return adminError(http.StatusBadRequest, "limit: %q is not a number from 1 to %d", text, maxKeysPage)
		}
	}
	wanted := func(key *StoredKey) bool { return !query.Has("owner") || key.Terms.Owner == owner }
	var found []keyView
	for _, key := range k.configured() {
		if key.Terms.id > after && wanted(key) {
			found = append(found, viewOf(key, sourceConfig))
		}
	}
	stored, err := k.stored(after, limit+1, wanted)
	if err != nil {
		return fmt.Errorf("listing keys: %w", err)
	}
	for _, key := range stored {
		found = append(found, viewOf(key, sourceStore))
	}
	slices.SortFunc(found, func(a, b keyView) int { return cmp.Compare(a.ID, b.ID) })
	answer := struct {
		Keys []keyView `json:"keys"`
		Next string    `json:"next,omitempty"`
	}{Keys: found[:min(limit, len(found))]}
	if len(found) > limit {
		answer.Next = answer.Keys[limit-1].ID
	}
	if answer.Keys == nil {
		answer.Keys = []keyView{}
	}
	return writeJSON(k.w, http.StatusOK, answer)
}

// stored returns the first keys of the store, after an id, that are wanted.
func (k *keysRequest) stored(after string, limit int, wanted func(*StoredKey) bool) (found []*StoredKey, err error) {
	for len(found) < limit {
		page, err := k.ListKeys(k.Context(), after, maxKeysPage)
		if err != nil {
			return nil, err
		}
		for _, key := range page {
			if after = key.Terms.id; wanted(key) {
				found = append(found, key)
			}
		}
		if len(page) < maxKeysPage {
			break
		}
	}
	return found[:min(limit, len(found))], nil
}

func (k *keysRequest) show(id string) error {
	key, source := k.configured()[id], sourceConfig
	if key == nil {
		var err error
		if key, err = k.GetKey(k.Context(), id); err != nil {
			return fmt.Errorf("key %s: %w", id, err)
		}
		source = sourceStore
	}
	use, err := k.KeyUse(k.Context(), id)
	if err != nil {
		return fmt.Errorf("key %s: %w", id, err)
	}
	v := viewOf(key, source)
	v.setUse(use)
	v.Warnings = k.warnings(&key.Terms)
	return writeJSON(k.w, http.StatusOK, v)
}

// changeable refuses to change what the configuration says.
func (k *keysRequest) changeable(id string) error {
	if k.configured()[id] != nil {
		return adminError(http.StatusConflict, "key %s is in the configuration; change it there", id)
	}
	return nil
}

func (k *keysRequest) change(id string) error {
	if err := k.changeable(id); err != nil {
		return err
	}
	var members map[string]json.RawMessage
	if err := k.body(&members); err != nil {
		return err
	}
	changed, err := k.ChangeKey(k.Context(), id, func(key *StoredKey) error {
		if err := key.Terms.changeTerms(members); err != nil {
			return adminError(http.StatusBadRequest, "%w", err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("key %s: %w", id, err)
	}
	v := viewOf(changed, sourceStore)
	v.Warnings = k.warnings(&changed.Terms)
	return writeJSON(k.w, http.StatusOK, v)
}

func (k *keysRequest) rotate(id string) error {
	if err := k.changeable(id); err != nil {
		return err
	}
	var asked map[string]string
	if k.ContentLength != 0 {
		if err := k.body(&asked); err != nil {
			return err
		}
	}
	var grace time.Duration
	for name, text := range asked {
		var err error
		if name != "grace" {
			return adminError(http.StatusBadRequest, "%s: a rotation has no such field", name)
		}
		if grace, err = caddy.ParseDuration(text); err != nil || grace < 0 {
			return adminError(http.StatusBadRequest, "grace: %q is not a duration, such as 1h", text)
		}
	}
	digest, secret := newSecret()
	changed, err := k.ChangeKey(k.Context(), id, func(key *StoredKey) error {
		key.rotate(digest, grace, time.Now())
		return nil
	})
	if err != nil {
		return fmt.Errorf("key %s: %w", id, err)
	}
	v := viewOf(changed, sourceStore)
	v.Secret = secret
	return writeJSON(k.w, http.StatusOK, v)
}

func (k *keysRequest) revoke(id string) error {
	if err := k.changeable(id); err != nil {
		return err
	}
	if err := k.RevokeKey(k.Context(), id); err != nil {
		return fmt.Errorf("key %s: %w", id, err)
	}
	k.w.WriteHeader(http.StatusNoContent)
	return nil
}
