package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// managing marks the error of a Redis that could not be asked.
func managing(err error) error {
	if err == nil || !isAway(err) {
		return err
	}
	return fmt.Errorf("%w: %w", errUnavailable, err)
}

// isAway reports whether Redis did not answer, or only that it cannot at the moment. What the client says of itself is the
// same to an operator: that there is no connection, or that a change was always overtaken by another.
func isAway(err error) bool {
	_, network := errors.AsType[net.Error](err)
	return network || isTimeout(err) || errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) || strings.HasPrefix(err.Error(), "redis: ") ||
		redis.IsLoadingError(err) || redis.IsClusterDownError(err) || redis.IsMasterDownError(err) || redis.IsReadOnlyError(err) || redis.IsTryAgainError(err)
}

func (s *redisStore) redisKeys() *redisKeys { return s.keys.source.(*redisKeys) }

// CreateKeys stores each of the keys wholly or not at all.
func (s *redisStore) CreateKeys(ctx context.Context, keys []*StoredKey) error {
	return managing(s.redisKeys().create(ctx, keys))
}

// ListKeys lists the keys in Redis, also those that were written by hand.
func (s *redisStore) ListKeys(ctx context.Context, after string, limit int) ([]*StoredKey, error) {
	page, err := s.redisKeys().list(ctx, after, limit)
	return page, managing(err)
}

// GetKey gets a key from Redis.
func (s *redisStore) GetKey(ctx context.Context, id string) (*StoredKey, error) {
	k, err := s.redisKeys().get(ctx, id)
	return k, managing(err)
}

// ChangeKey changes a key in Redis, and tells all instances.
func (s *redisStore) ChangeKey(ctx context.Context, id string, change func(*StoredKey) error) (*StoredKey, error) {
	if readKeyID(new(Key), id) != nil {
		return nil, errNoSuchKey
	}
	k, err := s.redisKeys().changeManaged(ctx, id, change)
	if err == nil && k == nil {
		k, err = s.redisKeys().changeWritten(ctx, id, change)
	}
	return k, managing(err)
}

// RevokeKey deletes a key in Redis, and tells all instances.
func (s *redisStore) RevokeKey(ctx context.Context, id string) error {
	if readKeyID(new(Key), id) != nil {
		return errNoSuchKey
	}
	found, err := s.redisKeys().revokeManaged(ctx, id)
	if err == nil && !found {
		err = s.redisKeys().revokeWritten(ctx, id)
	}
	return managing(err)
}

// KeyUse reads the account of a key. Windows are those of this gateway's clock.
func (s *redisStore) KeyUse(ctx context.Context, id string) (KeyUse, error) {
	var account *redis.SliceCmd
	var pending, parts *redis.IntCmd
	_, err := s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		account = p.HMGet(ctx, s.key(id, "account"), "minute", "minute_used", "day", "day_used", "total", "month", "month_spent",
			"spend_day", "spend_day_spent", "tokens_minute", "tokens_minute_used")
		pending, parts = p.HLen(ctx, s.key(id, "pending")), p.HLen(ctx, s.key(id, "parts"))
		return nil
	})
	if err != nil {
		return KeyUse{}, managing(err)
	}
	var n [11]int64
	for i, value := range account.Val() {
		text, _ := value.(string)
		n[i], _ = strconv.ParseInt(text, 10, 64) // 0 where there is none
	}
	b := balance{
		Minute:   tally{n[0], n[1]},
		Day:      tally{n[2], n[3]},
		Total:    Money(n[4]),
		Month:    tally{n[5], n[6]},
		SpendDay: tally{n[7], n[8]},
		Tokens:   tally{n[9], n[10]},
	}
	return b.used(s.now(), pending.Val()-parts.Val()), nil
}

var _ KeyManager = (*redisStore)(nil)
