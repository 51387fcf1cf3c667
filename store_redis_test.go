package mesh

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"
)

func provisioned(t *testing.T, r *RedisStore) *RedisStore {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	if err := r.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRedisStoreKeyHidesThePasswordAndTellsStoresApart(t *testing.T) {
	t.Setenv("MESH_TEST_PASSWORD", "hunter2")
	make := func(change func(*RedisStore)) string {
		r := &RedisStore{Addresses: []string{"redis.example"}, Password: "{env.MESH_TEST_PASSWORD}", Journal: "/tmp/j"}
		change(r)
		return provisioned(t, r).StoreKey()
	}
	base := make(func(*RedisStore) {})
	if base != make(func(*RedisStore) {}) || !strings.HasPrefix(base, "redis:redis.example:6379/0/mesh:") {
		t.Errorf("key %s", base)
	}
	keys := map[string]string{base: "base"}
	for name, change := range map[string]func(*RedisStore){
		"address":  func(r *RedisStore) { r.Addresses[0] = "other.example" },
		"db":       func(r *RedisStore) { r.DB = 1 },
		"prefix":   func(r *RedisStore) { r.KeyPrefix = "other" },
		"password": func(*RedisStore) { os.Setenv("MESH_TEST_PASSWORD", "hunter3") },
		"failure":  func(r *RedisStore) { r.OnFailure = "refuse" },
		"timeout":  func(r *RedisStore) { r.Timeout = 5 },
		"tls":      func(r *RedisStore) { r.TLS = true },
		"sentinel": func(r *RedisStore) { r.MasterName, r.SentinelPassword = "main", "{env.MESH_TEST_PASSWORD}" },
		"sentinel password": func(r *RedisStore) {
			r.MasterName, r.SentinelPassword, r.Password = "main", "{env.MESH_TEST_PASSWORD}", "same"
			os.Setenv("MESH_TEST_PASSWORD", "hunter3")
		},
		"sentinel's other password": func(r *RedisStore) {
			r.MasterName, r.SentinelPassword, r.Password = "main", "{env.MESH_TEST_PASSWORD}", "same"
		},
	} {
		t.Setenv("MESH_TEST_PASSWORD", "hunter2")
		key := make(change)
		if other, ok := keys[key]; ok {
			t.Errorf("%s and %s have one key", name, other)
		}
		keys[key] = name
		if strings.Contains(key, "hunter") {
			t.Errorf("the password is in %s", key)
		}
	}
}

func TestRedisStoreIsProvisionedWithDefaultsAndWithoutRedis(t *testing.T) {
	r := provisioned(t, &RedisStore{Addresses: []string{"a", "[::1]", "c:7000"}, MasterName: "m"})
	if got := strings.Join(r.options.Addrs, " "); got != "a:26379 [::1]:26379 c:7000" {
		t.Errorf("addresses %s", got)
	}
	want := filepath.Join(caddy.AppDataDir(), "mesh", "redis-journal.db")
	if c := r.config; c.journal != want || c.timeout != 100*time.Millisecond || c.refuse || c.maxEvents != 100_000 || c.prefix != "mesh" || c.mode != "sentinel" {
		t.Errorf("%+v", c)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	for _, wrong := range []*RedisStore{
		{},
		{Addresses: []string{"{env.MESH_TEST_NOT_THERE}"}},
		{Addresses: []string{"a"}, Password: "{env.MESH_TEST_NOT_THERE}"},
		{Addresses: []string{"a"}, OnFailure: "panic"},
		{Addresses: []string{"a"}, KeyPrefix: "{x}"},
		{Addresses: []string{"a"}, DB: -1},
		{Addresses: []string{"a", "b"}, DB: 1},
		{Addresses: []string{"a"}, Timeout: -1},
		{Addresses: []string{"a"}, MaxEvents: -1},
		{Addresses: []string{"a"}, TLSServerName: "b"},
		{Addresses: []string{"a"}, SentinelPassword: "b"},
		{Addresses: []string{"a"}, MasterName: "m", SentinelUsername: "b"},
		{Addresses: []string{"a"}, MasterName: "m", SentinelPassword: "{env.MESH_TEST_NOT_THERE}"},
		{Addresses: []string{"a"}, TLS: true, TLSCA: "/not/there"},
	} {
		if err := wrong.Provision(ctx); err == nil {
			t.Errorf("%+v was accepted", wrong)
		}
	}
}

func TestRedisStoreFromACaddyfile(t *testing.T) {
	parse := func(text string) (*RedisStore, error) {
		r := new(RedisStore)
		return r, r.UnmarshalCaddyfile(caddyfile.NewTestDispenser(text))
	}
	r, err := parse(`redis {
		address 10.0.0.1:6379 10.0.0.2:6379
		master_name mymaster
		username app
		password {env.REDIS_PASSWORD}
		sentinel_username watcher
		sentinel_password {env.SENTINEL_PASSWORD}
		db 2
		tls
		tls_server_name redis.internal
		tls_ca ca.pem
		key_prefix other
		timeout 50ms
		on_failure refuse
		journal journal.db
		max_events 500
	}`)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := json.Marshal(r)
	const want = `{"address":["10.0.0.1:6379","10.0.0.2:6379"],"master_name":"mymaster","username":"app",` +
		`"password":"{env.REDIS_PASSWORD}","sentinel_username":"watcher","sentinel_password":"{env.SENTINEL_PASSWORD}","db":2,"tls":true,"tls_server_name":"redis.internal","tls_ca":"ca.pem",` +
		`"key_prefix":"other","timeout":50000000,"on_failure":"refuse","journal":"journal.db","max_events":500}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if r, err = parse("redis 10.0.0.1:6379"); err != nil || len(r.Addresses) != 1 {
		t.Errorf("%+v: %v", r, err)
	}
	for _, wrong := range []string{
		"redis", "redis a {\n address b\n}", "redis a {\n db x\n}", "redis a {\n db -1\n}", "redis a {\n tls yes\n}",
		"redis a {\n on_failure panic\n}", "redis a {\n timeout 0\n}", "redis a {\n nonsense\n}", "redis a {\n sentinel_password b\n}", "redis {\n address\n}",
	} {
		if _, err := parse(wrong); err == nil {
			t.Errorf("%q was accepted", wrong)
		}
	}
}

// certificate makes one that signs itself, for a name and for 127.0.0.1.
func certificate(t *testing.T, dir, name string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: encoded}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func TestRedisByTLSAsAnACLUser(t *testing.T) {
	certFile, keyFile := certificate(t, t.TempDir(), "redis.internal")
	tlsAddress := freeAddress(t)
	_, port, _ := net.SplitHostPort(tlsAddress)
	startRedis(t, "--tls-port", port, "--tls-cert-file", certFile, "--tls-key-file", keyFile, "--tls-auth-clients", "no",
		"--requirepass", "of the default user",
		"--user", "app", "on", ">hunter2", "~mesh:*", "&mesh:*", "+@all")
	t.Setenv("MESH_TEST_PASSWORD", "hunter2")
	module := redisModule(t, tlsAddress)
	module.TLS, module.TLSCA, module.TLSServerName = true, certFile, "redis.internal"
	module.Username, module.Password = "app", "{env.MESH_TEST_PASSWORD}"
	s := openRedis(t, module)
	id := newRequestID()
	admitRedis(t, s, Admission{KeyID: "key", RequestID: id})
	s.Settle(Event{RequestID: id, KeyID: "key", Cost: 2})
	settledAll(t, s)
	if err := s.reapAll(t.Context(), map[string]time.Time{}); err != nil {
		t.Error(err)
	}
	expectBalance(t, s, "key", map[string]Money{id: 2})

	wrong := *module
	wrong.Password = "wrong"
	wrong.Journal = filepath.Join(t.TempDir(), "journal.db")
	_, err := provisioned(t, &wrong).OpenStore()
	if err == nil || !strings.Contains(err.Error(), "WRONGPASS") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("with a wrong password: %v", err)
	}
	wrong = *module
	wrong.TLSServerName = "other.internal"
	wrong.Journal = filepath.Join(t.TempDir(), "journal.db")
	s = openRedis(t, &wrong, func(s *redisStore) { s.logger = zap.NewNop() })
	if !s.degraded() {
		t.Error("connected to a server with another name")
	}
}

func TestStoresThatDifferInTheirOptionsShareAJournal(t *testing.T) {
	server := startRedis(t)
	module := redisModule(t, server.address)
	old := openRedis(t, module)
	changed := *module
	changed.OnFailure = "refuse"
	next := openRedis(t, &changed) // as a reload does, before it closes the old one
	server.kill()
	want := make(map[string]Money)
	for i, s := range []*redisStore{old, next} {
		for range 300 {
			id := newRequestID()
			want[id] = Money(i + 1)
			s.Settle(Event{RequestID: id, KeyID: "key", Cost: want[id]})
		}
	}
	eventually(t, "they are in the journal", func() bool { return next.journal.count() == 600 })
	closeRedis(t, old)
	server.start()
	settledAll(t, next)
	expectBalance(t, next, "key", want)
	another := *module
	another.DB = 1
	if s := openRedis(t, &another); s.journal.count() != 0 {
		t.Error("another database has the entries as well")
	}
}
