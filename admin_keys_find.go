package mesh

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// find returns the key of an id, or else the only one of a name.
func (k *keysRequest) find(asked string) (key *StoredKey, source string, err error) {
	configured := k.configured()
	if key = configured[asked]; key != nil {
		return key, sourceConfig, nil
	}
	key, err = k.GetKey(k.Context(), asked)
	if !errors.Is(err, errNoSuchKey) {
		return key, sourceStore, err
	}
	named := func(key *StoredKey) bool { return key.Terms.Name == asked }
	found, err := k.stored("", 2, named)
	if err != nil {
		return nil, "", err
	}
	source = sourceStore
	for _, key := range configured {
		if named(key) {
			found, source = append(found, key), sourceConfig
		}
	}
	var ids []string
	for _, key := range found {
		ids = append(ids, key.Terms.id)
	}
	if err := onlyOne(asked, ids); err != nil {
		return nil, "", err
	}
	return found[0], source, nil
}

// onlyOne refuses a name that no key has, or more than one.
func onlyOne(name string, ids []string) error {
	switch len(ids) {
	case 0:
		return errNoSuchKey
	case 1:
		return nil
	}
	slices.Sort(ids)
	return adminError(http.StatusBadRequest, "several keys are called %q, such as %s; give an id", name, strings.Join(ids[:2], " and "))
}

// reported returns the id of the key that a report is asked for by id or name. A key that was revoked has its usage still.
func (k *keysRequest) reported(asked string, used map[string]KeyLabel) (id string, err error) {
	if _, isID := used[asked]; isID {
		return asked, nil
	}
	key, _, err := k.find(asked)
	if err == nil {
		return key.Terms.id, nil
	}
	if !errors.Is(err, errNoSuchKey) {
		return "", err
	}
	var ids []string
	for id, label := range used {
		if label.Name == asked {
			ids = append(ids, id)
		}
	}
	if err := onlyOne(asked, ids); err != nil {
		return "", fmt.Errorf("key %s: %w", asked, err)
	}
	return ids[0], nil
}
