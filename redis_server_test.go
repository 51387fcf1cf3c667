package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// redisServer is a Redis in a process of its own. It writes before it confirms, so that a kill loses nothing, and leaves
// it to the system when that is on the disk: no test cuts the power, and a sync of a slow disk takes longer than many a
// timeout.
type redisServer struct {
	t       testing.TB
	address string
	dir     string
	args    []string
	child   *child
}

func redisBinary(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("redis-server")
	if err == nil {
		return path
	}
	if os.Getenv("CI") != "" {
		t.Fatal(err)
	}
	t.Skip("there is no redis-server")
	return ""
}

// startRedis runs a Redis, with arguments beside the usual ones, until the test ends.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	redisBinary(t)
	dir, err := os.MkdirTemp("", "redis")
	if err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	r := &redisServer{t: t, address: address, dir: dir}
	r.args = append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "yes", "--appendfsync", "no",
		"--dir", dir, "--unixsocket", r.socket(), "--loglevel", "warning"}, args...)
	t.Cleanup(func() {
		r.kill()
		os.RemoveAll(dir)
	})
	r.start()
	return r
}

func (r *redisServer) socket() string { return filepath.Join(r.dir, "socket") }

// start runs it; after a kill, with all that it had kept.
func (r *redisServer) start() {
	r.t.Helper()
	log := filepath.Join(r.dir, "log")
	r.child = startChild(r.t, exec.Command(redisBinary(r.t), r.args...), log)
	eventually(r.t, "Redis answers", func() bool {
		if r.child.over() {
			said, _ := os.ReadFile(log)
			if !strings.Contains(string(said), "Address already in use") { // by somebody's connection, as for a moment
				r.t.Fatalf("Redis ended: %s", said)
			}
			os.Remove(log)
			r.child = startChild(r.t, exec.Command(redisBinary(r.t), r.args...), log)
			return false
		}
		conn, err := net.Dial("unix", r.socket())
		if err != nil {
			return false
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Second))
		answer := make([]byte, 5)
		fmt.Fprint(conn, "PING\r\n")
		_, err = io.ReadFull(conn, answer)
		return err == nil && (string(answer) == "+PONG" || strings.HasPrefix(string(answer), "-NOA"))
	})
}

// kill ends it as a power cut does.
func (r *redisServer) kill() {
	if r.child == nil {
		return
	}
	r.child.end()
	r.child = nil
}

// client is the test's own, over the socket. It waits for a slow machine.
func (r *redisServer) client() *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: r.socket(), Protocol: 2, DisableIdentity: true, ReadTimeout: 10 * time.Second})
	r.t.Cleanup(func() { c.Close() })
	return c
}

// calls returns how often a command was called, by scripts as well.
func (r *redisServer) calls(command string) int { return r.stat(command, "calls") }

// rejected returns how often a command was refused, as by an ACL.
func (r *redisServer) rejected(command string) int { return r.stat(command, "rejected_calls") }

func (r *redisServer) stat(command, name string) int {
	r.t.Helper()
	stats, err := r.client().Info(context.Background(), "commandstats").Result()
	if err != nil {
		r.t.Fatal(err)
	}
	found := regexp.MustCompile("cmdstat_" + command + ":(?:.*,)?" + name + `=(\d+)`).FindStringSubmatch(stats)
	if found == nil {
		return 0
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// redisModule is a store's configuration for tests: a Redis that is slow because the machine is busy is no failure.
func redisModule(t testing.TB, address ...string) *RedisStore {
	return &RedisStore{
		Addresses: address,
		Timeout:   caddy.Duration(5 * time.Second),
		Journal:   filepath.Join(t.TempDir(), "journal.db"),
	}
}

// openRedis opens a store that the test closes, or that is closed at its end.
func openRedis(t testing.TB, module *RedisStore, change ...func(*redisStore)) *redisStore {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	if err := module.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	s := newRedisStore(module.options, module.config)
	s.logger = zap.NewNop()
	for _, f := range change {
		f(s)
	}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeRedis(t, s) })
	return s
}

func closeRedis(t testing.TB, s *redisStore) {
	t.Helper()
	select {
	case <-s.stop:
		return
	default:
	}
	if err := s.Destruct(); err != nil {
		t.Error(err)
	}
}

