package mesh

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(RedisStore{})
	redis.SetLogger(redisLog{})
}

// RedisStore keeps counters, spend and the ledger in Redis, for gateways that run as several instances: one server, one
// watched by Sentinel, or a Cluster. It needs Redis 5 or newer, or something that speaks like it and has Lua scripts.
//
// A request costs one round trip to Redis before it is answered, and at most one command after it. While Redis cannot
// be reached, or is slower than timeout, what on_failure says is done, and what has ended is written to the journal;
// it is entered into Redis, once, when Redis is back.
type RedisStore struct {
	// The servers, as `host:port`, or `unix/` and the path of a socket. With master_name these are the Sentinels; without
	// it, several are nodes of a Cluster. Placeholders are replaced when the configuration is loaded. The default port is
	// 6379, and 26379 for a Sentinel.
	Addresses []string `json:"address,omitempty"`

	// The name under which the Sentinels know the master.
	MasterName string `json:"master_name,omitempty"`

	// The ACL user. Default: Redis's default user. May be a placeholder.
	Username string `json:"username,omitempty"`

	// The password. May be a placeholder, such as `{env.REDIS_PASSWORD}`, and had better be one.
	Password string `json:"password,omitempty"`

	// The ACL user of the Sentinels, where they have one of their own: they know nothing of the server's users. May be a
	// placeholder.
	SentinelUsername string `json:"sentinel_username,omitempty"`

	// The password of the Sentinels. May be a placeholder. Default: none, whatever the server's password is.
	SentinelPassword string `json:"sentinel_password,omitempty"`

	// The number of the database. A Cluster has only 0. Default: 0.
	DB int `json:"db,omitempty"`

	// Whether to connect by TLS.
	TLS bool `json:"tls,omitempty"`

	// The name that the server's certificate has to have. Default: the host of the address.
	TLSServerName string `json:"tls_server_name,omitempty"`

	// A file with the certificates, in PEM, of those who may sign the server's. Default: the system's.
	TLSCA string `json:"tls_ca,omitempty"`

	// What the names of all keys in Redis begin with. Default: `mesh`.
	KeyPrefix string `json:"key_prefix,omitempty"`

	// How long Redis may take to let a request through, connecting included. A Redis that is slower counts as one that
	// cannot be reached. Default: 100ms.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// What to do with requests while Redis cannot be reached. `degrade`: let them through, within their limits as this
	// instance alone knows them. `refuse`: answer 503. Default: `degrade`.
	OnFailure string `json:"on_failure,omitempty"`

	// The file that holds what is to be entered into Redis while Redis cannot be reached. It must be on a local disk, and
	// no other process may have it open. Default: `mesh/redis-journal.db` in Caddy's data directory.
	Journal string `json:"journal,omitempty"`

	// About how many entries the ledger of each key keeps. The oldest are deleted first; spend is not affected by that.
	// Default: 100000.
	MaxEvents int64 `json:"max_events,omitempty"`

	options redis.UniversalOptions
	config  redisConfig
	key     string
}

// redisConfig is a RedisStore with its defaults filled in and its placeholders resolved.
type redisConfig struct {
	mode      string // for the log
	addresses string // for the log
	identity  string // of where the data in Redis is, without credentials
	prefix    string
	timeout   time.Duration
	refuse    bool
	journal   string
	maxEvents int64
}

const (
	defaultRedisTimeout   = 100 * time.Millisecond
	defaultRedisMaxEvents = 100_000
	defaultRedisPrefix    = "mesh"

	onFailureDegrade = "degrade"
	onFailureRefuse  = "refuse"

	modeCluster = "cluster"
)

// CaddyModule returns the Caddy module information.
func (RedisStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "mesh.stores.redis",
		New: func() caddy.Module { return new(RedisStore) },
	}
}

