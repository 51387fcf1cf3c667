package mesh

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/oklog/ulid/v2"
)

// KeyManager is a KeyStore whose keys can be changed while the gateway runs. What it has confirmed holds: it survives a
// crash at any time, and every instance acts on it within a second. A crash before leaves a key as it was or as it was to
// become.
type KeyManager interface {
	KeyStore

	// CreateKeys stores new keys.
	CreateKeys(ctx context.Context, keys []*StoredKey) error

	// ListKeys returns up to limit keys whose id comes after the one given, in the order of their ids.
	ListKeys(ctx context.Context, after string, limit int) ([]*StoredKey, error)

	// GetKey returns the key of an id, or errNoSuchKey.
	GetKey(ctx context.Context, id string) (*StoredKey, error)

	// ChangeKey stores a key as change leaves it, which may be called more than once, and returns it. No other change comes
	// between. An error of change is returned as it is, and leaves the key as it was.
	ChangeKey(ctx context.Context, id string, change func(*StoredKey) error) (*StoredKey, error)

	// RevokeKey deletes a key and all its secrets. Its spend and its entries in the ledger stay.
	RevokeKey(ctx context.Context, id string) error

	// KeyUse returns what a key has used, be it of the store or of the configuration.
	KeyUse(ctx context.Context, id string) (KeyUse, error)
}

// StoredKey is a key that a store keeps: what it may do, and by which secrets it is known. The secrets are not there, only
// their SHA-256.
type StoredKey struct {
	Terms   Key // without the secret
	Created time.Time

	secret   digest
	old      digest // of a secret that is valid until oldUntil; zero where there is none
	oldUntil time.Time

	byHand []digest // the hashes in Redis that somebody has written by hand for it, if that is what it is made of
}

// KeyUse is what a key has used up to now.
type KeyUse struct {
	Total, Month, Day           Money // spent
	RequestsMinute, RequestsDay int64
	TokensMinute                int64 // counted while the key has a limit for them
	UnderWay                    int64 // requests; known while the key has a limit for them
}

var errNoSuchKey = errors.New("there is no such key")

// newStoredKey makes up an id and a secret for a key.
func newStoredKey(terms Key) (k *StoredKey, secret string) {
	k = &StoredKey{Terms: terms, Created: time.Now().UTC().Truncate(time.Millisecond)}
	k.Terms.id = "key_" + ulid.Make().String()
	k.secret, secret = newSecret()
	return k, secret
}

// newSecret makes up a secret, of which 80 bits are random.
func newSecret() (d digest, secret string) {
	secret = keyPrefix + ulid.MustNew(ulid.Now(), rand.Reader).String()
	d, _ = digestOfToken(secret)
	return d, secret
}

// rotate gives the key another secret. The one it has stays valid for grace; one that is valid from an earlier rotation
// is not any more.
func (k *StoredKey) rotate(secret digest, grace time.Duration, now time.Time) {
	k.old, k.oldUntil = digest{}, time.Time{}
	if grace > 0 {
		k.old, k.oldUntil = k.secret, now.Add(grace).UTC().Truncate(time.Millisecond)
	}
	k.secret = secret
}

// as returns the key as the bearer of a secret has it, or nil where the secret is not its own.
func (k *StoredKey) as(secret digest) *Key {
	key := k.Terms
	switch {
	case secret == k.secret:
		return &key
	case k.old != digest{} && secret == k.old:
		if key.Expires.IsZero() || key.Expires.After(k.oldUntil) {
			key.Expires = k.oldUntil
		}
		return &key
	}
	return nil
}

// secrets returns the digests by which the key is known.
func (k *StoredKey) secrets() []digest {
	switch {
	case k.byHand != nil:
		return k.byHand
	case k.old == digest{}:
		return []digest{k.secret}
	}
	return []digest{k.secret, k.old}
}

// used is what a balance says of a key.
func (b *balance) used(now time.Time, underWay int64) KeyUse {
	month, _ := b.spent(now, PeriodMonth)
	day, _ := b.spent(now, PeriodDay)
	return KeyUse{
		Total:          b.Total,
		Month:          month,
		Day:            day,
		RequestsMinute: b.Minute.at(minuteOf(now)).Sum,
		RequestsDay:    b.Day.at(dayOf(now)).Sum,
		TokensMinute:   b.Tokens.at(minuteOf(now)).Sum,
		UnderWay:       underWay,
	}
}
