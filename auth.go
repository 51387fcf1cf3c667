package mesh

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Key is a credential that the gateway gives to a client, and what the client may do with it.
type Key struct {
	// The secret: `rsk_` and a 26-character ULID, or `sha256:` and the hexadecimal SHA-256 of such a key, written
	// with its ULID in capitals. May be a placeholder, such as `{env.TEAM_A_KEY}`, which is resolved at start.
	Secret string `json:"key,omitempty"`

	// What the key is called in logs and reports.
	Name string `json:"name,omitempty"`

	// Whom it belongs to.
	Owner string `json:"owner,omitempty"`

	// How many requests it may make in each UTC minute. Default: no limit.
	RPM int64 `json:"rpm,omitempty"`

	// How many requests it may make in each UTC day. Default: no limit.
	RPD int64 `json:"rpd,omitempty"`

	// How many tokens, of prompts and answers, it may use in each UTC minute. They are counted when a request has ended: a
	// request is let through while those of its minute are below the limit. Default: no limit.
	TPM int64 `json:"tpm,omitempty"`

	// How many of its requests may be under way at the same time. Default: no limit.
	MaxConcurrency int64 `json:"max_concurrency,omitempty"`

	// How much it may spend in each spend_period, in USD, as a decimal string. The cap is soft, unless spend_cap_hard is
	// set: a request that begins below it runs to its end. Default: no limit.
	SpendCap Money `json:"spend_cap_usd,omitempty"`

	// Whether spend never passes the cap. Then a request sets aside the most it can cost until it has ended, and is
	// refused where the cap has no room for that. The most is every byte of the prompt as a token, and the max_tokens that
	// the client asks for, or else the model's context_length; a request to a priced model with neither is refused.
	// Default: false.
	HardCap bool `json:"spend_cap_hard,omitempty"`

	// The period of spend_cap_usd: `total`, or the UTC `day` or `month`. Default: `total`.
	SpendPeriod Period `json:"spend_period,omitempty"`

	// The models it may use, by name or by pattern (`openai/*`). Default: all.
	Models []string `json:"models,omitempty"`

	// The model of a request that names none.
	DefaultModel string `json:"default_model,omitempty"`

	// Inference parameters of its requests, such as `temperature`, where they do not set them themselves.
	DefaultParams Params `json:"default_params,omitempty"`

	// What else is to be known of the key: up to 32 values of up to 512 bytes, by names of up to 64 bytes.
	Metadata map[string]string `json:"metadata,omitempty"`

	// When it stops being valid. Default: never.
	Expires time.Time `json:"expires,omitzero"`

	// Whether it is refused for now.
	Suspended bool `json:"suspended,omitempty"`

	// What identifies it in the store: the front half of its digest, or, of a key of the store, what that says. It
	// stays the same when the secret is changed there.
	id string
}

const (
	keyPrefix    = "rsk_"
	keyLength    = len(keyPrefix) + 26
	digestPrefix = "sha256:"
)

// check finds what is wrong with the key as it is written. A secret that is a placeholder is left to newKeyring.
func (k *Key) check(models modelTable) error {
	if !strings.Contains(k.Secret, "{") {
		if _, err := digestOf(k.Secret); err != nil {
			return err
		}
	}
	if err := k.checkTerms(); err != nil {
		return err
	}
	if k.DefaultModel != "" && !models.knows(k.DefaultModel) {
		return fmt.Errorf("default_model: no model matches %s", k.DefaultModel)
	}
	return nil
}

// checkTerms finds what is wrong with what the key may do, wherever it is kept. Its errors name the field.
func (k *Key) checkTerms() error {
	switch {
	case k.RPM < 0:
		return fmt.Errorf("rpm: %d is negative", k.RPM)
	case k.RPD < 0:
		return fmt.Errorf("rpd: %d is negative", k.RPD)
	case k.TPM < 0:
		return fmt.Errorf("tpm: %d is negative", k.TPM)
	case k.MaxConcurrency < 0:
		return fmt.Errorf("max_concurrency: %d is negative", k.MaxConcurrency)
	case k.SpendCap < 0:
		return fmt.Errorf("spend_cap_usd: %s is negative", k.SpendCap)
	case k.HardCap && k.SpendCap == 0:
		return errors.New("spend_cap_hard needs spend_cap_usd beside it")
	}
	if err := k.SpendPeriod.check(); err != nil {
		return err
	}
	for _, pattern := range k.Models {
		if err := checkPattern(pattern); err != nil {
			return fmt.Errorf("models: %w", err)
		}
	}
	if k.DefaultModel != "" && !k.allows(k.DefaultModel) {
		return fmt.Errorf("default_model: %s is not among the key's own models", k.DefaultModel)
	}
	if err := k.DefaultParams.check(); err != nil {
		return fmt.Errorf("default_params: %w", err)
	}
	return checkMetadata(k.Metadata)
}

