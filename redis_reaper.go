package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

const (
	reapInterval = 10 * time.Second
	reapTimeout  = time.Second // of one command

	// maxPending is after how long a request is taken for lost although its gateway lives. None may take that long: see
	// (*parser).timeout.
	maxPending = 26 * time.Hour
)

// reap is the reaper: it settles, by estimate, what gateways that died left pending. All gateways do that, one at a
// time where it can be had; if two do, nothing is charged twice.
func (s *redisStore) reap() {
	defer close(s.reaped)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dead := make(map[string]time.Time) // since when it is known
	for {
		select {
		case <-time.After(reapInterval/2 + rand.N(reapInterval)):
		case <-s.stop:
			return
		}
		if s.degraded() {
			clear(dead) // whoever could not reach Redis either gets the time of a lease to show up
			continue
		}
		err := s.reapAll(ctx, dead)
		s.reapTrouble.note(s.logger, err)
	}
}

// reapAll goes through the keys once, unless another gateway does.
func (s *redisStore) reapAll(ctx context.Context, dead map[string]time.Time) error {
	turn, err := reaping(ctx, func(ctx context.Context) (bool, error) {
		return s.client.SetNX(ctx, s.shared("reaper"), s.instance, reapInterval/2).Result()
	})
	if err != nil || !turn {
		return err
	}
	alive := map[string]bool{s.instance: true}
	for cursor := uint64(0); !s.stopped(); {
		var keyIDs []string
		keyIDs, cursor, err = s.scanKeys(ctx, cursor)
		if err != nil {
			return err
		}
		for _, keyID := range keyIDs {
			if err := s.reapKey(ctx, keyID, alive, dead); err != nil {
				return fmt.Errorf("key %s: %w", keyID, err)
			}
		}
		if cursor == 0 {
			break
		}
	}
	return nil
}

// reaping runs one command with a bound.
func reaping[T any](ctx context.Context, command func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	return command(ctx)
}

func (s *redisStore) scanKeys(ctx context.Context, from uint64) (keyIDs []string, next uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	return s.client.SScan(ctx, s.shared("keyids"), from, "", 500).Result()
}

// reapKey settles the lost requests of one key.
func (s *redisStore) reapKey(ctx context.Context, keyID string, alive map[string]bool, dead map[string]time.Time) error {
	for cursor := uint64(0); !s.stopped(); {
		fields, next, err := s.scanPending(ctx, keyID, cursor)
		if err != nil {
			return err
		}
		for i := 0; i+1 < len(fields); i += 2 {
			if err := s.reapRequest(ctx, fields[i], fields[i+1], alive, dead); err != nil {
				return err
			}
		}
		if cursor = next; cursor == 0 {
			return nil
		}
	}
	return nil
}

func (s *redisStore) scanPending(ctx context.Context, keyID string, from uint64) (fields []string, next uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	return s.client.HScan(ctx, s.key(keyID, "pending"), from, "", 500).Result()
}

// reapRequest settles one request if it is lost.
func (s *redisStore) reapRequest(ctx context.Context, requestID, entry string, alive map[string]bool, dead map[string]time.Time) error {
	parts := strings.SplitN(entry, " ", 5) // minute, day, reserved, instance, event
	if len(parts) != 5 {
		return fmt.Errorf("the pending entry of request %s is damaged", requestID)
	}
	isDead, err := s.isDead(ctx, parts[3], alive, dead)
	if err != nil || !isDead && !tooOld(requestID, s.now()) {
		return err
	}
	var e Event
	if err := json.Unmarshal([]byte(parts[4]), &e); err != nil {
		return fmt.Errorf("the pending entry of request %s is damaged: %w", requestID, err)
	}
	e.Time, e.Outcome, e.Estimated = s.now().UTC(), OutcomeLost, true
	one := settlement{Kind: settleLost, Event: e}
	entered, err := reaping(ctx, func(ctx context.Context) (any, error) {
		return s.settles.run(ctx, s, s.settleKeys(&e), s.settleArgs(&one)...)
	})
	if err == nil && entered == int64(1) {
		s.logger.Warn("charged by estimate for a request whose gateway died",
			zap.String("request_id", requestID), zap.String("key_id", e.KeyID), zap.String("cost_usd", e.Cost.String()))
	}
	return err
}

// isDead reports whether a gateway has shown no sign of life for the time of two leases: one that Redis keeps, and one
// that is waited for here, because Redis may itself have been away.
func (s *redisStore) isDead(ctx context.Context, instance string, alive map[string]bool, dead map[string]time.Time) (bool, error) {
	if alive[instance] {
		return false, nil
	}
	since, known := dead[instance]
	shows, err := reaping(ctx, func(ctx context.Context) (int64, error) {
		return s.client.Exists(ctx, s.shared("instance:"+instance)).Result()
	})
	switch {
	case err != nil && err != redis.Nil:
		return false, err
	case shows > 0:
		alive[instance] = true
		delete(dead, instance)
	case !known:
		dead[instance] = time.Now()
	default:
		return time.Since(since) > lease, nil
	}
	return false, nil
}

// tooOld reports whether a request began so long ago that it must have ended.
func tooOld(requestID string, now time.Time) bool {
	_, encoded, _ := strings.Cut(requestID, "_")
	id, err := ulid.Parse(encoded)
	return err == nil && now.Sub(ulid.Time(id.Time())) > maxPending
}
