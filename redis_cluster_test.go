package mesh

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/redis/go-redis/v9"
)

// startCluster runs three nodes that share the slots.
func startCluster(t testing.TB) []*redisServer {
	t.Helper()
	const slots = 16384
	var nodes []*redisServer
	for range 3 {
		nodes = append(nodes, startRedis(t, "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf",
			"--cluster-node-timeout", "2000", "--cluster-port", strconv.Itoa(freePort(t)), "--cluster-require-full-coverage", "no"))
	}
	for i, n := range nodes {
		c := n.client()
		if err := c.ClusterAddSlotsRange(t.Context(), i*slots/3, (i+1)*slots/3-1).Err(); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			_, port, _ := net.SplitHostPort(nodes[0].address)
			if err := c.Do(t.Context(), "cluster", "meet", "127.0.0.1", port, nodes[0].clusterPort()).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventuallyIn(t, time.Minute, "the cluster is whole", func() bool {
		for _, n := range nodes {
			info := n.client().ClusterInfo(t.Context()).Val()
			if !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, "cluster_slots_ok:16384") {
				return false
			}
		}
		return true
	})
	return nodes
}

func (r *redisServer) clusterPort() string {
	for i, arg := range r.args {
		if arg == "--cluster-port" {
			return r.args[i+1]
		}
	}
	return ""
}

func freePort(t testing.TB) int {
	_, port, _ := net.SplitHostPort(freeAddress(t))
	n, _ := strconv.Atoi(port)
	return n
}

func addresses(servers []*redisServer) (list []string) {
	for _, s := range servers {
		list = append(list, s.address)
	}
	return list
}

func TestStoresOnAClusterAdmitExactlyTheLimitAndSettleOnce(t *testing.T) {
	nodes := startCluster(t)
	stores := []*redisStore{openRedis(t, redisModule(t, addresses(nodes)...)), openRedis(t, redisModule(t, addresses(nodes)...))}
	for _, s := range stores {
		s.redisClock(at(t, "2026-11-24T10:00:00Z"))
		if s.mode != "cluster" {
			t.Errorf("mode %s", s.mode)
		}
	}
	const keys, limit = 12, 20
	var admitted [keys]atomic.Int64
	want := make([]map[string]Money, keys)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range keys {
		want[i] = make(map[string]Money)
		for n := range 4 * limit {
			wg.Go(func() {
				s, id := stores[n%2], newRequestID()
				v, err := s.Admit(t.Context(), Admission{KeyID: fmt.Sprint("key", i), RequestID: id, Limits: Limits{RPM: limit}})
				if err != nil {
					t.Error(err)
				}
				if v.Refused != "" {
					return
				}
				admitted[i].Add(1)
				cost := Money(n)
				mu.Lock()
				want[i][id] = cost
				mu.Unlock()
				s.Settle(Event{RequestID: id, KeyID: fmt.Sprint("key", i), SessionID: "s", Cost: cost})
			})
		}
	}
	wg.Wait()
	for _, s := range stores {
		settledAll(t, s)
	}
	for i := range keys {
		if got := admitted[i].Load(); got != limit {
			t.Errorf("key %d: admitted %d, want %d", i, got, limit)
		}
		expectBalance(t, stores[0], fmt.Sprint("key", i), want[i])
	}
	if err := stores[0].reapAll(t.Context(), map[string]time.Time{}); err != nil {
		t.Error(err)
	}
	used := 0
	for _, n := range nodes {
		if n.client().DBSize(t.Context()).Val() > 0 {
			used++
		}
	}
	if used != 3 {
		t.Errorf("only %d nodes have data", used)
	}
}

func TestClusterNodeThatIsKilledLosesAndDoublesNothing(t *testing.T) {
	nodes := startCluster(t)
	module := redisModule(t, addresses(nodes)...)
	module.Timeout = caddy.Duration(500 * time.Millisecond)
	s := openRedis(t, module)
	const keys = 6
	want := make([]map[string]Money, keys)
	var wg sync.WaitGroup
	var stop atomic.Bool
	for i := range keys {
		want[i] = make(map[string]Money)
		wg.Go(func() {
			for !stop.Load() {
				keyID, id, cost := fmt.Sprint("key", i), newRequestID(), rand.N[Money](1000)
				if v, err := s.Admit(t.Context(), Admission{KeyID: keyID, RequestID: id}); err != nil || v.Refused != "" {
					t.Errorf("%+v, %v", v, err)
				}
				s.Settle(Event{RequestID: id, KeyID: keyID, Cost: cost})
				want[i][id] = cost
				time.Sleep(rand.N(5 * time.Millisecond))
			}
		})
	}
	for _, n := range nodes[1:] {
		time.Sleep(200 * time.Millisecond)
		n.kill()
		time.Sleep(500 * time.Millisecond)
		n.start()
	}
	stop.Store(true)
	wg.Wait()
	settledAll(t, s)
	for i := range keys {
		expectBalance(t, s, fmt.Sprint("key", i), want[i])
	}
}

