package mesh

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
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
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// outages are the ways in which a Redis can be gone.
var outages = map[string]struct{ begin, end func(*redisServer, *relay) }{
	"killed": {
		begin: func(s *redisServer, _ *relay) { s.kill() },
		end:   func(s *redisServer, _ *relay) { s.start() },
	},
	"accepts and never answers": {
		begin: func(_ *redisServer, r *relay) { r.hush() },
		end:   func(_ *redisServer, r *relay) { r.speak() },
	},
}

// outageTimeout is that of stores which an outage is tried on: long, so that nothing but an outage is late.
const outageTimeout = 3 * time.Second

func TestDegradedKeysWorkWithinTheLimitsOfTheInstance(t *testing.T) {
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			server, relay, module := startRelayed(t)
			module.Timeout = caddy.Duration(outageTimeout)
			logs, logged := observer.New(zap.InfoLevel)
			s := openRedis(t, module, func(s *redisStore) {
				s.logger = zap.New(logs)
				s.now = func() time.Time { return at(t, "2026-11-24T10:00:00Z") }
				s.redisClock(s.now())
			})
			limits := Limits{RPM: 100, RPD: 1000, SpendCap: 1000}
			want := make(map[string]Money)
			request := func() Verdict {
				t.Helper()
				id := newRequestID()
				began := time.Now()
				v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: id, Limits: limits})
				if err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > 2*outageTimeout {
					t.Errorf("a request took %s", took)
				}
				if v.Refused == "" {
					s.Settle(Event{RequestID: id, KeyID: "key", Cost: 1})
					want[id] = 1
				}
				return v
			}
			for i := range 40 {
				if v := request(); v.Refused != "" || s.degraded() {
					t.Fatalf("%d: %+v", i, v)
				}
			}
			settledAll(t, s)
			commands := countCommands(s, nil)
			asked := func() int { return commands.of("evalsha " + s.admits.script.Hash()) }
			outage.begin(server, relay)
			for i := range 60 {
				if v := request(); v.Refused != "" || v.Minute.Used != int64(41+i) {
					t.Fatalf("%d: %+v", i, v)
				}
			}
			if n := asked(); n > maxFailures || !s.degraded() {
				t.Errorf("%d requests had to wait; degraded: %t", n, s.degraded())
			}
			if v := request(); v.Refused != LimitRPM {
				t.Errorf("passes the limit it knows of: %+v", v)
			}
			// and, to be sent again, what Redis had confirmed
			eventually(t, "what cannot be settled is in the journal", func() bool { return s.journal.count() >= 60 })

			outage.end(server, relay)
			settledAll(t, s)
			eventually(t, "Redis counts again", func() bool {
				v := request()
				if v.Minute.Used < 41 {
					t.Fatalf("Redis has lost count: %+v", v)
				}
				// what it was asked when it did not answer it may have counted all the same
				return v.Minute.Used <= int64(40+asked()) && !s.degraded()
			})
			settledAll(t, s)
			expectBalance(t, s, "key", want)
			failures := logged.FilterLevelExact(zapcore.ErrorLevel)
			// the reaper may have two of its own to tell of, should its turn come before the breaker opens
			if n := failures.FilterMessage(s.failureMode()).Len(); n != 1 || failures.Len() > 3 {
				t.Errorf("the outage is in the log %d times: %v", n, logged.All())
			}
			if n := logged.FilterMessage("recovered").FilterField(zap.String("from", s.failureMode())).Len(); n != 1 {
				t.Errorf("the end was logged %d times", n)
			}
		})
	}
}

