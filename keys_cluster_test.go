package mesh

import (
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// clusterKeys is what one instance has to do with the keys in a Cluster.
func clusterKeys(t testing.TB, nodes []*redisServer) *redisKeys {
	client := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs: []string{nodes[0].address}, Protocol: 2, DisableIdentity: true, ReadTimeout: 10 * time.Second,
	})
	t.Cleanup(func() { client.Close() })
	return newRedisKeys(client, "mesh", newBreaker("away", zap.NewNop()), zap.NewNop())
}

func TestChangeOfAKeyInAClusterTakesEffectElsewhereWithinASecond(t *testing.T) {
	nodes := startCluster(t)
	writer, reader := clusterKeys(t, nodes), openCache(t, clusterKeys(t, nodes))
	if testChanges(t, writer, reader, func() {}); t.Failed() {
		return
	}
	// many keys, on all nodes, each changed by one instance and known to the other
	const n = 50
	for i := range n {
		if err := writer.create(t.Context(), []*StoredKey{{Terms: Key{id: clusterKey(i)}, secret: secretNumber(100 + i)}}); err != nil {
			t.Fatal(err)
		}
		soon(t, "a new key works", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(100+i)); return k != nil })
	}
	for i := range n {
		rotate := func(k *StoredKey) { k.rotate(secretNumber(200+i), 0, time.Now()) }
		if err := writer.change(t.Context(), clusterKey(i), rotate); err != nil {
			t.Fatal(err)
		}
		soon(t, "the new secret works", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(200+i)); return k != nil })
		soon(t, "the old secret does not", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(100+i)); return k == nil })
	}
	for _, node := range nodes {
		if size := node.client().DBSize(t.Context()).Val(); size == 0 {
			t.Errorf("%s has none of the keys", node.address)
		}
	}
	testSubscriberKilled(t, nodes, reader)
}

func clusterKey(i int) string { return fmt.Sprint("key", i) }

// testSubscriberKilled disconnects the subscriber, on whatever node it is, and changes a key.
func testSubscriberKilled(t *testing.T, nodes []*redisServer, reader *keyCache) {
	writer := clusterKeys(t, nodes)
	eventually(t, "there is a subscriber to disconnect", func() bool {
		killed := int64(0)
		for _, node := range nodes {
			killed += node.client().ClientKillByFilter(t.Context(), "TYPE", "pubsub").Val()
		}
		return killed > 0
	})
	if err := writer.change(t.Context(), clusterKey(0), func(k *StoredKey) { k.Terms.Suspended = true }); err != nil {
		t.Fatal(err)
	}
	soon(t, "it is suspended", func() bool { k, _ := reader.FindKey(t.Context(), secretNumber(200)); return k.Suspended })
}