// startSentinel runs a Sentinel that watches a master, and of which a number have to agree. Options are lines of its
// configuration.
func startSentinel(t testing.TB, master *redisServer, quorum int, options ...string) (address string) {
	t.Helper()
	_, masterPort, _ := net.SplitHostPort(master.address)
	address = freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	text := "bind 127.0.0.1\nport " + port + "\nsentinel monitor main 127.0.0.1 " + masterPort + " " + strconv.Itoa(quorum) + "\n" +
		"sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 10000\n" + strings.Join(options, "\n") + "\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(startChild(t, exec.Command(redisBinary(t), config, "--sentinel"), config+".log").end)
	return address
}

// startReplica runs a server that follows a master.
func startReplica(t testing.TB, master *redisServer) *redisServer {
	t.Helper()
	_, port, _ := net.SplitHostPort(master.address)
	replica := startRedis(t, "--replicaof", "127.0.0.1 "+port, "--repl-diskless-sync-delay", "0")
	eventuallyIn(t, time.Minute, "the replica has caught up", func() bool {
		return strings.Contains(replica.client().Info(t.Context(), "replication").Val(), "master_link_status:up")
	})
	return replica
}

// startSentinels runs three Sentinels that watch a master with some replicas.
func startSentinels(t testing.TB, master *redisServer, replicas int) (list []string) {
	t.Helper()
	for range 3 {
		list = append(list, startSentinel(t, master, 2))
	}
	for _, address := range list {
		c := redis.NewSentinelClient(&redis.Options{Addr: address, DisableIdentity: true, Protocol: 2})
		eventuallyIn(t, time.Minute, "the Sentinels know each other and the replicas", func() bool {
			m := c.Master(t.Context(), "main").Val()
			return m["num-other-sentinels"] == "2" && m["num-slaves"] == strconv.Itoa(replicas)
		})
		c.Close()
	}
	return list
}

func TestSentinelsMayHaveCredentialsOfTheirOwn(t *testing.T) {
	master := startRedis(t, "--user", "app", "on", ">hunter2", "~*", "+@all", "&*")
	sentinel := startSentinel(t, master, 1, "user default off", "user admin on >admin &* +@all", "user watcher on >hunter3 "+sentinelRights(t),
		"sentinel auth-user main app", "sentinel auth-pass main hunter2")
	c := redis.NewSentinelClient(&redis.Options{Addr: sentinel, Username: "admin", Password: "admin", DisableIdentity: true, Protocol: 2})
	defer c.Close()
	eventually(t, "the Sentinel answers", func() bool { return c.Ping(t.Context()).Err() == nil })
	t.Setenv("MESH_TEST_PASSWORD", "hunter3")
	module := redisModule(t, sentinel)
	module.MasterName, module.Username, module.Password = "main", "app", "hunter2"
	module.SentinelUsername, module.SentinelPassword = "watcher", "{env.MESH_TEST_PASSWORD}"
	s := openRedis(t, module)
	admitRedis(t, s, Admission{KeyID: "key", RequestID: newRequestID()})
	if denied := redis.NewSliceCmd(t.Context(), "acl", "log"); c.Process(t.Context(), denied) != nil || len(denied.Val()) > 0 {
		t.Errorf("the Sentinel denied: %v, %v", denied.Val(), denied.Err())
	}

	for _, password := range []string{"hunter2", ""} {
		wrong := *module
		wrong.SentinelPassword, wrong.Journal = password, filepath.Join(t.TempDir(), "journal.db")
		if password == "" {
			wrong.SentinelUsername = ""
		}
		_, err := provisioned(t, &wrong).OpenStore()
		if err == nil || strings.Contains(err.Error(), "hunter") || !isRefusedCredentials(err) {
			t.Errorf("with the password %q: %v", password, err)
		}
	}
}

func TestSentinelFailoverLosesAndDoublesNothing(t *testing.T) {
	master := startRedis(t)
	replica := startReplica(t, master)
	module := redisModule(t, startSentinels(t, master, 1)...)
	module.MasterName = "main"
	module.Timeout = caddy.Duration(outageTimeout)
	s := openRedis(t, module)
	if s.degraded() || s.mode != "sentinel" {
		t.Fatalf("mode %s, degraded: %t", s.mode, s.degraded())
	}
	want := make(map[string]Money)
	run := func() {
		id, cost := newRequestID(), rand.N[Money](1000)
		if v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: id}); err != nil || v.Refused != "" {
			t.Errorf("%+v, %v", v, err)
		}
		s.Settle(Event{RequestID: id, KeyID: "key", Cost: cost})
		want[id] = cost
	}
	for range 500 {
		run()
	}
	master.kill()
	eventuallyIn(t, time.Minute, "the replica has taken over", func() bool {
		run()
		time.Sleep(time.Millisecond)
		return !s.degraded() && strings.Contains(replica.client().Info(t.Context(), "replication").Val(), "role:master")
	})
	for range 100 {
		run()
	}
	settledAll(t, s)
	expectBalance(t, s, "key", want)
	if got := replica.client().HGet(t.Context(), s.key("key", "account"), "total").Val(); got == "" {
		t.Error("the replica has no spend")
	}
	t.Logf("%d requests", len(want))
}
