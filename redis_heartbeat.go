package mesh

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"
)

// heartbeatLua proves that Redis can be written to and runs scripts, beside what it is there for.
const heartbeatLua = `return redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])`

const (
	heartbeatInterval = 3 * time.Second
	lease             = 10 * time.Second // a gateway that shows no sign of life for that long is taken for dead

	firstProbe = 100 * time.Millisecond // from the breaker's opening to the first try
	lastProbe  = 2 * time.Second        // between later tries

	// calm is for how long the breaker must have been closed for its next opening to be another outage. A Redis that answers
	// the heart and not the requests is tried ever more rarely.
	calm = 10 * time.Second

	registerInterval = time.Hour
	registerTTL      = 3 * 24 * time.Hour
)

// redisAccounts are the accounts of this instance, which decide while Redis cannot be reached.
type redisAccounts struct {
	byKey sync.Map // key id → *account

	mu           sync.Mutex
	unknown      []string      // key ids that Redis has not been told of
	unregistered chan struct{} // there are unknown
}

func (r *redisAccounts) of(keyID string) *account {
	if found, ok := r.byKey.Load(keyID); ok {
		return found.(*account)
	}
	found, existed := r.byKey.LoadOrStore(keyID, &account{keyID: keyID})
	if !existed {
		r.register(keyID)
	}
	return found.(*account)
}

// settled is for when Redis knows of a request's end.
func (r *redisAccounts) settled(e *Event) {
	found, ok := r.byKey.Load(e.KeyID)
	if !ok {
		return
	}
	account := found.(*account)
	account.mu.Lock()
	account.underWay.settled(e.RequestID)
	account.mu.Unlock()
}

// register has the heart tell Redis of key ids.
func (r *redisAccounts) register(keyIDs ...string) {
	r.mu.Lock()
	r.unknown = append(r.unknown, keyIDs...)
	r.mu.Unlock()
	select {
	case r.unregistered <- struct{}{}:
	default:
	}
}

func (r *redisAccounts) registerAll() {
	var all []string
	r.byKey.Range(func(keyID, _ any) bool {
		all = append(all, keyID.(string))
		return true
	})
	if len(all) > 0 {
		r.register(all...)
	}
}

func (r *redisAccounts) takeUnknown() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	unknown := r.unknown
	r.unknown = nil
	return unknown
}

// live is the store's heart.
func (s *redisStore) live() {
	defer close(s.beaten)
	registered := time.Now()
	probe := firstProbe
	timer := time.NewTimer(s.nextBeat(&probe))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			s.tryRedis()
			s.tellKeys() // those it could not tell of before
			if time.Since(registered) > registerInterval {
				s.accounts.registerAll()
				registered = time.Now()
			}
		case <-s.breaker.changed:
			if time.Since(s.recovered) > calm {
				probe = firstProbe
			}
		case <-s.accounts.unregistered:
			s.tellKeys()
			continue
		case <-s.written:
			s.die()
			return
		}
		timer.Reset(s.nextBeat(&probe))
	}
}

// nextBeat returns how long to wait. Gateways that lost the same Redis at the same time do not ask for it in step.
func (s *redisStore) nextBeat(probe *time.Duration) time.Duration {
	if !s.degraded() {
		return heartbeatInterval
	}
	wait := *probe
	*probe = min(2*wait, lastProbe)
	return around(wait)
}

// around returns something from half of d to one and a half.
func around(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// tryRedis shows a sign of life, and closes the breaker where Redis takes it in time.
func (s *redisStore) tryRedis() {
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout)
	defer cancel()
	err := s.beat(ctx)
	if err == nil {
		err = ctx.Err() // it came too late
	}
	if !s.degraded() {
		s.breaker.noteTimed("", err)
		s.queue.call() // a broken connection may mean that something has to be sent again
		return
	}
	if suspect := s.breaker.suspected(); err == nil && suspect != "" {
		_, err = s.beats.run(ctx, s, []string{s.key(suspect, "probe")}, s.instance, int(lease.Seconds()))
	}
	if err != nil {
		return
	}
	s.recovered = time.Now()
	s.breaker.close()
	s.accounts.registerAll() // Redis may have come back with less than it had
	s.queue.call()
}

func (s *redisStore) beat(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	keys, args := []string{s.shared("instance:" + s.instance)}, []any{s.now().Unix(), int(lease.Seconds())}
	_, err := s.beats.run(ctx, s, keys, args...)
	if err == nil {
		s.broke = 0
	}
	if isBroken(err) && !s.beats.noDigest.Load() {
		// A proxy may close the connection on a command it does not know.
		if whole := s.beats.script.Eval(ctx, s.client, keys, args...).Err(); whole == nil {
			s.preferWhole(err)
			return nil
		}
	}
	return err
}

// preferWhole is for a proxy that breaks the connection where it is sent a digest: no other script is to find that out
// anew.
func (s *redisStore) preferWhole(cause error) {
	// Once is an accident.
	if s.broke++; s.broke < maxFailures {
		return
	}
	for _, script := range []*redisScript{s.admits, s.settles, s.beats} {
		script.noDigest.Store(true)
	}
	s.logger.Warn("Redis, or a proxy before it, breaks the connection on EVALSHA; sending scripts as a whole", zap.Error(cause))
}

// tellKeys enters the keys that this gateway admits requests of where the reapers look for them.
func (s *redisStore) tellKeys() {
	if s.degraded() {
		return // closing the breaker has them all told
	}
	keyIDs := s.accounts.takeUnknown()
	const perCommand = 1000
	for len(keyIDs) > 0 {
		n := min(len(keyIDs), perCommand)
		members := make([]any, n)
		for i, id := range keyIDs[:n] {
			members[i] = id
		}
		ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
		pipe := s.client.Pipeline()
		pipe.SAdd(ctx, s.shared("keyids"), members...)
		pipe.Expire(ctx, s.shared("keyids"), registerTTL)
		_, err := pipe.Exec(ctx)
		cancel()
		s.breaker.note("", err)
		if err != nil {
			s.accounts.mu.Lock()
			s.accounts.unknown = append(s.accounts.unknown, keyIDs...)
			s.accounts.mu.Unlock()
			return // the next beat has them told
		}
		keyIDs = keyIDs[n:]
	}
}

// die lets the other gateways know at once that what this one left pending, if anything, is theirs.
func (s *redisStore) die() {
	if s.degraded() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout)
	defer cancel()
	s.client.Del(ctx, s.shared("instance:"+s.instance)) // or it runs out
}
