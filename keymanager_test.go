package mesh

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// eachManager runs a test with a store of each kind.
func eachManager(t *testing.T, test func(t *testing.T, m KeyManager)) {
	t.Run("local", func(t *testing.T) { test(t, openLocal(t, filepath.Join(t.TempDir(), "mesh.db"))) })
	t.Run("redis", func(t *testing.T) { test(t, openRedis(t, redisModule(t, startRedis(t).address))) })
	t.Run("cluster", func(t *testing.T) { test(t, openRedis(t, redisModule(t, addresses(startCluster(t))...))) })
}

func mustCreate(t testing.TB, m KeyManager, terms Key) (k *StoredKey, secret digest) {
	t.Helper()
	k, token := newStoredKey(terms)
	if err := m.CreateKeys(t.Context(), []*StoredKey{k}); err != nil {
		t.Fatal(err)
	}
	secret, ok := digestOfToken(token)
	if !ok || secret != k.secret {
		t.Fatalf("%q is no secret, or not that of the key", token)
	}
	return k, secret
}

func mustChange(t testing.TB, m KeyManager, id string, change func(*StoredKey)) *StoredKey {
	t.Helper()
	k, err := m.ChangeKey(t.Context(), id, func(k *StoredKey) error {
		change(k)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// finds waits until what a secret is good for is as wanted.
func finds(t testing.TB, m KeyManager, what string, secret digest, is func(*Key) bool) {
	t.Helper()
	eventually(t, what, func() bool {
		k, err := m.FindKey(t.Context(), secret)
		return err == nil && is(k)
	})
}

func isNone(k *Key) bool { return k == nil }

func TestStoredKeyIsWhatWasStored(t *testing.T) {
	eachManager(t, func(t *testing.T, m KeyManager) {
		full := Key{Name: "Team A", Owner: "acme", RPM: 60, RPD: 1 << 40, TPM: 5, MaxConcurrency: 3, SpendCap: 25*usd + 1, SpendPeriod: PeriodMonth,
			HardCap: true, Models: []string{"openai/*", `a/"b"`}, DefaultModel: "openai/gpt-4o", DefaultParams: Params{"seed": []byte("1")},
			Metadata: map[string]string{"a": "b"}, Expires: time.Date(2027, 1, 2, 3, 4, 5, 6, time.UTC), Suspended: true}
		for _, terms := range []Key{full, {}} {
			k, secret := mustCreate(t, m, terms)
			got, err := m.GetKey(t.Context(), k.Terms.id)
			if err != nil || !reflect.DeepEqual(got, k) {
				t.Errorf("%+v, %v, want %+v", got, err, k)
			}
			want := terms
			want.id = k.Terms.id
			finds(t, m, "the key is found", secret, func(k *Key) bool { return reflect.DeepEqual(k, &want) })
		}
		if !strings.HasPrefix(mustID(t, m), "key_") {
			t.Errorf("id %s", mustID(t, m))
		}
	})
}

// mustID returns the id of the first key.
func mustID(t testing.TB, m KeyManager) string {
	t.Helper()
	page, err := m.ListKeys(t.Context(), "", 1)
	if err != nil || len(page) != 1 {
		t.Fatal(page, err)
	}
	return page[0].Terms.id
}

func TestRotatedKeyHasTwoSecretsForAsLongAsItWasGivenGrace(t *testing.T) {
	eachManager(t, func(t *testing.T, m KeyManager) {
		k, first := mustCreate(t, m, Key{RPM: 7})
		id := k.Terms.id
		rotate := func(grace time.Duration) digest {
			secret, _ := newSecret()
			mustChange(t, m, id, func(k *StoredKey) { k.rotate(secret, grace, time.Now()) })
			return secret
		}
		second := rotate(time.Hour)
		finds(t, m, "the new secret", second, func(k *Key) bool { return k != nil && k.id == id && k.RPM == 7 && k.Expires.IsZero() })
		finds(t, m, "the old secret", first, func(k *Key) bool {
			return k != nil && k.id == id && k.RPM == 7 && time.Until(k.Expires) > 59*time.Minute && time.Until(k.Expires) <= time.Hour
		})
		mustChange(t, m, id, func(k *StoredKey) { k.Terms.RPM = 8; k.Terms.Suspended = true })
		for _, secret := range []digest{first, second} {
			finds(t, m, "a change holds for both", secret, func(k *Key) bool { return k != nil && k.RPM == 8 && k.Suspended })
		}
		third := rotate(time.Hour)
		finds(t, m, "the oldest secret", first, isNone)
		for _, secret := range []digest{second, third} {
			finds(t, m, "the others", secret, func(k *Key) bool { return k != nil })
		}
		fourth := rotate(0)
		finds(t, m, "the only secret", fourth, func(k *Key) bool { return k != nil && k.Expires.IsZero() })
		finds(t, m, "one before", third, isNone)
		finds(t, m, "one before", second, isNone)
		fifth := rotate(time.Hour)
		if err := m.RevokeKey(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		finds(t, m, "a secret after the end", fifth, isNone)
		finds(t, m, "a secret after the end", fourth, isNone)
		if _, err := m.GetKey(t.Context(), id); err != errNoSuchKey {
			t.Error(err)
		}
	})
}

func TestOldSecretIsValidNoLongerThanTheKey(t *testing.T) {
	expires := time.Now().Add(time.Minute)
	k, _ := newStoredKey(Key{Expires: expires})
	first := k.secret
	second, _ := newSecret()
	k.rotate(second, time.Hour, time.Now())
	if old := k.as(first); !old.Expires.Equal(expires) {
		t.Errorf("it expires %s", old.Expires)
	}
	if k.as(digest{}) != nil {
		t.Error("no secret is one")
	}
}

func TestListIsInPagesByID(t *testing.T) {
	eachManager(t, func(t *testing.T, m KeyManager) {
		var want []string
		var keys []*StoredKey
		for range 25 {
			k, _ := newStoredKey(Key{})
			keys = append(keys, k)
			want = append(want, k.Terms.id)
		}
		if err := m.CreateKeys(t.Context(), keys); err != nil {
			t.Fatal(err)
		}
		slices.Sort(want)
		var got []string
		for after := ""; ; {
			page, err := m.ListKeys(t.Context(), after, 10)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range page {
				after = k.Terms.id
				got = append(got, after)
			}
			if len(page) < 10 {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

func TestWhatIsNoKeyCannotBeChanged(t *testing.T) {
	eachManager(t, func(t *testing.T, m KeyManager) {
		for _, id := range []string{"key_none", "", "a}b", "*"} {
			_, err := m.GetKey(t.Context(), id)
			_, changeErr := m.ChangeKey(t.Context(), id, func(*StoredKey) error { return nil })
			for _, err := range []error{err, changeErr, m.RevokeKey(t.Context(), id)} {
				if err != errNoSuchKey {
					t.Errorf("%q: %v", id, err)
				}
			}
		}
		k, secret := mustCreate(t, m, Key{RPM: 1})
		stop := errors.New("stop")
		_, err := m.ChangeKey(t.Context(), k.Terms.id, func(k *StoredKey) error {
			k.Terms.RPM = 5
			return stop
		})
		if err != stop {
			t.Error(err)
		}
		finds(t, m, "the key is as it was", secret, func(k *Key) bool { return k != nil && k.RPM == 1 })
	})
}

func TestChangesAtTheSameTimeAreAllMade(t *testing.T) {
	eachManager(t, func(t *testing.T, m KeyManager) {
		k, _ := mustCreate(t, m, Key{})
		var changes sync.WaitGroup
		for range 5 {
			changes.Go(func() {
				_, err := m.ChangeKey(t.Context(), k.Terms.id, func(k *StoredKey) error {
					k.Terms.RPM++
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		changes.Wait()
		if got, err := m.GetKey(t.Context(), k.Terms.id); err != nil || got.Terms.RPM != 5 {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func TestKeysWrittenByHandAreListedAndChangedWhereTheyStand(t *testing.T) {
	server := startRedis(t)
	s, admin := openRedis(t, redisModule(t, server.address)), server.client()
	hash := "mesh:key:" + fmt.Sprintf("%x", secretNumber(1))
	admin.HSet(t.Context(), hash, "id", "team-a", "rpm", "5", "later_version", "field")
	twice := []string{"mesh:key:" + fmt.Sprintf("%x", secretNumber(2)), "mesh:key:" + fmt.Sprintf("%x", secretNumber(3))}
	for _, name := range twice {
		admin.HSet(t.Context(), name, "id", "team-b")
	}
	admin.HSet(t.Context(), "mesh:key:"+fmt.Sprintf("%x", secretNumber(4)), "id", "bad", "rpm", "many")
	admin.Set(t.Context(), "mesh:key:"+fmt.Sprintf("%x", secretNumber(5)), "a string", 0)
	admin.Set(t.Context(), "mesh:key:other", "a string", 0)

	if k, err := s.GetKey(t.Context(), "team-a"); err != nil || k.Terms.RPM != 5 { // before there was a list
		t.Fatalf("%+v, %v", k, err)
	}
	mustCreate(t, s, Key{})
	var ids []string
	page, err := s.ListKeys(t.Context(), "", 10)
	for _, k := range page {
		ids = append(ids, k.Terms.id)
	}
	if err != nil || len(ids) != 3 || !slices.Equal(ids[1:], []string{"team-a", "team-b"}) {
		t.Errorf("%v, %v", ids, err)
	}
	finds(t, s, "the key works", secretNumber(1), func(k *Key) bool { return k != nil && k.RPM == 5 })
	mustChange(t, s, "team-a", func(k *StoredKey) { k.Terms.Suspended = true; k.Terms.RPM = 0 })
	finds(t, s, "it is suspended", secretNumber(1), func(k *Key) bool { return k != nil && k.Suspended && k.RPM == 0 })
	if got := fmt.Sprint(admin.HGetAll(t.Context(), hash).Val()); got != "map[id:team-a later_version:field suspended:true]" {
		t.Error(got)
	}
	for _, id := range []string{"team-a", "team-b"} {
		_, err := s.ChangeKey(t.Context(), id, func(k *StoredKey) error {
			k.rotate(secretNumber(9), 0, time.Now())
			return nil
		})
		if !errors.Is(err, errByHand) {
			t.Errorf("rotating %s: %v", id, err)
		}
		if err := s.RevokeKey(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	for i := range 3 {
		finds(t, s, "it is gone", secretNumber(1+i), isNone)
	}
	if left := admin.Exists(t.Context(), append(twice, hash)...).Val(); left != 0 {
		t.Errorf("%d hashes are left", left)
	}
}

// TestSecretThatTheKeyDoesNotNameOpensNothing has Redis be as a crash in the middle of a change may leave it.
func TestSecretThatTheKeyDoesNotNameOpensNothing(t *testing.T) {
	server := startRedis(t)
	s, admin := openRedis(t, redisModule(t, server.address)), server.client()
	k, _ := mustCreate(t, s, Key{})
	for secret, id := range map[digest]string{secretNumber(1): k.Terms.id, secretNumber(2): "key_never", secretNumber(3): "a}b"} {
		admin.HSet(t.Context(), s.redisKeys().hash(secret), managedField, id)
		finds(t, s, "it opens nothing", secret, isNone)
	}
	admin.ZAdd(t.Context(), "mesh:keyindex", redisMember("key_never"))
	if page, err := s.ListKeys(t.Context(), "", 10); err != nil || len(page) != 1 {
		t.Errorf("%v, %v", page, err)
	}
	if _, err := s.GetKey(t.Context(), "key_never"); err != errNoSuchKey {
		t.Error(err)
	}
	// and nothing of a key is left after its end
	second, _ := newSecret()
	mustChange(t, s, k.Terms.id, func(k *StoredKey) { k.rotate(second, time.Hour, time.Now()) })
	admin.FlushAll(t.Context())
	k, _ = mustCreate(t, s, Key{})
	mustChange(t, s, k.Terms.id, func(k *StoredKey) { k.rotate(second, time.Hour, time.Now()) })
	if err := s.RevokeKey(t.Context(), k.Terms.id); err != nil {
		t.Fatal(err)
	}
	if left := admin.Keys(t.Context(), "mesh:*key*").Val(); slices.ContainsFunc(left, func(name string) bool { return name != "mesh:keyids" }) {
		t.Errorf("%v is left", left)
	}
}

func TestManagerSaysThatRedisIsAway(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	k, _ := mustCreate(t, s, Key{})
	server.kill()
	_, getErr := s.GetKey(t.Context(), k.Terms.id)
	_, listErr := s.ListKeys(t.Context(), "", 10)
	_, changeErr := s.ChangeKey(t.Context(), k.Terms.id, func(*StoredKey) error { return nil })
	_, useErr := s.KeyUse(t.Context(), k.Terms.id)
	for _, err := range []error{getErr, listErr, changeErr, useErr, s.RevokeKey(t.Context(), k.Terms.id), s.CreateKeys(t.Context(), []*StoredKey{k})} {
		if !errors.Is(err, errUnavailable) {
			t.Error(err)
		}
	}
}

func TestDatabaseOfBeforeThereWereKeysGetsThem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	closeLocal(t, openLocal(t, path))
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketKeys) })
	if err != nil || db.Close() != nil {
		t.Fatal(err)
	}
	s := openLocal(t, path)
	k, secret := mustCreate(t, s, Key{Name: "a"})
	closeLocal(t, s)
	s = openLocal(t, path)
	finds(t, s, "the key is there after a restart", secret, func(k *Key) bool { return k != nil && k.Name == "a" })
	if got, err := s.GetKey(t.Context(), k.Terms.id); err != nil || !reflect.DeepEqual(got, k) {
		t.Errorf("%+v, %v", got, err)
	}
}

const killedKeysEnv = "MESH_TEST_KILLED_KEYS" // the database of a child that is to be killed while it changes keys

// TestKilledKeysChild is what TestKillDashNineLeavesAKeyAsItWasOrAsItWasToBecome kills. It says after each change what the
// key is like.
func TestKilledKeysChild(t *testing.T) {
	path := os.Getenv(killedKeysEnv)
	if path == "" {
		t.Skip("only as a child")
	}
	s := openLocal(t, path)
	for n := int64(1); ; n++ {
		k, _ := mustCreate(t, s, Key{RPM: n})
		fmt.Printf("created %s %x\n", k.Terms.id, k.secret)
		secret, _ := newSecret()
		k = mustChange(t, s, k.Terms.id, func(k *StoredKey) { k.rotate(secret, time.Hour, time.Now()) })
		fmt.Printf("rotated %s %x\n", k.Terms.id, k.secret)
		if n%3 == 0 {
			if err := s.RevokeKey(t.Context(), k.Terms.id); err != nil {
				t.Fatal(err)
			}
			fmt.Printf("revoked %s %x\n", k.Terms.id, k.secret)
		}
	}
}

func TestKillDashNineLeavesAKeyAsItWasOrAsItWasToBecome(t *testing.T) {
	for kill := range 3 {
		path := filepath.Join(t.TempDir(), "mesh.db")
		child := exec.Command(os.Args[0], "-test.run=^TestKilledKeysChild$")
		child.Env = append(os.Environ(), killedKeysEnv+"="+path)
		output, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		var said [][]string
		lines := bufio.NewScanner(output)
		for lines.Scan() {
			if words := strings.Fields(lines.Text()); len(words) == 3 && len(words[2]) == 64 {
				said = append(said, words)
			}
			if len(said) == 20+7*kill {
				child.Process.Kill()
			}
		}
		child.Wait()
		if len(said) < 20 {
			t.Fatalf("the child said only %v", said)
		}
		checkKilledKeys(t, openLocal(t, path), said)
	}
}

func checkKilledKeys(t *testing.T, s *localStore, said [][]string) {
	t.Helper()
	state, at := make(map[string]string), make(map[string]int)
	for i, words := range said {
		state[words[1]+" "+words[2]], at[words[1]] = words[0], i
	}
	for secretOf, how := range state {
		id, encoded, _ := strings.Cut(secretOf, " ")
		secret, _ := announced(encoded)
		last := said[at[id]]
		found, err := s.FindKey(t.Context(), secret)
		if err != nil {
			t.Fatal(err)
		}
		unsaid := at[id] == len(said)-1 // what came next to the last key may have been done
		switch {
		case last[0] == "revoked" && found != nil:
			t.Errorf("%s was revoked, and is there", id)
		case last[0] != "revoked" && found == nil && !unsaid:
			t.Errorf("%s %s is not there", id, how)
		case how == "created" && last[0] == "rotated" && found != nil && found.Expires.IsZero():
			t.Errorf("%s was rotated, and its first secret has no end", id)
		}
	}
}
