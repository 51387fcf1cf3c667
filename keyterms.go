package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"
)

// keyTerm is a member of the JSON that says what a key may do.
type keyTerm struct {
	name string
	is   string // what its value has to be
	of   func(k *Key) any
}

var keyTerms = []keyTerm{
	{"name", "a string", func(k *Key) any { return &k.Name }},
	{"owner", "a string", func(k *Key) any { return &k.Owner }},
	{"rpm", "a whole number", func(k *Key) any { return &k.RPM }},
	{"rpd", "a whole number", func(k *Key) any { return &k.RPD }},
	{"tpm", "a whole number", func(k *Key) any { return &k.TPM }},
	{"max_concurrency", "a whole number", func(k *Key) any { return &k.MaxConcurrency }},
	{"spend_cap_usd", `an amount of USD as a string, such as "25.00"`, func(k *Key) any { return &k.SpendCap }},
	{"spend_cap_hard", "true or false", func(k *Key) any { return &k.HardCap }},
	{"spend_period", "a string", func(k *Key) any { return &k.SpendPeriod }},
	{"models", "a list of strings", func(k *Key) any { return &k.Models }},
	{"default_model", "a string", func(k *Key) any { return &k.DefaultModel }},
	{"default_params", "an object", func(k *Key) any { return &k.DefaultParams }},
	{"expires", "a time as RFC 3339 writes it, such as 2027-01-01T00:00:00Z", func(k *Key) any { return &k.Expires }},
	{"suspended", "true or false", func(k *Key) any { return &k.Suspended }},
	{"metadata", "an object of strings", func(k *Key) any { return &k.Metadata }},
}

var errNoField = errors.New("a key has no such field")

// termNamed returns the term of a name, or nil.
func termNamed(name string) *keyTerm {
	i := slices.IndexFunc(keyTerms, func(t keyTerm) bool { return t.name == name })
	if i < 0 {
		return nil
	}
	return &keyTerms[i]
}

// changeTerms has a key be as the members say; null takes back what was said before. What it does not name stays. Its errors
// name the member.
func (k *Key) changeTerms(members map[string]json.RawMessage) error {
	for _, name := range slices.Sorted(maps.Keys(members)) {
		t := termNamed(name)
		if t == nil {
			return fmt.Errorf("%s: %w", name, errNoField)
		}
		if err := t.set(k, members[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if k.DefaultModel != "" {
		if err := checkName(k.DefaultModel); err != nil {
			return fmt.Errorf("default_model: %w", err)
		}
	}
	return k.checkTerms()
}

func (t *keyTerm) set(k *Key, value json.RawMessage) error {
	field := reflect.ValueOf(t.of(k)).Elem()
	field.SetZero() // a map would be added to, which others may be reading
	if string(value) == "null" {
		return nil
	}
	err := json.Unmarshal(value, t.of(k))
	if _, isTime := t.of(k).(*time.Time); err != nil && (isTime || isWrongKind(err)) {
		return fmt.Errorf("%.100s is not %s", value, t.is)
	}
	if err != nil {
		return err
	}
	switch v := t.of(k).(type) {
	case *int64, *Money:
		if field.IsZero() {
			return errZeroLimit
		}
	case *[]string:
		if len(*v) == 0 {
			return errNoModels
		}
	}
	return nil
}

func isWrongKind(err error) bool {
	_, wrong := errors.AsType[*json.UnmarshalTypeError](err)
	return wrong
}
