package mesh

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
)

var bucketKeys = []byte("keys") // by id; a database of before there were such keys has none until it is opened

// localKeys are the keys of a local store. All of them are in memory too, which is all that a request asks.
type localKeys struct {
	changes sync.Mutex // held while one is written to the database; no request waits for it

	mu       sync.RWMutex // held for memory only
	byID     map[string]*StoredKey
	bySecret map[digest]*Key
}

// localKey is a key as the database has it.
type localKey struct {
	Created  time.Time `json:"created_at"`
	Secret   string    `json:"secret_sha256"`
	Old      string    `json:"old_secret_sha256,omitempty"`
	OldUntil time.Time `json:"old_secret_until,omitzero"`
	Terms    Key       `json:"key"`
}

func (k *StoredKey) encodeLocal() ([]byte, error) {
	l := localKey{Created: k.Created, Secret: hex.EncodeToString(k.secret[:]), Terms: k.Terms}
	if k.old != (digest{}) {
		l.Old, l.OldUntil = hex.EncodeToString(k.old[:]), k.oldUntil
	}
	return encodeJSON(&l)
}

func decodeLocal(id string, encoded []byte) (*StoredKey, error) {
	var l localKey
	if err := json.Unmarshal(encoded, &l); err != nil {
		return nil, err
	}
	k := &StoredKey{Terms: l.Terms, Created: l.Created, oldUntil: l.OldUntil}
	k.Terms.id = id
	var ok bool
	if k.secret, ok = announced(l.Secret); !ok {
		return nil, errBadSecret
	}
	if l.Old != "" {
		if k.old, ok = announced(l.Old); !ok {
			return nil, errBadSecret
		}
	}
	return k, k.Terms.checkTerms()
}

// load reads all keys.
func (l *localKeys) load(d *database) error {
	l.byID, l.bySecret = make(map[string]*StoredKey), make(map[digest]*Key)
	return guard(func() error {
		return d.bolt.View(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketKeys).ForEach(func(id, encoded []byte) error {
				k, err := decodeLocal(string(id), encoded)
				if err != nil {
					return fmt.Errorf("key %q is damaged: %w", id, err)
				}
				l.keep(k)
				return nil
			})
		})
	})
}

// keep has memory know a key. The caller holds l.mu, or is alone.
func (l *localKeys) keep(k *StoredKey) {
	l.forget(k.Terms.id)
	l.byID[k.Terms.id] = k
	for _, secret := range k.secrets() {
		l.bySecret[secret] = k.as(secret)
	}
}

func (l *localKeys) forget(id string) {
	before := l.byID[id]
	if before == nil {
		return
	}
	delete(l.byID, id)
	for _, secret := range before.secrets() {
		delete(l.bySecret, secret)
	}
}

func (l *localKeys) get(id string) *StoredKey {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.byID[id]
}

// write commits keys, and has memory know them only then.
func (l *localKeys) write(d *database, keys ...*StoredKey) error {
	err := guard(func() error {
		return d.bolt.Update(func(tx *bbolt.Tx) error {
			bucket := tx.Bucket(bucketKeys)
			for _, k := range keys {
				encoded, err := k.encodeLocal()
				if err != nil {
					return err
				}
				if err := bucket.Put([]byte(k.Terms.id), encoded); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("writing to the database: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range keys {
		l.keep(k)
	}
	return nil
}

// FindKey finds a key in memory.
func (s *localStore) FindKey(_ context.Context, secret [sha256.Size]byte) (*Key, error) {
	s.keys.mu.RLock()
	defer s.keys.mu.RUnlock()
	return s.keys.bySecret[secret], nil
}

// CreateKeys commits all of the keys or none.
func (s *localStore) CreateKeys(_ context.Context, keys []*StoredKey) error {
	s.keys.changes.Lock()
	defer s.keys.changes.Unlock()
	return s.keys.write(s.database, keys...)
}

// ListKeys lists what is in memory.
func (s *localStore) ListKeys(_ context.Context, after string, limit int) ([]*StoredKey, error) {
	s.keys.mu.RLock()
	defer s.keys.mu.RUnlock()
	var page []*StoredKey
	for _, id := range slices.Sorted(maps.Keys(s.keys.byID)) {
		if id <= after {
			continue
		}
		if len(page) == limit {
			break
		}
		page = append(page, s.keys.byID[id])
	}
	return page, nil
}

// GetKey gets what is in memory.
func (s *localStore) GetKey(_ context.Context, id string) (*StoredKey, error) {
	k := s.keys.get(id)
	if k == nil {
		return nil, errNoSuchKey
	}
	return k, nil
}

// ChangeKey commits the change. Requests that come before that see the key as it was.
func (s *localStore) ChangeKey(_ context.Context, id string, change func(*StoredKey) error) (*StoredKey, error) {
	s.keys.changes.Lock()
	defer s.keys.changes.Unlock()
	before := s.keys.get(id)
	if before == nil {
		return nil, errNoSuchKey
	}
	k := *before
	if err := change(&k); err != nil {
		return nil, err
	}
	return &k, s.keys.write(s.database, &k)
}

// RevokeKey commits the key's end.
func (s *localStore) RevokeKey(_ context.Context, id string) error {
	s.keys.changes.Lock()
	defer s.keys.changes.Unlock()
	if s.keys.get(id) == nil {
		return errNoSuchKey
	}
	err := guard(func() error {
		return s.database.bolt.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketKeys).Delete([]byte(id)) })
	})
	if err != nil {
		return fmt.Errorf("writing to the database: %w", err)
	}
	s.keys.mu.Lock()
	defer s.keys.mu.Unlock()
	s.keys.forget(id)
	return nil
}

// KeyUse returns what is in memory.
func (s *localStore) KeyUse(_ context.Context, id string) (KeyUse, error) {
	account := s.account(id)
	account.mu.Lock()
	defer account.mu.Unlock()
	return account.balance.used(s.now(), int64(len(account.underWay.requests))), nil
}

var _ KeyManager = (*localStore)(nil)
