package mesh

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// A key that the gateway looks after is one hash, `<prefix>:{<id>}:key`, so that every change of it is one step: its
// terms, by keyFields, and the digests of its secrets. `<prefix>:key:<digest>` says for each secret whose it is, and is
// believed only if that hash names it too. So what has to be written before, or deleted after, opens nothing by itself.
const managedField = "managed"

var (
	lookupFieldNames = append(slices.Clone(keyFieldNames), managedField)
	storedFieldNames = append(slices.Clone(keyFieldNames), "created_at", "secret", "old_secret", "old_secret_until")
)

func (s *redisKeys) managed(id string) string { return s.prefix + ":{" + id + "}:key" }

// lookUpManaged reads a key that the gateway looks after.
func (s *redisKeys) lookUpManaged(ctx context.Context, secret digest, id string) (*Key, error) {
	if err := readKeyID(new(Key), id); err != nil {
		s.report(secret, fmt.Errorf("%s: %w", managedField, err))
		return nil, nil
	}
	values, err := s.fields(ctx, id, s.managed(id), storedFieldNames)
	if err != nil {
		return nil, s.unread(secret, err)
	}
	key, err := readStored(values)
	s.report(secret, err)
	if err != nil || key == nil {
		return nil, nil
	}
	return key.as(secret), nil
}

// readStored reads the fields of a key in the order of storedFieldNames; nil where there are none.
func readStored(values []any) (*StoredKey, error) {
	terms, err := readKey(values[:len(keyFieldNames)])
	if err != nil || terms == nil {
		return nil, err
	}
	k := &StoredKey{Terms: *terms}
	for i, read := range []func(string) error{
		func(s string) error { return readTime(&k.Created, s) },
		func(s string) error { return readDigest(&k.secret, s) },
		func(s string) error { return readDigest(&k.old, s) },
		func(s string) error { return readTime(&k.oldUntil, s) },
	} {
		at := len(keyFieldNames) + i
		text, _ := values[at].(string)
		if text == "" {
			continue
		}
		if err := read(text); err != nil {
			return nil, fmt.Errorf("key %s: %s: %w", terms.id, storedFieldNames[at], err)
		}
	}
	return k, nil
}

func readDigest(to *digest, s string) error {
	d, ok := announced(s)
	if !ok {
		return errors.New("not a SHA-256 in hexadecimal")
	}
	*to = d
	return nil
}

func readTime(to *time.Time, s string) (err error) {
	*to, err = time.Parse(time.RFC3339, s)
	return err
}

func writeTime(t time.Time) string { return writeExpires(&Key{Expires: t}) }

// writeStored is the inverse of readStored.
func writeStored(k *StoredKey) ([]string, error) {
	values, err := writeKey(&k.Terms)
	if err != nil {
		return nil, err
	}
	old := ""
	if k.old != (digest{}) {
		old = hex.EncodeToString(k.old[:])
	}
	return append(values, writeTime(k.Created), hex.EncodeToString(k.secret[:]), old, writeTime(k.oldUntil)), nil
}

// setFields queues what makes a hash have these values, and no field where one is empty.
func setFields(ctx context.Context, p redis.Pipeliner, hash string, names, values []string) {
	var set, gone []string
	for i, value := range values {
		if value == "" {
			gone = append(gone, names[i])
			continue
		}
		set = append(set, names[i], value)
	}
	p.HSet(ctx, hash, set)
	if len(gone) > 0 {
		p.HDel(ctx, hash, gone...)
	}
}

// create stores new keys. What leads to them comes first, so that a crash leaves nothing that opens and is not listed.
// Nobody knows their secrets yet; they are announced all the same, so that in a flood of made-up keys they are known to be
// none of those.
func (s *redisKeys) create(ctx context.Context, keys []*StoredKey) error {
	values := make([][]string, len(keys))
	for i, k := range keys {
		var err error
		if values[i], err = writeStored(k); err != nil {
			return err
		}
	}
	_, err := s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, k := range keys {
			p.ZAdd(ctx, s.index(), redis.Z{Member: k.Terms.id})
			p.HSet(ctx, s.hash(k.secret), managedField, k.Terms.id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, k := range keys {
			setFields(ctx, p, s.managed(k.Terms.id), storedFieldNames, values[i])
			s.announce(ctx, p, k.secret)
		}
		return nil
	})
	return err
}

func (s *redisKeys) announce(ctx context.Context, p redis.Pipeliner, secrets ...digest) {
	for _, secret := range secrets {
		p.Publish(ctx, s.channel(), hex.EncodeToString(secret[:]))
	}
}

// getManaged reads a key that the gateway looks after; nil where there is none of this id.
func (s *redisKeys) getManaged(ctx context.Context, c redis.Cmdable, id string) (*StoredKey, error) {
	values, err := c.HMGet(ctx, s.managed(id), storedFieldNames...).Result()
	if err != nil {
		return nil, err
	}
	return readStored(values)
}

// changeManaged changes a key that the gateway looks after; it returns nil where there is none of this id.
func (s *redisKeys) changeManaged(ctx context.Context, id string, change func(*StoredKey) error) (changed *StoredKey, err error) {
	var before *StoredKey
	err = transact(ctx, s.client, s.managed(id), func(tx *redis.Tx) error {
		k, err := s.getManaged(ctx, tx, id)
		if err != nil || k == nil {
			return err
		}
		was := *k
		if err := change(k); err != nil {
			return err
		}
		values, err := writeStored(k)
		if err != nil {
			return err
		}
		if k.secret != was.secret {
			if err := s.client.HSet(ctx, s.hash(k.secret), managedField, id).Err(); err != nil {
				return err
			}
		}
		_, err = tx.TxPipelined(ctx, func(p redis.Pipeliner) error {
			setFields(ctx, p, s.managed(id), storedFieldNames, values)
			s.announce(ctx, p, append(was.secrets(), k.secrets()...)...)
			return nil
		})
		if err == nil {
			before, changed = &was, k
		}
		return err
	})
	if err != nil || changed == nil {
		return nil, err
	}
	s.tidy(ctx, before, changed)
	return changed, nil
}

// revokeManaged deletes a key that the gateway looks after, and reports whether there was one of this id.
func (s *redisKeys) revokeManaged(ctx context.Context, id string) (found bool, err error) {
	var before *StoredKey
	err = transact(ctx, s.client, s.managed(id), func(tx *redis.Tx) error {
		k, err := s.getManaged(ctx, tx, id)
		if err != nil || k == nil {
			return err
		}
		before = k
		_, err = tx.TxPipelined(ctx, func(p redis.Pipeliner) error {
			p.Del(ctx, s.managed(id))
			s.announce(ctx, p, k.secrets()...)
			return nil
		})
		return err
	})
	if err != nil || before == nil {
		return false, err
	}
	s.tidy(ctx, before, nil)
	s.client.ZRem(ctx, s.index(), id) //nolint:errcheck // an id that leads nowhere is passed over
	return true, nil
}

// tidy deletes what leads from secrets that are no longer the key's to it. It opens nothing, so that it may stay if this
// fails.
func (s *redisKeys) tidy(ctx context.Context, before, after *StoredKey) {
	for _, secret := range before.secrets() {
		if after == nil || !slices.Contains(after.secrets(), secret) {
			s.client.Del(ctx, s.hash(secret)) //nolint:errcheck // see above
		}
	}
	if after != nil && after.old != (digest{}) {
		s.client.ExpireAt(ctx, s.hash(after.old), after.oldUntil.Add(24*time.Hour)) //nolint:errcheck // see above
	}
}

// globs are the characters that a pattern of SCAN gives a meaning.
var globs = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`)