func checkMetadata(metadata map[string]string) error {
	const most, longestName, longestValue = 32, 64, 512
	if len(metadata) > most {
		return fmt.Errorf("metadata: it has %d entries, and %d is the most", len(metadata), most)
	}
	for _, name := range slices.Sorted(maps.Keys(metadata)) {
		switch {
		case name == "" || len(name) > longestName:
			return fmt.Errorf("metadata: the name %.64q is not one of 1 to %d bytes", name, longestName)
		case len(metadata[name]) > longestValue:
			return fmt.Errorf("metadata: the value of %s is longer than %d bytes", name, longestValue)
		}
	}
	return nil
}

// allows reports whether the key may use a model.
func (k *Key) allows(model string) bool {
	if len(k.Models) == 0 {
		return true
	}
	for _, pattern := range k.Models {
		if matches(pattern, model) {
			return true
		}
	}
	return false
}

func (k *Key) limits() Limits {
	return Limits{
		RPM:            k.RPM,
		RPD:            k.RPD,
		TPM:            k.TPM,
		MaxConcurrency: k.MaxConcurrency,
		SpendCap:       k.SpendCap,
		SpendPeriod:    k.SpendPeriod,
		Hard:           k.HardCap,
	}
}

type digest [sha256.Size]byte

// keyring finds keys by the digest of their secret. The secrets themselves are not in memory.
type keyring map[digest]*Key

// newKeyring resolves the placeholders in the secrets.
func newKeyring(keys []*Key) (keyring, error) {
	ring := make(keyring, len(keys))
	for i, k := range keys {
		secret, err := caddy.NewReplacer().ReplaceOrErr(k.Secret, true, true)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", nameOr(k.Name, i), err)
		}
		d, err := digestOf(strings.TrimSpace(secret))
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", nameOr(k.Name, i), err)
		}
		if other := ring[d]; other != nil {
			return nil, fmt.Errorf("key %s has the same secret as another key (%s)", nameOr(k.Name, i), other.Name)
		}
		k.id = hex.EncodeToString(d[:len(d)/2])
		ring[d] = k
	}
	return ring, nil
}

var errBadSecret = errors.New("a key is rsk_ and a 26-character ULID, or sha256: and 64 hexadecimal digits")

// digestOf reads a secret as a configuration gives it. It never returns the secret in an error.
func digestOf(secret string) (d digest, err error) {
	if encoded, ok := strings.CutPrefix(secret, digestPrefix); ok {
		raw, err := hex.DecodeString(encoded)
		if err != nil || len(raw) != len(d) {
			return d, errBadSecret
		}
		return digest(raw), nil
	}
	d, ok := digestOfToken(secret)
	if !ok {
		return d, errBadSecret
	}
	return d, nil
}

// digestOfToken checks the form of a client's token and returns the digest of it with its ULID in capitals, as Crockford's
// base32 is case insensitive. What does not have the form of a key never reaches a store.
func digestOfToken(token string) (d digest, ok bool) {
	if len(token) != keyLength || !strings.EqualFold(token[:len(keyPrefix)], keyPrefix) {
		return d, false
	}
	var canonical [keyLength]byte
	copy(canonical[:], keyPrefix)
	for i := len(keyPrefix); i < keyLength; i++ {
		c := token[i]
		if 'a' <= c && c <= 'z' {
			c -= 'a' - 'A'
		}
		if strings.IndexByte("0123456789ABCDEFGHJKMNPQRSTVWXYZ", c) < 0 {
			return d, false
		}
		canonical[i] = c
	}
	return sha256.Sum256(canonical[:]), true
}

// bearer returns the digest of the secret that a request was sent with.
func bearer(r *http.Request) (secret digest, ok bool) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return secret, false
	}
	return digestOfToken(strings.Trim(token, " "))
}

// noBearer is the error for a request that bearer finds no secret in.
func noBearer(r *http.Request) *apiError {
	switch sent := r.Header.Get("Authorization"); {
	case sent == "", strings.EqualFold(strings.TrimSpace(sent), "Bearer"):
		return errMissingKey
	}
	return errMalformedKey
}

// findKey returns the key with a secret of this digest, or nil: one of the configuration, or else one of the store.
// An error means that the store could not say. Looking a digest up tells by its timing nothing of use: whoever can
// choose digests can invert SHA-256.
func (h *Handler) findKey(ctx context.Context, secret digest) (*Key, error) {
	if k := h.keys[secret]; k != nil || h.store.withoutKeys() {
		return k, nil
	}
	store, err := h.store.acquire()
	if err != nil {
		return nil, err
	}
	defer h.releaseStore()
	keys, ok := store.(KeyStore)
	if !ok {
		return nil, nil
	}
	return keys.FindKey(ctx, secret)
}

// refusal is the error for a key that may not be used at present, or nil.
func (k *Key) refusal(now time.Time) *apiError {
	switch {
	case k == nil:
		return errUnknownKey
	case !k.Expires.IsZero() && !now.Before(k.Expires):
		return errExpired
	case k.Suspended:
		return errSuspended
	}
	return nil
}
