package mesh

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

//go:embed redis_account.lua
var accountLua string

//go:embed redis_admit.lua
var admitBody string

//go:embed redis_settle.lua
var settleBody string

var (
	admitLua  = accountLua + admitBody
	settleLua = accountLua + settleBody
)

// redisScript is a Lua script. It is sent by its digest, as a whole where the server does not know it yet, and always as
// a whole once the server, or a proxy before it, has turned out not to take digests.
type redisScript struct {
	name     string
	source   string
	script   *redis.Script
	noDigest atomic.Bool
}

func newRedisScript(name, source string) *redisScript {
	return &redisScript{name: name, source: source, script: redis.NewScript(source)}
}

// run runs the script.
func (r *redisScript) run(ctx context.Context, s *redisStore, keys []string, args ...any) (any, error) {
	if r.noDigest.Load() {
		return r.script.Eval(ctx, s.client, keys, args...).Result()
	}
	result, err := r.script.EvalSha(ctx, s.client, keys, args...).Result()
	if !mayBeDigest(err) || ctx.Err() != nil {
		return result, err
	}
	unknown := err
	result, err = r.script.Eval(ctx, s.client, keys, args...).Result()
	r.learn(s, unknown, err)
	return result, err
}

// queue adds the script to a pipeline.
func (r *redisScript) queue(ctx context.Context, pipe redis.Pipeliner, keys []string, args ...any) *redis.Cmd {
	if r.noDigest.Load() {
		return r.script.Eval(ctx, pipe, keys, args...)
	}
	return r.script.EvalSha(ctx, pipe, keys, args...)
}

// learn draws the conclusion from a script that failed by its digest and was then sent as a whole.
func (r *redisScript) learn(s *redisStore, byDigest, whole error) {
	if whole == nil && !isNoScript(byDigest) && !isNetwork(byDigest) && !r.noDigest.Swap(true) {
		s.logger.Warn("Redis, or a proxy before it, does not take EVALSHA; sending scripts as a whole",
			zap.String("script", r.name), zap.Error(byDigest))
	}
}

// mayBeDigest reports whether an error may mean that the server cannot run a script by its digest. Proxies have all
// kinds of words for that, and none of them has run the script.
func mayBeDigest(err error) bool {
	if err == nil || isNetwork(err) {
		return false
	}
	return isNoScript(err) || isGeneral(err) && !isScriptFault(err) || redis.IsPermissionError(err)
}

func isNoScript(err error) bool {
	return errors.Is(err, redis.ErrNoScript) || redis.HasErrorPrefix(err, "NOSCRIPT")
}

// isNetwork reports whether no answer came.
func isNetwork(err error) bool {
	if err == nil {
		return false
	}
	var reply redis.Error
	return !errors.As(err, &reply)
}

// isTimeout reports whether an answer did not come in time. That no connection became free in time is the same: those
// there are have been busy for that long, and whether Redis is slow or this process is, who waits on only adds to it.
func isTimeout(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, redis.ErrPoolTimeout) {
		return true
	}
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}

// isBroken reports whether a connection ended in place of an answer.
func isBroken(err error) bool { return isNetwork(err) && !isTimeout(err) }

// isScriptFault reports whether a script broke off because of what it found, as it will again: most likely data that
// is not the gateway's. All else that stops a script may pass: a Redis that cannot save or is a replica by now, a right
// that its user lacks. Before version 7, Redis puts its own words around either.
func isScriptFault(err error) bool {
	if err == nil || isNetwork(err) {
		return false
	}
	said := err.Error()
	return strings.Contains(said, "WRONGTYPE ") || // a field of another kind; what Lua says of a value of another kind
		strings.Contains(said, "is not an integer") || strings.Contains(said, "user_script:") && strings.Contains(said, "attempt to ") ||
		strings.Contains(said, "data format in input") || strings.Contains(said, "Missing bytes in input") // cmsgpack's words
}

// isGeneral reports whether an answer is an error of no particular kind.
func isGeneral(err error) bool { return strings.HasPrefix(err.Error(), "ERR ") }

func isRefusedCredentials(err error) bool {
	return err != nil && (redis.IsAuthError(err) || redis.IsPermissionError(err))
}

var errRedisAnswer = errors.New("redis answered something else than a script returns")

func answerError(script string, v any) error {
	return fmt.Errorf("script %s: %w: %T", script, errRedisAnswer, v)
}