func TestRefusedForAnOutageIsNoLimitAndQuick(t *testing.T) {
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			server, relay, module := startRelayed(t)
			module.Timeout = caddy.Duration(outageTimeout)
			module.OnFailure = "refuse"
			s := openRedis(t, module)
			admitRedis(t, s, Admission{KeyID: "key", RequestID: newRequestID()})
			outage.begin(server, relay)
			for range 100 {
				began := time.Now()
				v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID(), Limits: Limits{RPM: 1000}})
				if err == nil || v != (Verdict{}) {
					t.Fatalf("%+v, %v", v, err)
				}
				if took := time.Since(began); took > 2*outageTimeout {
					t.Errorf("took %s", took)
				}
			}
			outage.end(server, relay)
			settledAll(t, s)
			v := admitRedis(t, s, Admission{KeyID: "key", Limits: Limits{RPM: 1000}})
			if v.Day.Used != 2 {
				t.Errorf("what was refused has been counted: %+v", v)
			}
			if b := readRedis(t, s, "key"); b.pending != 1 {
				t.Errorf("%d are pending, want 1", b.pending)
			}
		})
	}
}

func TestOutageIsA503ToTheClientAndOneLineInTheLog(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	site := strings.Replace(site(""), "store local $DIR/mesh.db",
		"store redis "+freeAddress(t)+" {\n\t\ttimeout 5s\n\t\tjournal $DIR/journal.db\n\t\ton_failure refuse\n\t}", 1)
	g := startGateway(t, up.address(), site)
	for range 20 {
		for _, key := range []string{testKey, otherKey} {
			r := g.post(chatBody, "Authorization", "Bearer "+key)
			if r.StatusCode != 503 || r.errorCode(t) != "store_unavailable" || r.Header.Get("Retry-After") != "1" {
				t.Fatalf("%s %s", r.Status, r.body)
			}
		}
	}
	log, err := os.ReadFile(filepath.Join(g.dir, "caddy.log"))
	if err != nil {
		t.Fatal(err)
	}
	lines := regexp.MustCompile(`(?m)^.*"level":"error".*"logger":"(mesh|http\.handlers\.mesh).*$`).FindAllString(string(log), -1)
	var outage int
	for _, line := range lines {
		if strings.Contains(line, "refusing requests") {
			outage++
		} else if !strings.Contains(line, "changes to keys are not heard of") {
			t.Errorf("logged: %s", line)
		}
	}
	if outage != 1 {
		t.Errorf("the outage is in the log %d times", outage)
	}
	if n := strings.Count(string(log), `"request refused"`); n < 40 {
		t.Errorf("the debug log has %d of 40 requests", n)
	}
	r := startGateway(t, up.address(), strings.Replace(site, "on_failure refuse", "", 1)).post(chatBody)
	if r.StatusCode != 200 {
		t.Errorf("%s %s", r.Status, r.body)
	}
}

func TestManyAtOnceWaitNoLongerThanOneWhenRedisGoes(t *testing.T) {
	_, relay, module := startRelayed(t)
	timeout := time.Duration(module.Timeout)
	s := openRedis(t, module)
	admitRedis(t, s, Admission{KeyID: "key"})
	relay.hush()
	var slowest atomic.Int64
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			began := time.Now()
			if _, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID()}); err != nil {
				t.Error(err)
			}
			for took := int64(time.Since(began)); ; {
				if was := slowest.Load(); took <= was || slowest.CompareAndSwap(was, took) {
					break
				}
			}
		})
		if i%100 == 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	wg.Wait()
	if took := time.Duration(slowest.Load()); took >= 2*timeout {
		t.Errorf("the slowest of 300 took %s", took)
	}
	var wait time.Duration
	for range 1000 {
		began := time.Now()
		s.Admit(t.Context(), Admission{KeyID: "key"})
		wait += time.Since(began)
	}
	if wait >= timeout {
		t.Errorf("1000 requests to an open breaker took %s", wait)
	}
}

// respProxy passes RESP commands on to a server, except those it is told to refuse or to hang up on.
type respProxy struct {
	listener net.Listener
	refused  map[string]string // what it answers, by command; "" hangs up
	mu       sync.Mutex
	seen     map[string]int
}

func startRESPProxy(t *testing.T, target string, refused map[string]string) *respProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &respProxy{listener: listener, refused: refused, seen: make(map[string]int)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn, target)
		}
	}()
	t.Cleanup(func() { listener.Close() })
	return p
}

