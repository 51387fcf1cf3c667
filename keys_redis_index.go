package mesh

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/redis/go-redis/v9"
)

// The ids of all keys are in one sorted set, so that a page of them, and what belongs to an id, is one command. A key that
// the gateway looks after is there as its id, and a hash that somebody has written by hand as its id, a space and its
// digest. The latter are found by a scan of all names, which takes as long as Redis has names: it is made for the first page
// of a list, and for an id that is not known.

func (s *redisKeys) index() string { return s.prefix + ":keyindex" }

// indexed reads a member of the index.
func indexed(member string) (id string, byHand *digest) {
	id, encoded, _ := strings.Cut(member, " ")
	if secret, ok := announced(encoded); ok {
		return id, &secret
	}
	return id, nil
}

// list returns up to limit keys whose id comes after the one given.
func (s *redisKeys) list(ctx context.Context, after string, limit int) ([]*StoredKey, error) {
	if after == "" {
		if err := s.findWritten(ctx); err != nil {
			return nil, err
		}
	}
	var page []*StoredKey
	from := "-"
	if after != "" {
		from = "(" + after + "!" // behind the id and all that begins with it and a space
	}
	for len(page) < limit {
		want := limit - len(page) + 1 // an id's second member may come
		members, err := s.client.ZRangeByLex(ctx, s.index(), &redis.ZRangeBy{Min: from, Max: "+", Count: int64(want)}).Result()
		if err != nil {
			return nil, err
		}
		found, err := s.read(ctx, members)
		if err != nil {
			return nil, err
		}
		for _, k := range found {
			if n := len(page); n > 0 && page[n-1].Terms.id == k.Terms.id {
				page[n-1].byHand = append(page[n-1].byHand, k.byHand...)
				continue
			}
			page = append(page, k)
		}
		if len(members) < want {
			break
		}
		from = "(" + members[len(members)-1]
	}
	return page[:min(limit, len(page))], nil
}

// read reads the keys that members of the index stand for. What is not there any more, or cannot be understood, is left
// out.
func (s *redisKeys) read(ctx context.Context, members []string) (found []*StoredKey, err error) {
	if len(members) == 0 {
		return nil, nil
	}
	commands := make([]*redis.SliceCmd, len(members))
	_, err = s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, member := range members {
			id, byHand := indexed(member)
			if byHand == nil {
				commands[i] = p.HMGet(ctx, s.managed(id), storedFieldNames...)
			} else {
				commands[i] = p.HMGet(ctx, s.hash(*byHand), keyFieldNames...)
			}
		}
		return nil
	})
	if err != nil && !isWrongType(err) {
		return nil, err
	}
	for i, member := range members {
		id, byHand := indexed(member)
		values, err := commands[i].Result()
		if err != nil {
			continue
		}
		if byHand == nil {
			if k, err := readStored(values); err == nil && k != nil && k.Terms.id == id {
				found = append(found, k)
			}
			continue
		}
		if terms, err := readKey(values); err == nil && terms != nil && terms.id == id {
			found = append(found, &StoredKey{Terms: *terms, secret: *byHand, byHand: []digest{*byHand}})
		}
	}
	return found, nil
}

// get returns the key of an id, or errNoSuchKey.
func (s *redisKeys) get(ctx context.Context, id string) (*StoredKey, error) {
	if readKeyID(new(Key), id) != nil {
		return nil, errNoSuchKey
	}
	if k, err := s.getManaged(ctx, s.client, id); err != nil || k != nil {
		return k, err
	}
	return s.getWritten(ctx, id)
}

// getWritten returns what is written by hand for an id, or errNoSuchKey.
func (s *redisKeys) getWritten(ctx context.Context, id string) (*StoredKey, error) {
	for scanned := false; ; scanned = true {
		members, err := s.client.ZRangeByLex(ctx, s.index(), &redis.ZRangeBy{Min: "[" + id + " ", Max: "(" + id + "!"}).Result()
		if err != nil {
			return nil, err
		}
		found, err := s.read(ctx, members)
		if err != nil {
			return nil, err
		}
		if len(found) > 0 {
			for _, more := range found[1:] {
				found[0].byHand = append(found[0].byHand, more.byHand...)
			}
			return found[0], nil
		}
		if scanned {
			return nil, errNoSuchKey
		}
		if err := s.findWritten(ctx); err != nil {
			return nil, err
		}
	}
}

