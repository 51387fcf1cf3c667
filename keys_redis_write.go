package mesh

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// write sets everything about a key, which may be new. Fields that are not a key's are left as they are: a newer
// version may know them.
func (s *redisKeys) write(ctx context.Context, secret digest, k *Key) error {
	values, err := writeKey(k)
	if err != nil {
		return err
	}
	return s.edit(ctx, secret, func(_ map[string]string, p redis.Pipeliner, hash string) error {
		setFields(ctx, p, hash, keyFieldNames, values)
		return nil
	})
}

// suspend suspends a key, or takes that back.
func (s *redisKeys) suspend(ctx context.Context, secret digest, suspended bool) error {
	return s.edit(ctx, secret, func(fields map[string]string, p redis.Pipeliner, hash string) error {
		if len(fields) == 0 {
			return errNoSuchKey
		}
		p.HSet(ctx, hash, "suspended", suspended)
		return nil
	})
}

// delete deletes a key. Its counters and its entries in the ledger stay.
func (s *redisKeys) delete(ctx context.Context, secret digest) error {
	return s.edit(ctx, secret, func(fields map[string]string, p redis.Pipeliner, hash string) error {
		if len(fields) == 0 {
			return errNoSuchKey
		}
		p.Del(ctx, hash)
		return nil
	})
}

// rotate gives a key a new secret. Its id stays, and so does all that is kept under it. The old secret is valid for
// overlap more, but no longer than it would have been. The secrets' hashes may be on two nodes of a Cluster, so these
// are two steps; after a crash between them both secrets are valid, until the old one is deleted.
func (s *redisKeys) rotate(ctx context.Context, old, secret digest, overlap time.Duration) error {
	fields, err := s.client.HGetAll(ctx, s.hash(old)).Result()
	if err != nil {
		return fmt.Errorf("reading the key: %w", err)
	}
	if len(fields) == 0 {
		return errNoSuchKey
	}
	err = s.edit(ctx, secret, func(there map[string]string, p redis.Pipeliner, hash string) error {
		if len(there) > 0 {
			return errKeyExists
		}
		p.HSet(ctx, hash, fields)
		return nil
	})
	if err != nil {
		return err
	}
	if overlap <= 0 {
		return s.delete(ctx, old)
	}
	return s.expireBy(ctx, old, time.Now().Add(overlap))
}

// expireBy lets a key expire at a time, if it would not before.
func (s *redisKeys) expireBy(ctx context.Context, secret digest, end time.Time) error {
	return s.edit(ctx, secret, func(fields map[string]string, p redis.Pipeliner, hash string) error {
		if len(fields) == 0 {
			return errNoSuchKey
		}
		if before, err := time.Parse(time.RFC3339, fields["expires"]); err == nil && before.Before(end) {
			return nil
		}
		p.HSet(ctx, hash, "expires", writeExpires(&Key{Expires: end}))
		return nil
	})
}

// edit changes the hash of a key and announces it, in one transaction, which no other change of the hash comes
// between. change sees the fields that are there and queues its commands. In a Cluster all of it happens on the node
// that has the hash: a message may be published on any node, and reaches all.
func (s *redisKeys) edit(ctx context.Context, secret digest, change func(fields map[string]string, p redis.Pipeliner, hash string) error) error {
	hash := s.hash(secret)
	return s.retry(ctx, hash, func(tx *redis.Tx) error {
		fields, err := tx.HGetAll(ctx, hash).Result()
		if err != nil {
			return fmt.Errorf("reading the key: %w", err)
		}
		_, err = tx.TxPipelined(ctx, func(p redis.Pipeliner) error {
			if err := change(fields, p, hash); err != nil {
				return err
			}
			s.announce(ctx, p, secret)
			return nil
		})
		return err
	})
}

// retry runs a transaction on a hash until no other change has come between.
func (s *redisKeys) retry(ctx context.Context, hash string, transact func(*redis.Tx) error) (err error) {
	const attempts = 10
	for range attempts {
		if err = s.client.Watch(ctx, transact, hash); !errors.Is(err, redis.TxFailedErr) {
			return err
		}
	}
	return err
}
