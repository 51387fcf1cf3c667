package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// keys is what one instance of the gateway has to do with the keys in this Redis. It waits for a slow disk.
func (r *redisServer) keys(change ...func(*redis.Options)) *redisKeys {
	options := &redis.Options{Addr: r.address, Protocol: 2, DisableIdentity: true, ReadTimeout: 10 * time.Second}
	for _, c := range change {
		c(options)
	}
	client := redis.NewClient(options)
	r.t.Cleanup(func() { client.Close() })
	return newRedisKeys(client, "mesh", newBreaker("away", zap.NewNop()), zap.NewNop())
}

// openCache runs a cache until the test ends.
func openCache(t testing.TB, source keySource) *keyCache {
	c := newKeyCache(source, time.Minute)
	c.open()
	t.Cleanup(c.close)
	return c
}

// listens reports whether the subscription has begun. A lookup that is under way then is not kept.
func (c *keyCache) listens() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.era > 0
}

// write does by hand what an operator may: it sets everything about a key, which may be new. Fields that are not a key's
// are left as they are.
func (s *redisKeys) write(ctx context.Context, secret digest, k *Key) error {
	values, err := writeKey(k)
	if err != nil {
		return err
	}
	return s.edit(ctx, secret, func(_ map[string]string, p redis.Pipeliner, hash string) error {
		setFields(ctx, p, hash, keyFieldNames, values)
		return nil
	})
}

func (s *redisKeys) mustWrite(t testing.TB, secret digest, k *Key) {
	t.Helper()
	if err := s.write(t.Context(), secret, k); err != nil {
		t.Fatal(err)
	}
}