// errByHand is for what the gateway leaves to whoever wrote a key by hand.
var errByHand = errors.New("the key was written into Redis by hand")

// changeWritten changes a key that was written by hand, where it stands.
func (s *redisKeys) changeWritten(ctx context.Context, id string, change func(*StoredKey) error) (*StoredKey, error) {
	k, err := s.getWritten(ctx, id)
	if err != nil {
		return nil, err
	}
	if n := len(k.byHand); n > 1 {
		return nil, fmt.Errorf("%w, %d times; change it there", errByHand, n)
	}
	err = s.edit(ctx, k.secret, func(fields map[string]string, p redis.Pipeliner, hash string) error {
		terms, err := readFields(fields)
		if err != nil {
			return err
		}
		k.Terms = *terms
		if err := change(k); err != nil {
			return err
		}
		if k.secret != k.byHand[0] {
			return fmt.Errorf("%w; write it there under its new secret", errByHand)
		}
		values, err := writeKey(&k.Terms)
		if err == nil {
			setFields(ctx, p, hash, keyFieldNames, values)
		}
		return err
	})
	return k, err
}

// readFields reads all that a hash has.
func readFields(fields map[string]string) (*Key, error) {
	values := make([]any, len(keyFieldNames))
	for i, name := range keyFieldNames {
		if text, ok := fields[name]; ok {
			values[i] = text
		}
	}
	k, err := readKey(values)
	if err == nil && k == nil {
		err = errNoSuchKey
	}
	return k, err
}

// revokeWritten deletes all that was written by hand for an id.
func (s *redisKeys) revokeWritten(ctx context.Context, id string) error {
	k, err := s.getWritten(ctx, id)
	if err != nil {
		return err
	}
	for _, secret := range k.byHand {
		if err := s.delete(ctx, secret); err != nil && !errors.Is(err, errNoSuchKey) {
			return err
		}
		s.client.ZRem(ctx, s.index(), id+" "+hex.EncodeToString(secret[:])) //nolint:errcheck // it leads nowhere
	}
	return nil
}

// findWritten enters what was written by hand into the index.
func (s *redisKeys) findWritten(ctx context.Context) error {
	cluster, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return s.scan(ctx, s.client)
	}
	var one sync.Mutex
	return cluster.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) error {
		one.Lock()
		defer one.Unlock()
		return s.scan(ctx, node)
	})
}

// scan enters what was written by hand on one server into the index.
func (s *redisKeys) scan(ctx context.Context, node redis.Cmdable) error {
	const step = 1000
	head := s.prefix + ":key:"
	for cursor := uint64(0); ; {
		names, next, err := node.Scan(ctx, cursor, globs.Replace(head)+"*", step).Result()
		if err != nil {
			return err
		}
		if err := s.enterWritten(ctx, head, names); err != nil {
			return err
		}
		if cursor = next; cursor == 0 {
			return nil
		}
	}
}

func (s *redisKeys) enterWritten(ctx context.Context, head string, names []string) error {
	var secrets []string
	for _, name := range names {
		if _, ok := announced(strings.TrimPrefix(name, head)); ok {
			secrets = append(secrets, strings.TrimPrefix(name, head))
		}
	}
	if len(secrets) == 0 {
		return nil
	}
	commands := make([]*redis.SliceCmd, len(secrets))
	_, err := s.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, secret := range secrets {
			commands[i] = p.HMGet(ctx, head+secret, "id", managedField)
		}
		return nil
	})
	if err != nil && !isWrongType(err) {
		return err
	}
	var written []redis.Z
	for i, secret := range secrets {
		values := commands[i].Val()
		if len(values) != 2 || values[1] != nil {
			continue
		}
		if id, ok := values[0].(string); ok && readKeyID(new(Key), id) == nil {
			written = append(written, redis.Z{Member: id + " " + secret})
		}
	}
	if len(written) == 0 {
		return nil
	}
	return s.client.ZAdd(ctx, s.index(), written...).Err()
}