// Provision checks and resolves the options. It connects to nothing.
func (r *RedisStore) Provision(caddy.Context) error {
	if err := r.check(); err != nil {
		return err
	}
	repl := caddy.NewReplacer()
	o := redis.UniversalOptions{
		MasterName: r.MasterName,
		DB:         r.DB,

		// RESP2 and no CLIENT commands: proxies know nothing else, and nothing here needs more.
		Protocol:        2,
		DisableIdentity: true,

		// What a command costs is bounded by its context. Repeating one is left to its caller, who knows what became of it;
		// a Cluster's client repeats some by itself, which the scripts allow.
		ContextTimeoutEnabled: true,
		MaxRetries:            -1,
		DialerRetries:         1,

		PoolSize: max(20, 10*runtime.GOMAXPROCS(0)),
	}
	for _, address := range r.Addresses {
		resolved, err := repl.ReplaceOrErr(address, true, true)
		if err != nil {
			return fmt.Errorf("address: %w", err)
		}
		o.Addrs = append(o.Addrs, r.withPort(strings.TrimPrefix(resolved, "unix/")))
	}
	for _, secret := range []struct {
		name, from string
		to         *string
	}{
		{"username", r.Username, &o.Username},
		{"password", r.Password, &o.Password},
		{"sentinel_username", r.SentinelUsername, &o.SentinelUsername},
		{"sentinel_password", r.SentinelPassword, &o.SentinelPassword},
	} {
		var err error
		if *secret.to, err = repl.ReplaceOrErr(secret.from, true, true); err != nil {
			return fmt.Errorf("%s: %w", secret.name, err)
		}
	}
	if err := r.provisionTLS(&o); err != nil {
		return err
	}
	c := redisConfig{
		mode:      r.mode(),
		prefix:    r.KeyPrefix,
		timeout:   time.Duration(r.Timeout),
		refuse:    r.OnFailure == onFailureRefuse,
		maxEvents: r.MaxEvents,
	}
	if c.prefix == "" {
		c.prefix = defaultRedisPrefix
	}
	if c.timeout == 0 {
		c.timeout = defaultRedisTimeout
	}
	if c.maxEvents == 0 {
		c.maxEvents = defaultRedisMaxEvents
	}
	o.DialTimeout = c.timeout
	o.PoolTimeout = c.timeout
	o.ReadTimeout = max(c.timeout, settleTimeout)
	o.WriteTimeout = o.ReadTimeout
	var err error
	if c.journal, err = r.journalPath(repl); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	c.addresses = strings.Join(o.Addrs, " ")
	c.identity = digestText(o.MasterName, c.addresses, fmt.Sprint(o.DB), c.prefix)
	r.options, r.config = o, c
	r.key = r.storeKey()
	return nil
}

// mode says what the addresses lead to, as redis.NewUniversalClient decides it.
func (r *RedisStore) mode() string {
	switch {
	case r.MasterName != "":
		return "sentinel"
	case len(r.Addresses) > 1:
		return modeCluster
	}
	return "one server"
}

func (r *RedisStore) check() error {
	switch {
	case len(r.Addresses) == 0:
		return errors.New("a redis store needs an address")
	case r.DB < 0:
		return fmt.Errorf("db is %d, but cannot be negative", r.DB)
	case r.DB != 0 && r.MasterName == "" && len(r.Addresses) > 1:
		return errors.New("db: a Cluster has only database 0")
	case r.Timeout < 0:
		return fmt.Errorf("timeout: %s is negative", time.Duration(r.Timeout))
	case r.MaxEvents < 0:
		return fmt.Errorf("max_events is %d, but cannot be negative", r.MaxEvents)
	case strings.ContainsAny(r.KeyPrefix, "{}"):
		return fmt.Errorf("key_prefix: %q has a brace in it, which would say where in a Cluster a key belongs", r.KeyPrefix)
	case r.MasterName == "" && (r.SentinelUsername != "" || r.SentinelPassword != ""):
		return errors.New("sentinel_username and sentinel_password need master_name")
	case r.SentinelUsername != "" && r.SentinelPassword == "":
		return errors.New("sentinel_username needs sentinel_password beside it")
	case !r.TLS && (r.TLSServerName != "" || r.TLSCA != ""):
		return errors.New("tls_server_name and tls_ca need tls")
	}
	return r.checkOnFailure()
}

func (r *RedisStore) checkOnFailure() error {
	switch r.OnFailure {
	case "", onFailureDegrade, onFailureRefuse:
		return nil
	}
	return fmt.Errorf("on_failure: %q is neither degrade nor refuse", r.OnFailure)
}

