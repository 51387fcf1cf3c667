package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// keyField is a field of a key's hash. Every field but the id may be missing or empty; the key then has the default.
type keyField struct {
	name  string
	read  func(k *Key, s string) error
	write func(k *Key) string // "" for the default
}

var keyFields = []keyField{
	{"id", readKeyID, func(k *Key) string { return k.id }},
	{"name", textField(func(k *Key) *string { return &k.Name }), func(k *Key) string { return k.Name }},
	{"owner", textField(func(k *Key) *string { return &k.Owner }), func(k *Key) string { return k.Owner }},
	{"rpm", countField(func(k *Key) *int64 { return &k.RPM }), func(k *Key) string { return unlessZero(k.RPM) }},
	{"rpd", countField(func(k *Key) *int64 { return &k.RPD }), func(k *Key) string { return unlessZero(k.RPD) }},
	{"tpm", countField(func(k *Key) *int64 { return &k.TPM }), func(k *Key) string { return unlessZero(k.TPM) }},
	{"max_concurrency", countField(func(k *Key) *int64 { return &k.MaxConcurrency }), func(k *Key) string { return unlessZero(k.MaxConcurrency) }},
	{"spend_cap_usd", readSpendCap, writeSpendCap},
	{"spend_period", textField(func(k *Key) *string { return (*string)(&k.SpendPeriod) }), func(k *Key) string { return string(k.SpendPeriod) }},
	{"spend_cap_hard", boolField(func(k *Key) *bool { return &k.HardCap }), func(k *Key) string { return ifTrue(k.HardCap) }},
	{"models", readKeyModels, writeKeyModels},
	{"default_model", readDefaultModel, func(k *Key) string { return k.DefaultModel }},
	{"default_params", readParams, func(k *Key) string { return writeObject(k.DefaultParams) }},
	{"metadata", readMetadata, func(k *Key) string { return writeObject(k.Metadata) }},
	{"expires", readExpires, writeExpires},
	{"suspended", boolField(func(k *Key) *bool { return &k.Suspended }), func(k *Key) string { return ifTrue(k.Suspended) }},
}

var keyFieldNames = func() (names []string) {
	for _, f := range keyFields {
		names = append(names, f.name)
	}
	return names
}()

// readKey reads the fields of a key in the order of keyFields; nil where there are none. Its errors name the key's
// id and the field.
func readKey(values []any) (*Key, error) {
	k := new(Key)
	found := false
	for i, f := range keyFields {
		value, ok := values[i].(string)
		found = found || ok
		if value == "" {
			continue
		}
		if err := f.read(k, value); err != nil {
			return nil, fmt.Errorf("key %s: %s: %w", k.id, f.name, err)
		}
	}
	if !found {
		return nil, nil
	}
	if k.id == "" {
		return nil, errors.New("key: id: it has none")
	}
	if err := k.checkTerms(); err != nil {
		return nil, fmt.Errorf("key %s: %w", k.id, err)
	}
	return k, nil
}

// writeKey is the inverse of readKey. It refuses what could not be read.
func writeKey(k *Key) (values []string, err error) {
	again := make([]any, len(keyFields))
	for i, f := range keyFields {
		values = append(values, f.write(k))
		again[i] = values[i]
	}
	_, err = readKey(again)
	return values, err
}

// readKeyID wants what can be a part of a Redis key's name, of a hash tag and of a URL.
func readKeyID(k *Key, s string) error {
	const longest = 64
	if len(s) > longest || strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
		return fmt.Errorf("%.64q is not up to %d letters, digits, hyphens, dots and underscores", s, longest)
	}
	k.id = s
	return nil
}

func textField(field func(*Key) *string) func(*Key, string) error {
	return func(k *Key, s string) error {
		*field(k) = s
		return nil
	}
}

func countField(field func(*Key) *int64) func(*Key, string) error {
	return func(k *Key, s string) error {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a number", s)
		}
		if n == 0 {
			return errZeroLimit
		}
		*field(k) = n
		return nil
	}
}

// errZeroLimit is for a limit that reads like "nothing at all" and would mean "no limit".
var errZeroLimit = errors.New("0 would refuse every request; to do that, suspend the key. A key without this limit has no such field")

func boolField(field func(*Key) *bool) func(*Key, string) error {
	return func(k *Key, s string) (err error) {
		if *field(k), err = strconv.ParseBool(s); err != nil {
			return fmt.Errorf("%q is neither true nor false", s)
		}
		return nil
	}
}

func unlessZero(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func ifTrue(b bool) string {
	if !b {
		return ""
	}
	return "true"
}

func readSpendCap(k *Key, s string) (err error) {
	k.SpendCap, err = ParseMoney(s)
	if err == nil && k.SpendCap == 0 {
		return errZeroLimit
	}
	return err
}

func writeSpendCap(k *Key) string {
	if k.SpendCap == 0 {
		return ""
	}
	return k.SpendCap.String()
}

var errNoModels = errors.New("the list is empty; a key that may use all models has no such field")

func readKeyModels(k *Key, s string) error {
	if err := json.Unmarshal([]byte(s), &k.Models); err != nil {
		return fmt.Errorf("not a JSON list of names: %w", err)
	}
	if len(k.Models) == 0 {
		return errNoModels
	}
	return nil
}

func writeKeyModels(k *Key) string {
	if len(k.Models) == 0 {
		return ""
	}
	encoded, _ := encodeJSON(k.Models) // strings only: cannot fail
	return string(encoded)
}

func readDefaultModel(k *Key, s string) error {
	k.DefaultModel = s
	return checkName(s)
}

func readParams(k *Key, s string) error { return readObject(s, &k.DefaultParams) }

func readMetadata(k *Key, s string) error { return readObject(s, &k.Metadata) }

func readObject(s string, to any) error {
	if err := json.Unmarshal([]byte(s), to); err != nil {
		return fmt.Errorf("not a JSON object of what belongs there: %w", err)
	}
	return nil
}

func writeObject[M ~map[string]T, T any](object M) string {
	if len(object) == 0 {
		return ""
	}
	encoded, _ := encodeJSON(object) // strings, and JSON that was checked: cannot fail
	return string(encoded)
}

func readExpires(k *Key, s string) (err error) {
	k.Expires, err = time.Parse(time.RFC3339, s)
	return err
}

func writeExpires(k *Key) string {
	if k.Expires.IsZero() {
		return ""
	}
	return k.Expires.UTC().Format(time.RFC3339Nano)
}
