package mesh

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// redisKeys are the keys in a Redis that several gateways share. Each is a hash, `<prefix>:key:<hex SHA-256 of the
// secret>`, with the fields in keyFields; or that has nothing but the field `managed`, the id of a key that the gateway
// itself looks after (keys_redis_managed.go). Who writes one publishes its digest on the channel `<prefix>:keys`, or `*`
// after changes to many. As SHA-256 of a random secret cannot be inverted, neither name is a secret.
type redisKeys struct {
	client  redis.UniversalClient
	prefix  string
	breaker *breaker // the store's
	logger  *zap.Logger
	degrade bool          // on_failure: whether a key that was known stays valid in an outage
	quiet   time.Duration // without a message; then the subscription's connection is tried

	mu       sync.Mutex
	refusal  trouble
	reported map[digest]string // keys that cannot be understood, and why
}

func newRedisKeys(client redis.UniversalClient, prefix string, b *breaker, logger *zap.Logger) *redisKeys {
	return &redisKeys{
		client:   client,
		prefix:   prefix,
		breaker:  b,
		logger:   logger,
		degrade:  true,
		quiet:    quietFor,
		refusal:  trouble{message: "Redis refuses to look up keys"},
		reported: make(map[digest]string),
	}
}

func (s *redisKeys) hash(secret digest) string {
	return s.prefix + ":key:" + hex.EncodeToString(secret[:])
}

func (s *redisKeys) channel() string { return s.prefix + ":keys" }

// KeysOutliveOutage is the store's on_failure.
func (s *redisKeys) KeysOutliveOutage() bool { return s.degrade }

// Away is the breaker.
func (s *redisKeys) Away() <-chan struct{} { return s.breaker.opened() }

// LookUpKey reads a key, in one command, or two if the gateway looks after it, unless the breaker is open. A key that
// cannot be understood is none: what its limits are is not known, so it opens nothing, and 401 is what its owner has to
// hear, because no retry will help. The log says why, once.
func (s *redisKeys) LookUpKey(ctx context.Context, secret digest) (*Key, error) {
	if s.breaker.open() {
		return nil, errKeyOutage
	}
	hash := s.hash(secret)
	values, err := s.fields(ctx, hash, hash, lookupFieldNames)
	if err != nil {
		return nil, s.unread(secret, err)
	}
	last := len(values) - 1
	if id, managed := values[last].(string); managed {
		return s.lookUpManaged(ctx, secret, id)
	}
	key, err := readKey(values[:last])
	s.report(secret, err)
	if err != nil {
		return nil, nil
	}
	return key, nil
}

// fields reads fields of a hash, which has a hash tag, and has the breaker know how that went.
func (s *redisKeys) fields(ctx context.Context, tag, hash string, names []string) ([]any, error) {
	values, err := s.client.HMGet(ctx, hash, names...).Result()
	if err == nil {
		err = ctx.Err() // it came too late
	}
	switch {
	case err == nil || isWrongType(err):
		s.answered(tag)
	case !isRefusal(err):
		s.breaker.noteTimed(tag, err)
	}
	return values, err
}

func isWrongType(err error) bool { return redis.HasErrorPrefix(err, "WRONGTYPE") }

// unread is the error of a lookup whose hash could not be read; nil where that says that there is no such key.
func (s *redisKeys) unread(secret digest, err error) error {
	switch {
	case isWrongType(err):
		s.report(secret, errors.New("it is not a hash"))
		return nil
	case isRefusal(err):
		return s.refused(err)
	}
	return fmt.Errorf("looking up a key: %w", unanswered(err))
}

// isRefusal reports whether Redis is there and does not do what it is told. The breaker is not for that: all that is
// no lookup may well go on, and whether a command is allowed some day the store's heart cannot find out.
func isRefusal(err error) bool {
	return err != nil && !isNetwork(err) && (isRefusedCredentials(err) || isGeneral(err))
}

func (s *redisKeys) refused(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusal.note(s.logger, err)
	return fmt.Errorf("looking up a key: %w: %w", errUnavailable, err)
}

func (s *redisKeys) answered(tag string) {
	s.breaker.noteTimed(tag, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusal.note(s.logger, nil)
}

// report logs what is wrong with a key, if that is news.
func (s *redisKeys) report(secret digest, wrong error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wrong == nil {
		delete(s.reported, secret)
		return
	}
	if s.reported[secret] == wrong.Error() {
		return
	}
	const many = 1000
	if len(s.reported) >= many {
		clear(s.reported)
	}
	s.reported[secret] = wrong.Error()
	s.logger.Error("key refused: it cannot be understood", zap.String("digest", hex.EncodeToString(secret[:len(secret)/2])), zap.Error(wrong))
}

const (
	quietFor       = 5 * time.Second // so a connection that died unnoticed is given up after twice that
	firstReconnect = 20 * time.Millisecond
	maxReconnect   = 500 * time.Millisecond
)

// WatchKeys subscribes to the channel. Whenever the subscription is new, all keys may have changed.
func (s *redisKeys) WatchKeys(changed func(secret digest, all bool)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { s.watch(ctx, changed) })
	return func() {
		cancel()
		watching.Wait()
	}
}

func (s *redisKeys) watch(ctx context.Context, changed func(secret digest, all bool)) {
	deaf := trouble{message: "changes to keys are not heard of; they take effect late"}
	delay := firstReconnect
	for ctx.Err() == nil {
		err := s.listen(ctx, func(secret digest, all bool) {
			delay = firstReconnect
			deaf.note(s.logger, nil)
			changed(secret, all)
		})
		if ctx.Err() != nil {
			return
		}
		deaf.note(s.logger, err)
		select {
		case <-time.After(jitter(delay)):
		case <-ctx.Done():
		}
		delay = min(2*delay, maxReconnect)
	}
}

// jitter spreads what many instances do at the same time: half of d and up to half more.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// listen is one subscription. It ends with an error.
func (s *redisKeys) listen(ctx context.Context, changed func(secret digest, all bool)) error {
	sub := s.client.Subscribe(ctx, s.channel())
	defer sub.Close()
	defer context.AfterFunc(ctx, func() { sub.Close() })() // wakes ReceiveTimeout
	asked := false
	for {
		message, err := sub.ReceiveTimeout(ctx, s.quiet)
		if isTimeout(err) && !asked {
			asked, err = true, sub.Ping(ctx)
			if err == nil {
				continue
			}
		}
		if err != nil {
			return fmt.Errorf("listening to %s: %w", s.channel(), err)
		}
		asked = false
		switch m := message.(type) {
		case *redis.Subscription:
			changed(digest{}, true)
		case *redis.Message:
			secret, ok := announced(m.Payload)
			changed(secret, !ok)
		}
	}
}

// announced reads a message. One that is not a digest, such as `*`, is about all keys.
func announced(payload string) (secret digest, ok bool) {
	raw, err := hex.DecodeString(payload)
	if err != nil || len(raw) != len(secret) {
		return secret, false
	}
	return digest(raw), true
}