// redisBalance is what Redis has of a key.
type redisBalance struct {
	total, reserved string
	pending         int64
	entries         int
	sum             Money // of the entries
	ids             map[string]Event
}

func decodeEvent(t testing.TB, text string) (e Event) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatal(err)
	}
	return e
}

func readRedis(t testing.TB, s *redisStore, keyID string) (b redisBalance) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	account, err := s.client.HGetAll(ctx, s.key(keyID, "account")).Result()
	if err != nil {
		t.Fatal(err)
	}
	b.total, b.reserved = account["total"], account["reserved"]
	if b.pending, err = s.client.HLen(ctx, s.key(keyID, "pending")).Result(); err != nil {
		t.Fatal(err)
	}
	b.ids = make(map[string]Event)
	messages, err := s.client.XRange(ctx, s.key(keyID, "ledger"), "-", "+").Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		e := decodeEvent(t, m.Values["event"].(string))
		if _, twice := b.ids[e.RequestID]; twice {
			t.Errorf("%s is in the ledger twice", e.RequestID)
		}
		b.ids[e.RequestID] = e
		b.entries++
		b.sum += e.Cost
	}
	return b
}

// settledAll waits until nothing is on its way any more.
func settledAll(t testing.TB, s *redisStore) {
	t.Helper()
	eventuallyIn(t, time.Minute, "all is settled", func() bool {
		s.queue.mu.Lock()
		waiting := len(s.queue.waiting)
		s.queue.mu.Unlock()
		return waiting == 0 && s.journal.count() == 0 && !s.degraded() && !s.writing.Load()
	})
}

// relay passes connections on to a server, until it is told to do something worse with them.
type relay struct {
	listener net.Listener
	target   string
	delay    atomic.Int64 // nanoseconds that each answer is held back for

	mu    sync.Mutex
	conns map[*relayed]bool
	mute  chan struct{} // not nil: bytes are held back until it is closed
}

// relayed is one connection of a client, and the one to the server that belongs to it.
type relayed struct {
	client, server net.Conn
	lost           atomic.Bool // bytes are swallowed for good
}

func (c *relayed) close() {
	c.client.Close()
	c.server.Close()
}

func startRelay(t testing.TB, target string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{listener: listener, target: target, conns: make(map[*relayed]bool)}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { r.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		r.speak()
		r.reset()
		serving.Wait()
	})
	return r
}

// startRelayed runs a Redis, a relay before it, and has the options of a store that goes through the relay.
func startRelayed(t testing.TB) (*redisServer, *relay, *RedisStore) {
	t.Helper()
	server := startRedis(t)
	relay := startRelay(t, server.address)
	return server, relay, redisModule(t, relay.address())
}

func (r *relay) address() string { return r.listener.Addr().String() }

func (r *relay) serve(client net.Conn) {
	server, err := net.Dial("tcp", r.target)
	if err != nil {
		client.Close()
		return
	}
	c := &relayed{client: client, server: server}
	r.mu.Lock()
	r.conns[c] = true
	r.mu.Unlock()
	var copying sync.WaitGroup
	copying.Go(func() { r.copy(c, server, client, nil) })
	copying.Go(func() { r.copy(c, client, server, &r.delay) })
	copying.Wait()
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
}

func (r *relay) copy(c *relayed, to, from net.Conn, delay *atomic.Int64) {
	defer c.close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		r.mu.Lock()
		mute := r.mute
		r.mu.Unlock()
		if mute != nil {
			<-mute
		}
		if delay != nil {
			time.Sleep(time.Duration(delay.Load()))
		}
		if c.lost.Load() {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// hush holds back all bytes, both ways, until speak.
func (r *relay) hush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mute = make(chan struct{})
}

func (r *relay) speak() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mute != nil {
		close(r.mute)
		r.mute = nil
	}
}

// lose has the connections that are open now carry nothing any more, without a word to either side.
func (r *relay) lose() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		c.lost.Store(true)
	}
}

// reset breaks all connections.
func (r *relay) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		for _, conn := range []net.Conn{c.client, c.server} {
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
		}
		c.close()
	}
}
