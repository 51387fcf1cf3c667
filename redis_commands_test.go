package mesh

import (
	"context"
	"fmt"
	"net"
	"sync"

	"github.com/redis/go-redis/v9"
)

// redisCommands counts what a store sends to Redis, and may let it fail before it is sent.
type redisCommands struct {
	fail func(name string) error

	mu   sync.Mutex
	seen map[string]int
}

// countCommands counts from now on. Commands that fail has an error for are not sent.
func countCommands(s *redisStore, fail func(name string) error) *redisCommands {
	c := &redisCommands{fail: fail, seen: make(map[string]int)}
	s.client.AddHook(c)
	return c
}

// of returns how often a command was sent: by its name, or `evalsha` and the digest of a script.
func (c *redisCommands) of(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[name]
}

func (c *redisCommands) note(command redis.Cmder) error {
	name := command.Name()
	if name == "evalsha" {
		name = fmt.Sprint(name, " ", command.Args()[1])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[name]++
	if c.fail == nil {
		return nil
	}
	return c.fail(name)
}

func (c *redisCommands) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return next(ctx, network, address)
	}
}

func (c *redisCommands) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, command redis.Cmder) error {
		if err := c.note(command); err != nil {
			command.SetErr(err)
			return err
		}
		return next(ctx, command)
	}
}

func (c *redisCommands) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, commands []redis.Cmder) error {
		for _, command := range commands {
			c.note(command) //nolint:errcheck // single commands fail only
		}
		return next(ctx, commands)
	}
}

func redisMember(member string) redis.Z { return redis.Z{Member: member} }