func (p *respProxy) serve(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	commands, answers := bufio.NewReader(client), bufio.NewReader(server)
	for {
		raw, words, err := readRESP(commands)
		if err != nil || len(words) == 0 {
			return
		}
		name := strings.ToLower(words[0])
		p.mu.Lock()
		p.seen[name]++
		p.mu.Unlock()
		answer, refuse := p.refused[name]
		switch {
		case refuse && answer == "":
			return
		case refuse:
			fmt.Fprintf(client, "-%s\r\n", answer)
			continue
		}
		server.Write(raw)
		if raw, _, err = readRESP(answers); err != nil {
			return
		}
		client.Write(raw)
	}
}

// readRESP reads one value and returns its bytes, and its elements where it is a flat array.
func readRESP(r *bufio.Reader) (raw []byte, words []string, err error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return nil, nil, err
	}
	raw = []byte(line)
	n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
	switch line[0] {
	case '*':
		for range n {
			element, word, err := readRESP(r)
			if err != nil {
				return nil, nil, err
			}
			raw = append(raw, element...)
			words = append(words, word...)
		}
	case '$':
		if n < 0 {
			return raw, []string{""}, nil
		}
		text := make([]byte, n+2)
		if _, err := io.ReadFull(r, text); err != nil {
			return nil, nil, err
		}
		return append(raw, text...), []string{string(text[:n])}, nil
	}
	return raw, words, nil
}

func TestProxyThatRefusesDigestsGetsWholeScripts(t *testing.T) {
	for name, refused := range map[string]map[string]string{
		"with an error":    {"evalsha": "ERR unknown command 'EVALSHA'", "script": "ERR unknown command", "hello": "ERR unknown command"},
		"in its own words": {"evalsha": "ERR handle request, command 'EVALSHA' is not allowed", "script": "ERR no", "hello": "ERR no"},
		"by hanging up":    {"evalsha": "", "script": ""},
	} {
		t.Run(name, func(t *testing.T) {
			server := startRedis(t)
			proxy := startRESPProxy(t, server.address, refused)
			s := openRedis(t, redisModule(t, proxy.listener.Addr().String()))
			eventually(t, "Redis decides", func() bool {
				s.Admit(t.Context(), Admission{KeyID: "warm"})
				v, err := s.Admit(t.Context(), Admission{KeyID: "warm", Limits: Limits{RPM: 1}})
				return err == nil && v.Refused == LimitRPM && !s.degraded() && s.admits.noDigest.Load()
			})
			want := make(map[string]Money)
			for range 50 {
				id := newRequestID()
				admitRedis(t, s, Admission{KeyID: "key", RequestID: id})
				s.Settle(Event{RequestID: id, KeyID: "key", Cost: 2})
				want[id] = 2
			}
			settledAll(t, s)
			expectBalance(t, s, "key", want)
			proxy.mu.Lock()
			defer proxy.mu.Unlock()
			if proxy.seen["evalsha"] > 30 || proxy.seen["eval"] < 50 || proxy.seen["script"] > 0 {
				t.Errorf("%v", proxy.seen)
			}
		})
	}
}

func TestRedisWithoutEVALSHA(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t, "--rename-command", "EVALSHA", "", "--rename-command", "SCRIPT", "").address))
	id := newRequestID()
	admitRedis(t, s, Admission{KeyID: "key", RequestID: id})
	s.Settle(Event{RequestID: id, KeyID: "key", Cost: 2})
	settledAll(t, s)
	expectBalance(t, s, "key", map[string]Money{id: 2})
}

func TestScriptCacheMayBeFlushedAtAnyTime(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	want := make(map[string]Money)
	for range 20 {
		server.client().ScriptFlush(t.Context())
		id := newRequestID()
		admitRedis(t, s, Admission{KeyID: "key", RequestID: id})
		s.Settle(Event{RequestID: id, KeyID: "key", Cost: 2})
		want[id] = 2
		settledAll(t, s)
	}
	expectBalance(t, s, "key", want)
	if s.admits.noDigest.Load() || s.settles.noDigest.Load() {
		t.Error("took a flushed cache for a Redis that knows no digests")
	}
}

