//go:build linux

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// redisServer is a Redis, which keeps its data over kills and starts.
type redisServer struct {
	*process
	rig     *rig
	address string
	args    []string
}

// redisInstalled reports whether there is a Redis to run.
func redisInstalled() bool {
	_, err := exec.LookPath("redis-server")
	return err == nil
}

// startRedis runs a Redis that writes an append-only file, synced once a second ("everysec") or before each answer
// ("always").
func (r *rig) startRedis(ctx context.Context, fsync string) (*redisServer, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	_, port, _ := strings.Cut(address, ":")
	dir := filepath.Join(r.dir, "redis")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &redisServer{rig: r, address: address}
	s.args = []string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "yes", "--appendfsync", fsync,
		"--dir", dir, "--loglevel", "warning"}
	return s, s.start(ctx)
}

// start runs it; after a kill, with all that it had kept.
func (s *redisServer) start(ctx context.Context) (err error) {
	if s.process, err = s.rig.start("redis", exec.Command("redis-server", s.args...)); err != nil {
		return err
	}
	client := s.client()
	defer client.Close()
	return s.ready(ctx, func() error { return client.Ping(ctx).Err() })
}

func (s *redisServer) client() *redis.Client {
	return redis.NewClient(&redis.Options{Addr: s.address, Protocol: 2, DisableIdentity: true, ReadTimeout: time.Minute})
}