func (r *RedisStore) withPort(address string) string {
	if _, _, err := net.SplitHostPort(address); err == nil || strings.HasPrefix(address, "/") {
		return address
	}
	port := "6379"
	if r.MasterName != "" {
		port = "26379"
	}
	return net.JoinHostPort(strings.Trim(address, "[]"), port)
}

func (r *RedisStore) provisionTLS(o *redis.UniversalOptions) error {
	if !r.TLS {
		return nil
	}
	o.TLSConfig = &tls.Config{ServerName: r.TLSServerName, MinVersion: tls.VersionTLS12}
	if r.TLSCA == "" {
		return nil
	}
	pem, err := os.ReadFile(r.TLSCA)
	if err != nil {
		return fmt.Errorf("tls_ca: %w", err)
	}
	o.TLSConfig.RootCAs = x509.NewCertPool()
	if !o.TLSConfig.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("tls_ca: %s has no certificate in it", r.TLSCA)
	}
	return nil
}

func (r *RedisStore) journalPath(repl *caddy.Replacer) (string, error) {
	if r.Journal == "" {
		return filepath.Abs(filepath.Join(caddy.AppDataDir(), "mesh", "redis-journal.db"))
	}
	path, err := repl.ReplaceOrErr(r.Journal, true, true)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// storeKey is all of the options, as a digest because a password is among them. Stores that differ only in how they go
// about it, such as in their timeout, may well be open at once: what they share is in Redis.
func (r *RedisStore) storeKey() string {
	options, _ := json.Marshal(r) // strings and numbers: cannot fail
	return "redis:" + strings.Join(r.options.Addrs, ",") + "/" + fmt.Sprint(r.options.DB) + "/" + r.config.prefix + ":" +
		digestText(string(options), r.options.Username, r.options.Password, r.options.SentinelUsername, r.options.SentinelPassword,
			r.config.journal)
}

func digestText(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:12])
}

// StoreKey identifies Redis, and how it is used.
func (r *RedisStore) StoreKey() string { return r.key }

// OpenStore connects to Redis. A Redis that does not answer is no error: it may come back. One that refuses the
// credentials is, and so is a journal that cannot be opened.
func (r *RedisStore) OpenStore() (Store, error) {
	s := newRedisStore(r.options, r.config)
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("opening redis store %s: %w", r.config.addresses, err)
	}
	return s, nil
}

// redisStore is one gateway's share of a Redis. A request waits for Admit alone. Three goroutines do the rest: one
// settles, one proves to the others that this gateway lives, and finds out when Redis is back, and one looks for
// requests of gateways that died.
type redisStore struct {
	redisConfig
	instance string // names this gateway in Redis; made up at each start
	client   redis.UniversalClient
	admits   *redisScript
	settles  *redisScript
	beats    *redisScript
	now      func() time.Time
	logger   *zap.Logger

	breaker   *breaker
	accounts  redisAccounts
	queue     settlements
	journal   *redisJournal
	keys      *keyCache
	templates redisTemplates
	jobs      redisJobs
	labels    map[string]toldLabel // those that Redis has been told of; is the writer's
	settled   recentlySettled
	writer    redisWriter
	writing   atomic.Bool // the writer has something in hand
	recovered time.Time   // when the breaker was last closed; is the heart's
	broke     int         // how often in a row a digest broke the connection and a whole script did not; is the heart's

	stop    chan struct{}
	written chan struct{} // the writer has ended
	beaten  chan struct{} // the heart has stopped
	reaped  chan struct{} // the reaper has ended

	journalTrouble trouble // is the writer's
	reapTrouble    trouble // is the reaper's
	idTrouble      trouble // is the reaper's
}

func newRedisStore(options redis.UniversalOptions, config redisConfig) *redisStore {
	logger := caddy.Log().Named("mesh.store.redis")
	s := &redisStore{
		redisConfig: config,
		instance:    rand.Text(),
		client:      redis.NewUniversalClient(&options),
		admits:      newRedisScript("admit", admitLua),
		settles:     newRedisScript("settle", settleLua),
		beats:       newRedisScript("heartbeat", heartbeatLua),
		jobs:        newRedisJobs(options),
		now:         time.Now,
		logger:      logger,

		journalTrouble: trouble{message: "the journal cannot be written; settlements wait in memory"},
		reapTrouble:    trouble{message: "requests of gateways that died cannot be looked for, or not everywhere"},
		idTrouble:      trouble{message: "which Redis this is cannot be found out; the journal's entries from when it had other addresses wait"},

		stop:    make(chan struct{}),
		written: make(chan struct{}),
		beaten:  make(chan struct{}),
		reaped:  make(chan struct{}),
	}
	s.breaker = newBreaker(s.failureMode(), logger)
	keys := newRedisKeys(s.client, s.prefix, s.breaker, logger)
	keys.degrade = !config.refuse
	s.keys = newKeyCache(keys, s.timeout)
	s.accounts.unregistered = make(chan struct{}, 1)
	s.queue.wake = make(chan struct{}, 1)
	return s
}

