package mesh

import (
	"context"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// keyServer is a Redis of the test's own.
type keyServer struct {
	t       testing.TB
	address string
	args    []string
	child   *exec.Cmd
	admin   *redis.Client
}

// startKeyServer runs a Redis on a free port. What it says it has written survives a kill.
func startKeyServer(t testing.TB, options ...string) *keyServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	s := &keyServer{t: t, address: freeAddress(t)}
	_, port, _ := net.SplitHostPort(s.address)
	s.args = append([]string{"--bind", "127.0.0.1", "--port", port, "--dir", t.TempDir(),
		"--save", "", "--appendonly", "yes", "--appendfsync", "always"}, options...)
	s.admin = redis.NewClient(&redis.Options{Addr: s.address})
	s.start()
	t.Cleanup(func() {
		s.admin.Close()
		s.kill()
	})
	return s
}

func (s *keyServer) start() {
	s.t.Helper()
	s.child = exec.Command("redis-server", s.args...)
	if err := s.child.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "Redis answers", func() bool { return s.admin.Ping(context.Background()).Err() == nil })
}

func (s *keyServer) kill() {
	s.child.Process.Kill() //nolint:errcheck // it is waited for
	s.child.Wait()         //nolint:errcheck // a killed process has no other way to end
}

// calls returns how often a command was called.
func (s *keyServer) calls(command string) int {
	s.t.Helper()
	stats, err := s.admin.Info(context.Background(), "commandstats").Result()
	if err != nil {
		s.t.Fatal(err)
	}
	found := regexp.MustCompile("cmdstat_" + command + `:calls=(\d+)`).FindStringSubmatch(stats)
	if found == nil {
		return 0
	}
	n, _ := strconv.Atoi(found[1])
	return n
}

// keys returns what one instance of the gateway has to do with the keys.
func (s *keyServer) keys(change ...func(*redis.Options)) *redisKeys {
	opt := &redis.Options{Addr: s.address, DialerRetries: 1, DialTimeout: 200 * time.Millisecond, ReadTimeout: 200 * time.Millisecond}
	for _, c := range change {
		c(opt)
	}
	client := redis.NewClient(opt)
	s.t.Cleanup(func() { client.Close() })
	return newRedisKeys(client, "mesh", zap.NewNop())
}

// keyRelay forwards connections to a server, until it is told to swallow what comes over those that are open.
type keyRelay struct {
	net.Listener
	server  string
	swallow atomic.Pointer[atomic.Bool] // of the connections that are made now
}

func startKeyRelay(t testing.TB, server string) *keyRelay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &keyRelay{Listener: l, server: server}
	r.swallow.Store(new(atomic.Bool))
	var running sync.WaitGroup
	ended, end := context.WithCancel(context.Background())
	running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { r.forward(ended, client, r.swallow.Load()) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		end()
		running.Wait()
	})
	return r
}

func (r *keyRelay) forward(ended context.Context, client net.Conn, swallow *atomic.Bool) {
	server, err := net.Dial("tcp", r.server)
	if err != nil {
		client.Close()
		return
	}
	defer context.AfterFunc(ended, func() { client.Close(); server.Close() })()
	var both sync.WaitGroup
	pipe := func(to, from net.Conn) {
		defer to.Close()
		buf := make([]byte, 4096)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			if !swallow.Load() {
				to.Write(buf[:n]) //nolint:errcheck // the next Read tells
			}
		}
	}
	both.Go(func() { pipe(client, server) })
	both.Go(func() { pipe(server, client) })
	both.Wait()
}
