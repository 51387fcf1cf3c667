package mesh

import (
	"context"
	"crypto/rand"
	"fmt"

	"go.uber.org/zap"
)

// identifyLua returns the id of a Redis, which the first to ask gives it. It is kept for ever. A hash needs no rights
// that the other scripts do not.
const identifyLua = `
local id = redis.call('HGET', KEYS[1], 'id')
if not id then
	id = ARGV[1]
	redis.call('HSET', KEYS[1], 'id', id)
end
return id`

// identify finds out which Redis this is, so that the journal's entries for it are entered though its addresses have
// changed since.
func (s *redisStore) identify(ctx context.Context) error {
	id, err := reaping(ctx, func(ctx context.Context) (string, error) {
		return s.client.Eval(ctx, identifyLua, []string{s.shared("id")}, rand.Text()).Text()
	})
	if err != nil {
		return err
	}
	adopted, another, err := s.journal.belongTo(id)
	if err != nil {
		return fmt.Errorf("journal %s: %w", s.redisConfig.journal, err)
	}
	if adopted > 0 {
		s.logger.Info("the journal has entries from when this Redis had other addresses; they are entered", zap.Int("entries", adopted))
		s.queue.call()
	}
	if n := s.journal.count(); another && n > 0 {
		s.logger.Warn("Redis has lost its data, or is another one than before; what waits in the journal is entered all the same", zap.Int("entries", n))
	}
	return nil
}
