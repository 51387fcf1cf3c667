package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

const (
	reapInterval = 6 * time.Second // on average
	reapTimeout  = time.Second     // of one command

	// reapTurn is for how long a gateway that has begun to reap is the only one: until after its next round, so that it
	// stays the one, and finds out for itself how long another has been gone.
	reapTurn = 2 * reapInterval

	// maxPending is after how long a request is taken for lost although its gateway lives. None may take that long: see
	// (*parser).timeout.
	maxPending = 26 * time.Hour
)

// turnLua has a gateway be the one that reaps, unless another is.
const turnLua = `
local holder = redis.call('HGET', KEYS[1], 'instance')
if holder and holder ~= ARGV[1] then
	return 0
end
redis.call('HSET', KEYS[1], 'instance', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1`

// reap is the reaper: it settles, by estimate, what gateways that died left pending. One gateway does that for all while
// it can; if two do, nothing is charged twice.
func (s *redisStore) reap() {
	defer close(s.reaped)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dead := make(map[string]time.Time) // since when it is known
	for {
		select {
		case <-time.After(around(reapInterval)):
		case <-s.stop:
			return
		}
		if s.degraded() {
			clear(dead) // whoever could not reach Redis either gets the time of a lease to show up
			continue
		}
		s.idTrouble.note(s.logger, s.identify(ctx))
		s.reapTrouble.note(s.logger, s.reapAll(ctx, dead))
	}
}

// reapAll goes through the keys once, if it is this gateway's turn. What is wrong with one key does not keep it from the
// others; it returns the first of what was.
func (s *redisStore) reapAll(ctx context.Context, dead map[string]time.Time) (first error) {
	alive := map[string]bool{s.instance: true}
	failed := 0
	for cursor := uint64(0); !s.stopped() && !s.degraded(); {
		turn, err := s.takeTurn(ctx)
		if err != nil || !turn {
			return cmp.Or(err, first)
		}
		var keyIDs []string
		if keyIDs, cursor, err = s.scanKeys(ctx, cursor); err != nil {
			return err
		}
		for _, keyID := range keyIDs {
			if err := s.reapKey(ctx, keyID, alive, dead); err != nil {
				first = cmp.Or(first, fmt.Errorf("key %s: %w", keyID, err))
				failed++
			}
		}
		if cursor == 0 {
			break
		}
	}
	if failed > 1 {
		first = fmt.Errorf("%w (and %d other keys)", first, failed-1)
	}
	return first
}

// takeTurn reports whether it is this gateway that reaps.
func (s *redisStore) takeTurn(ctx context.Context) (bool, error) {
	return reaping(ctx, func(ctx context.Context) (bool, error) {
		return s.client.Eval(ctx, turnLua, []string{s.shared("reaper")}, s.instance, int(reapTurn.Seconds())).Bool()
	})
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

// reapKey settles the lost requests of one key, as far as it can.
func (s *redisStore) reapKey(ctx context.Context, keyID string, alive map[string]bool, dead map[string]time.Time) (first error) {
	for cursor := uint64(0); !s.stopped(); {
		fields, next, err := s.scanPending(ctx, keyID, cursor)
		if err != nil {
			return err
		}
		for i := 0; i+1 < len(fields); i += 2 {
			err := s.reapRequest(ctx, keyID, fields[i], fields[i+1], alive, dead)
			if isNetwork(err) {
				return err
			}
			first = cmp.Or(first, err)
		}
		if cursor = next; cursor == 0 {
			break
		}
	}
	return first
}

func (s *redisStore) scanPending(ctx context.Context, keyID string, from uint64) (fields []string, next uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	return s.client.HScan(ctx, s.key(keyID, "pending"), from, "", 500).Result()
}

// reapRequest settles one request if it is lost.
func (s *redisStore) reapRequest(ctx context.Context, keyID, requestID, entry string, alive map[string]bool, dead map[string]time.Time) error {
	instance, e, ok := parsePending(entry)
	if !ok || e.KeyID != keyID || e.RequestID != requestID {
		return s.dropDamaged(ctx, keyID, requestID, entry)
	}
	isDead, err := s.isDead(ctx, instance, alive, dead)
	if _, isJob := s.lifeSign(instance); isJob {
		if err == nil && isDead {
			delete(dead, instance)
			err = s.voidJob(ctx, &e)
		}
		return err
	}
	if err != nil || !isDead && !tooOld(requestID, s.now()) {
		return err
	}
	e.Time, e.Outcome, e.Estimated = s.now().UTC(), OutcomeLost, true
	one := settlement{Kind: settleLost, Event: e}
	entered, err := reaping(ctx, func(ctx context.Context) (int64, error) { return s.enterOne(ctx, one) })
	if err == nil && entered == 1 {
		s.logger.Warn("charged by estimate for a request whose gateway died",
			zap.String("request_id", requestID), zap.String("key_id", e.KeyID),
			zap.String("cost_usd", e.Cost.String()), zap.String("max_cost_usd", e.MaxCost.String()))
	}
	return err
}

// voidJob undoes the admission of a job that is nowhere: its gateway died before it was in the queue.
func (s *redisStore) voidJob(ctx context.Context, e *Event) error {
	one := settlement{Kind: settleVoid, Event: *e}
	_, err := reaping(ctx, func(ctx context.Context) (int64, error) { return s.enterOne(ctx, one) })
	return err
}

// parsePending reads what redis_admit.lua keeps of a request: minute, day, what it reserved, the instance, the event.
func parsePending(entry string) (instance string, e Event, ok bool) {
	parts := strings.SplitN(entry, " ", 5)
	if len(parts) != 5 {
		return "", e, false
	}
	err := json.Unmarshal([]byte(parts[4]), &e)
	return parts[3], e, err == nil
}

// dropDamaged deletes a pending entry that nothing can be made of. Its request can still be settled.
func (s *redisStore) dropDamaged(ctx context.Context, keyID, requestID, entry string) error {
	one := settlement{Kind: settleDrop, Event: Event{KeyID: keyID, RequestID: requestID}}
	_, err := reaping(ctx, func(ctx context.Context) (int64, error) { return s.enterOne(ctx, one) })
	if err == nil {
		s.logger.Error("damaged pending entry, deleted; if the request's gateway died, nothing was charged for it",
			zap.String("request_id", requestID), zap.String("key_id", keyID), zap.String("entry", entry))
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
	sign, _ := s.lifeSign(instance)
	shows, err := reaping(ctx, func(ctx context.Context) (int64, error) {
		return s.client.Exists(ctx, sign).Result()
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
	began, ok := requestBegan(requestID)
	return ok && now.Sub(began) > maxPending
}