func TestBreakerOpensAfterFailuresInARowOnly(t *testing.T) {
	b := newBreaker("away", zap.NewNop())
	failure := errors.New("connection reset")
	for range 10 {
		for range maxFailures - 1 {
			b.noteTimed("key", failure)
		}
		b.noteTimed("key", nil)
	}
	if b.open() {
		t.Fatal("opened, though there was always an answer in between")
	}
	for range maxFailures {
		b.noteTimed("key", failure)
		b.note("other", nil) // nobody waited for it, so it may have come too late
	}
	b.noteTimed("other", nil) // of a request that was under way
	if !b.open() || b.suspected() != "key" {
		t.Fatalf("open: %t, suspects %q", b.open(), b.suspected())
	}
	select {
	case <-b.opened():
	default:
		t.Error("those who wait are not told")
	}
	b.close()
	select {
	case <-b.opened():
		t.Error("those who come are told that it is open")
	default:
	}
	if b.open() || b.failures.Load() != 0 {
		t.Error("did not close")
	}
}

// TestRedisSlowerThanTheTimeoutOpensTheBreaker sends one request after another, and has each settled before the next:
// settlements may take longer than requests, so that they go through.
func TestRedisSlowerThanTheTimeoutOpensTheBreaker(t *testing.T) {
	server, relay, module := startRelayed(t)
	module.Timeout = caddy.Duration(100 * time.Millisecond)
	s := openRedis(t, module)
	eventually(t, "Redis knows the scripts", func() bool {
		id := newRequestID()
		s.Admit(t.Context(), Admission{KeyID: "key", RequestID: id})
		s.Settle(Event{RequestID: id, KeyID: "key"})
		settledAll(t, s)
		return server.client().XLen(t.Context(), "mesh:{key}:ledger").Val() > 1
	})
	commands := countCommands(s, nil)
	relay.delay.Store(int64(250 * time.Millisecond))
	for i := range 20 {
		admission := Admission{KeyID: "key", RequestID: newRequestID()}
		if _, err := s.Admit(t.Context(), admission); err != nil {
			t.Fatal(err)
		}
		if n := commands.of("evalsha " + s.admits.script.Hash()); n > maxFailures {
			t.Fatalf("request %d was the %dth to wait", i+1, n)
		}
		s.Settle(Event{RequestID: admission.RequestID, KeyID: "key"})
		eventually(t, "it is settled, or in the journal", func() bool {
			s.queue.mu.Lock()
			defer s.queue.mu.Unlock()
			return len(s.queue.waiting) == 0 && !s.writing.Load()
		})
	}
	if !s.degraded() {
		t.Error("the breaker is not open")
	}
	relay.delay.Store(0)
	settledAll(t, s)
}

// TestLackOfConnectionsIsLatenessAndNoFaultOfDigests has the heart get no connection where it sends a digest.
func TestLackOfConnectionsIsLatenessAndNoFaultOfDigests(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	countCommands(s, func(name string) error {
		if strings.HasPrefix(name, "evalsha") {
			return redis.ErrPoolTimeout
		}
		return nil
	})
	for range 2 * maxFailures {
		if err := s.beat(t.Context()); !errors.Is(err, redis.ErrPoolTimeout) {
			t.Errorf("the heart beats: %v", err)
		}
	}
	if s.admits.noDigest.Load() || s.beats.noDigest.Load() {
		t.Error("took a lack of connections for a proxy that breaks them")
	}
	for range maxFailures {
		if _, err := s.Admit(t.Context(), Admission{KeyID: "key"}); err != nil {
			t.Error(err)
		}
	}
	if !s.degraded() {
		t.Error("requests go on waiting for connections")
	}
}

func TestDigestsThatBreakAConnectionNowAndThenAreSentOn(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	var broken atomic.Bool
	countCommands(s, func(name string) error {
		if strings.HasPrefix(name, "evalsha") && broken.Load() {
			return io.EOF
		}
		return nil
	})
	for range 3 * maxFailures {
		for _, now := range []bool{true, false} {
			broken.Store(now)
			if err := s.beat(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	if s.beats.noDigest.Load() {
		t.Error("sends whole scripts")
	}
}