func (s *redisStore) failureMode() string {
	if s.refuse {
		return "Redis cannot be reached in time; refusing requests"
	}
	return "Redis cannot be reached in time; holding limits for this instance alone, settlements wait in the journal"
}

// open finds out whether Redis is there. It waits for that no longer than a request would.
func (s *redisStore) open() (err error) {
	if s.journal, err = openRedisJournal(s.redisConfig.journal, s.identity); err != nil {
		return errors.Join(fmt.Errorf("journal %s: %w", s.redisConfig.journal, err), s.client.Close(), s.jobs.client.Close())
	}
	s.journal.logger = s.logger
	s.breaker.logger = s.logger
	s.tellBreaker()
	if err := s.beat(context.Background()); isRefusedCredentials(err) {
		return errors.Join(err, s.journal.close(), s.client.Close(), s.jobs.client.Close())
	} else if err != nil {
		s.breaker.trip("", err)
	} else {
		s.idTrouble.note(s.logger, s.identify(context.Background()))
	}
	s.logger.Info("shared store",
		zap.String("mode", s.mode),
		zap.String("address", s.addresses),
		zap.String("on_failure", s.onFailure()),
		zap.Bool("reached", !s.degraded()),
		zap.Int("in_journal", s.journal.count()),
		zap.Int("set_aside", s.journal.countAside()))
	if n := s.journal.others(); n > 0 {
		s.logger.Warn("the journal has entries for another Redis, or for this one as far as it cannot be asked",
			zap.String("journal", s.redisConfig.journal), zap.Int("entries", n))
	}
	s.keys.open()
	go s.write()
	go s.live()
	go s.reap()
	return nil
}

func (s *redisStore) onFailure() string {
	if s.refuse {
		return onFailureRefuse
	}
	return onFailureDegrade
}

// FindKey finds a key that is kept in Redis.
func (s *redisStore) FindKey(ctx context.Context, secret [sha256.Size]byte) (*Key, error) {
	return s.keys.FindKey(ctx, secret)
}

// degraded reports whether Redis is taken for unreachable at the moment.
func (s *redisStore) degraded() bool { return s.breaker.open() }

func (s *redisStore) status() storeStatus {
	return storeStatus{Store: "redis, " + s.mode, Degraded: s.degraded(), OnFailure: s.onFailure(), Waiting: s.journal.count()}
}

// Destruct settles what is unsettled, in Redis or else in the journal, and disconnects.
func (s *redisStore) Destruct() error {
	close(s.stop)
	s.keys.close()
	<-s.reaped
	<-s.written
	<-s.beaten
	return errors.Join(s.journal.close(), s.client.Close(), s.jobs.client.Close())
}

// key returns the name of something of one key's. All of a key's data is in one slot of a Cluster.
func (s *redisStore) key(keyID, name string) string { return s.prefix + ":{" + keyID + "}:" + name }

// shared returns the name of something that belongs to no one key.
func (s *redisStore) shared(name string) string { return s.prefix + ":" + name }

// redisLog takes what go-redis says about its connections, each failure of which is reported to the caller as well.
type redisLog struct{}

func (redisLog) Printf(_ context.Context, format string, v ...any) {
	if c := caddy.Log().Named("mesh.store.redis").Check(zap.DebugLevel, "redis client"); c != nil {
		c.Write(zap.String("said", fmt.Sprintf(format, v...)))
	}
}

// Interface guards
var (
	_ caddy.Module      = (*RedisStore)(nil)
	_ caddy.Provisioner = (*RedisStore)(nil)
	_ StoreModule       = (*RedisStore)(nil)
	_ KeyStore          = (*redisStore)(nil)
)
