package mesh

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// startKeyCluster runs a Cluster of three nodes without replicas.
func startKeyCluster(t testing.TB) (nodes []*keyServer) {
	t.Helper()
	for range 3 {
		_, bus, _ := net.SplitHostPort(freeAddress(t))
		nodes = append(nodes, startKeyServer(t, "--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "1000"))
	}
	ctx := context.Background()
	ranges := [][2]int{{0, 5460}, {5461, 10922}, {10923, 16383}}
	for i, n := range nodes {
		if err := n.admin.ClusterAddSlotsRange(ctx, ranges[i][0], ranges[i][1]).Err(); err != nil {
			t.Fatal(err)
		}
		host, port, _ := net.SplitHostPort(n.address)
		bus := n.args[len(n.args)-3]
		if err := nodes[0].admin.Do(ctx, "CLUSTER", "MEET", host, port, bus).Err(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		eventually(t, "the Cluster is whole", func() bool {
			info := n.admin.ClusterInfo(ctx).Val()
			return strings.Contains(info, "cluster_state:ok") && strings.Contains(info, "cluster_known_nodes:3")
		})
	}
	return nodes
}

// clusterKeys is what one instance has to do with the keys in a Cluster.
func clusterKeys(t testing.TB, nodes []*keyServer) *redisKeys {
	client := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs: []string{nodes[0].address}, DialTimeout: 200 * time.Millisecond, ReadTimeout: 200 * time.Millisecond,
	})
	t.Cleanup(func() { client.Close() })
	return newRedisKeys(client, "mesh", zap.NewNop())
}

func TestChangeOfAKeyInAClusterTakesEffectElsewhereWithinASecond(t *testing.T) {
	nodes := startKeyCluster(t)
	writer, reader := clusterKeys(t, nodes), openCache(t, clusterKeys(t, nodes))
	if testChanges(t, writer, reader, func() {}); t.Failed() {
		return
	}
	// many keys, on all nodes, each changed by one instance and known to the other
	const n = 50
	for i := range n {
		writer.mustWrite(t, secretNumber(100+i), &Key{id: "a", Name: "before"})
		soon(t, "a new key works", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(100+i)); return k != nil })
	}
	for i := range n {
		if err := writer.rotate(t.Context(), secretNumber(100+i), secretNumber(200+i), 0); err != nil {
			t.Fatal(err)
		}
		soon(t, "the new secret works", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(200+i)); return k != nil })
		soon(t, "the old secret does not", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(100+i)); return k == nil })
	}
	for _, node := range nodes {
		if size := node.admin.DBSize(t.Context()).Val(); size == 0 {
			t.Errorf("%s has none of the keys", node.address)
		}
	}
	testSubscriberKilled(t, nodes, reader)
}

// testSubscriberKilled disconnects the subscriber, on whatever node it is, and changes a key.
func testSubscriberKilled(t *testing.T, nodes []*keyServer, reader *keyCache) {
	writer := clusterKeys(t, nodes)
	eventually(t, "there is a subscriber to disconnect", func() bool {
		killed := int64(0)
		for _, node := range nodes {
			killed += node.admin.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Val()
		}
		return killed > 0
	})
	if err := writer.suspend(t.Context(), secretNumber(200), true); err != nil {
		t.Fatal(err)
	}
	soon(t, "it is suspended", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(200)); return k.Suspended })
}