func TestKeyIsReadAsItWasWritten(t *testing.T) {
	keys := startRedis(t).keys()
	full := &Key{id: "team-a", Name: "Team A", Owner: "acme \x00\n", RPM: 60, RPD: 1 << 40, TPM: 1 << 50,
		MaxConcurrency: 3, DefaultParams: Params{"temperature": json.RawMessage("0.50"), "stop": json.RawMessage(`["a"]`)},
		Metadata: map[string]string{"team": `"a"`}, SpendCap: 25*usd + 1, SpendPeriod: PeriodMonth,
		HardCap: true, Models: []string{"openai/*", `a/"b"`}, DefaultModel: "openai/gpt-4o",
		Expires: time.Date(2027, 1, 2, 3, 4, 5, 6, time.UTC), Suspended: true}
	for _, want := range []*Key{full, {id: "b"}} {
		keys.mustWrite(t, secretNumber(1), want)
		if got, err := keys.LookUpKey(t.Context(), secretNumber(1)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	if got, err := keys.LookUpKey(t.Context(), secretNumber(2)); got != nil || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []*Key{{}, {id: "a}b"}, {id: "a", RPM: -1}, {id: "a", Models: []string{"*a"}}, {id: "a", SpendPeriod: "year"}, {id: "a", SpendCap: -1},
		{id: "a", HardCap: true}, {id: "a", DefaultModel: "b", Models: []string{"a"}}} {
		if err := keys.write(t.Context(), secretNumber(3), bad); err == nil {
			t.Errorf("%+v was written", bad)
		}
	}
}

func TestKeyThatCannotBeUnderstoodIsRefusedAndLoggedOnce(t *testing.T) {
	server := startRedis(t)
	keys, admin := server.keys(), server.client()
	hash := keys.hash(secretNumber(1))
	for _, tc := range []struct{ field, value, want string }{
		{"id", "", "key: id: it has none"},
		{"id", "a{b}", `key : id: "a{b}" is not up to 64`},
		{"rpm", "many", `key team-a: rpm: "many" is not a number`},
		{"rpm", "1.5", `key team-a: rpm: "1.5" is not`},
		{"rpm", "0", `key team-a: rpm: 0 would refuse every request`},
		{"rpd", "-1", `key team-a: rpd: -1 is negative`},
		{"tpm", "-1", `key team-a: tpm: -1 is negative`},
		{"max_concurrency", "0", `key team-a: max_concurrency: 0 would refuse every request`},
		{"default_params", "x", `key team-a: default_params: not a JSON object`},
		{"default_params", `{"temperature":3}`, `key team-a: default_params: temperature: Input should be less`},
		{"metadata", `{"a":1}`, `key team-a: metadata: not a JSON object`},
		{"spend_cap_usd", "-1", `key team-a: spend_cap_usd: "-1" is not a decimal`},
		{"spend_cap_usd", "0.00", `key team-a: spend_cap_usd: 0 would refuse every request`},
		{"spend_cap_usd", "1e3", `key team-a: spend_cap_usd: "1e3" is not a decimal`},
		{"spend_period", "year", `key team-a: spend period "year" is none of`},
		{"spend_cap_hard", "true", `key team-a: spend_cap_hard needs spend_cap_usd`},
		{"spend_cap_hard", "very", `key team-a: spend_cap_hard: "very" is neither`},
		{"models", "openai/*", `key team-a: models: not a JSON list`},
		{"models", "[]", `key team-a: models: the list is empty`},
		{"models", `["a*b"]`, `key team-a: models: "a*b"`},
		{"default_model", "a b", `key team-a: default_model: "a b" has white space`},
		{"expires", "tomorrow", `key team-a: expires: parsing time "tomorrow"`},
		{"suspended", "maybe", `key team-a: suspended: "maybe" is neither`},
	} {
		logs, logged := observer.New(zap.InfoLevel)
		keys.logger = zap.New(logs)
		admin.Del(t.Context(), hash)
		admin.HSet(t.Context(), hash, "id", "team-a", "later_version", "field")
		if got, err := keys.LookUpKey(t.Context(), secretNumber(1)); got == nil || err != nil {
			t.Errorf("without %s: %v, %v", tc.field, got, err)
		}
		admin.HSet(t.Context(), hash, tc.field, tc.value)
		for range 3 {
			if got, err := keys.LookUpKey(t.Context(), secretNumber(1)); got != nil || err != nil {
				t.Errorf("%s %q: %v, %v", tc.field, tc.value, got, err)
			}
		}
		entries := logged.All()
		if len(entries) != 1 || !strings.Contains(fmt.Sprint(entries[0].ContextMap()["error"]), tc.want) {
			t.Errorf("%s %q: logged %v, want once: %s", tc.field, tc.value, entries, tc.want)
		}
	}
	admin.Del(t.Context(), hash)
	admin.Set(t.Context(), hash, "a string", 0)
	if got, err := keys.LookUpKey(t.Context(), secretNumber(1)); got != nil || err != nil {
		t.Errorf("not a hash: %v, %v", got, err)
	}
}

func TestChangingAKeyLeavesWhatANewerVersionWroteAlone(t *testing.T) {
	server := startRedis(t)
	keys, admin := server.keys(), server.client()
	admin.HSet(t.Context(), keys.hash(secretNumber(1)), "id", "a", "rpm", "5", "later_version", "field")
	_, err := keys.changeWritten(t.Context(), "a", func(k *StoredKey) error {
		k.Terms.RPM, k.Terms.RPD = 0, 7
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got := admin.HGetAll(t.Context(), keys.hash(secretNumber(1))).Val()
	if want := map[string]string{"id": "a", "rpd": "7", "later_version": "field"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestOnlyAKeyThatIsThereCanBeChanged(t *testing.T) {
	server := startRedis(t)
	keys, admin, ctx := server.keys(), server.client(), t.Context()
	keys.mustWrite(t, secretNumber(1), &Key{id: "a"})
	nothing := func(*StoredKey) error { return nil }
	if _, err := keys.changeWritten(ctx, "b", nothing); err != errNoSuchKey {
		t.Errorf("change: %v", err)
	}
	if err := keys.revokeWritten(ctx, "b"); err != errNoSuchKey {
		t.Errorf("revoke: %v", err)
	}
	if err := keys.delete(ctx, secretNumber(9)); err != errNoSuchKey {
		t.Errorf("delete: %v", err)
	}
	if k, err := keys.changeManaged(ctx, "a", nothing); k != nil || err != nil {
		t.Errorf("change as one that the gateway looks after: %+v, %v", k, err)
	}
	if found, err := keys.revokeManaged(ctx, "a"); found || err != nil {
		t.Errorf("revoke as such a one: %t, %v", found, err)
	}
	if names := admin.Keys(ctx, "mesh:key:*").Val(); len(names) != 1 || names[0] != keys.hash(secretNumber(1)) {
		t.Errorf("keys in Redis: %q", names)
	}
}

func TestChangesOfAKeyAtTheSameTimeAreNotLost(t *testing.T) {
	keys, ctx := startRedis(t).keys(), t.Context()
	if err := keys.create(ctx, []*StoredKey{{Terms: Key{id: "a"}, secret: secretNumber(1)}}); err != nil {
		t.Fatal(err)
	}
	keys.mustWrite(t, secretNumber(2), &Key{id: "b"})
	more := func(k *StoredKey) error {
		k.Terms.RPM++
		return nil
	}
	var managed, written atomic.Int64
	var changes sync.WaitGroup
	for range 20 {
		changes.Go(func() {
			if _, err := keys.changeManaged(ctx, "a", more); err == nil {
				managed.Add(1)
			} else if err != redis.TxFailedErr {
				t.Error(err)
			}
			if _, err := keys.changeWritten(ctx, "b", more); err == nil {
				written.Add(1)
			} else if err != redis.TxFailedErr {
				t.Error(err)
			}
		})
	}
	changes.Wait()
	for i, want := range []int64{managed.Load(), written.Load()} {
		k, err := keys.LookUpKey(ctx, secretNumber(1+i))
		if err != nil || k.RPM != want || want == 0 {
			t.Errorf("key %s: after %d changes %d, %v", k.id, want, k.RPM, err)
		}
	}
}
