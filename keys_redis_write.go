package mesh

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"
)

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

// edit changes the hash of a key and announces it, in one transaction, which no other change of the hash comes
// between. change sees the fields that are there and queues its commands. In a Cluster all of it happens on the node
// that has the hash: a message may be published on any node, and reaches all.
func (s *redisKeys) edit(ctx context.Context, secret digest, change func(fields map[string]string, p redis.Pipeliner, hash string) error) error {
	hash := s.hash(secret)
	return transact(ctx, s.client, hash, func(tx *redis.Tx) error {
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
