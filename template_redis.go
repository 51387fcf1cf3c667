package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// redisTemplates remembers the templates of a Redis store. Those of a scope are in the hash
// `<prefix>:templates:{<scope>}`, by their ids, with a version that goes up with every change. A shelf that is older than
// templatesFresh is only as good as its version, which one command asks for: so that a change is seen in time with no
// message that could be missed.
type redisTemplates struct {
	mu      sync.Mutex // held for memory only
	shelves map[string]*redisShelf
}

type redisShelf struct {
	*TemplateShelf
	version string
	asked   time.Time // when it was the newest
	used    time.Time
}

const (
	templatesFresh  = 500 * time.Millisecond
	templateVersion = "version" // is no id
	maxShelves      = 10_000    // in memory
)

func (s *redisStore) templatesKey(scope string) string {
	return s.prefix + ":templates:{" + strings.NewReplacer("{", "%7B", "}", "%7D", "%", "%25").Replace(scope) + "}"
}

// TemplateShelf returns what is in memory, or else what Redis has. While Redis cannot be reached, what was there before
// has to do, unless on_failure is refuse.
func (s *redisStore) TemplateShelf(ctx context.Context, scope string) (*TemplateShelf, error) {
	known := s.templates.get(scope, s.now())
	if known != nil && s.now().Sub(known.asked) < templatesFresh {
		return known.TemplateShelf, nil
	}
	fresh, err := s.readTemplates(ctx, scope, known)
	if err != nil && known != nil && !s.refuse {
		return known.TemplateShelf, nil
	}
	if err != nil {
		return nil, err
	}
	s.templates.put(scope, fresh)
	return fresh.TemplateShelf, nil
}

func (r *redisTemplates) get(scope string, now time.Time) *redisShelf {
	r.mu.Lock()
	defer r.mu.Unlock()
	shelf := r.shelves[scope]
	if shelf != nil {
		shelf.used = now
	}
	return shelf
}

func (r *redisTemplates) put(scope string, shelf *redisShelf) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shelves == nil {
		r.shelves = make(map[string]*redisShelf)
	}
	if r.shelves[scope] == nil && len(r.shelves) >= maxShelves {
		oldest := ""
		for name, one := range r.shelves {
			if oldest == "" || one.used.Before(r.shelves[oldest].used) {
				oldest = name
			}
		}
		delete(r.shelves, oldest)
	}
	r.shelves[scope] = shelf
}

// readTemplates asks Redis for what is newer than known.
func (s *redisStore) readTemplates(ctx context.Context, scope string, known *redisShelf) (*redisShelf, error) {
	if s.degraded() {
		return nil, errRedisDown
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.timeout)
	defer cancel()
	now, key := s.now(), s.templatesKey(scope)
	if known != nil {
		version, err := s.client.HGet(ctx, key, templateVersion).Result()
		if errors.Is(err, redis.Nil) {
			version, err = "", nil
		}
		s.breaker.noteTimed("", err)
		if err != nil {
			return nil, fmt.Errorf("reading templates: %w", unanswered(err))
		}
		if version == known.version {
			return &redisShelf{known.TemplateShelf, version, now, now}, nil
		}
	}
	fields, err := s.client.HGetAll(ctx, key).Result() // is no matter of the breaker: it may be megabytes
	if err != nil {
		return nil, fmt.Errorf("reading templates: %w", unanswered(err))
	}
	shelf, err := shelfFrom(scope, fields)
	if err != nil {
		return nil, err
	}
	return &redisShelf{shelf, fields[templateVersion], now, now}, nil
}

func shelfFrom(scope string, fields map[string]string) (*TemplateShelf, error) {
	templates := make(map[string]*Template, len(fields))
	for id, data := range fields {
		if id == templateVersion {
			continue
		}
		t, err := decodeTemplate(templateScope(scope), []byte(data))
		if err != nil {
			return nil, err
		}
		templates[id] = t
	}
	return shelfOf(templates), nil
}

// ChangeTemplates changes the hash in a transaction that no other change of it comes between.
func (s *redisStore) ChangeTemplates(ctx context.Context, scope string, change func(*TemplateShelf) (*TemplateShelf, error)) error {
	if s.degraded() {
		return errRedisDown
	}
	ctx, cancel := context.WithTimeout(ctx, max(s.timeout, settleTimeout))
	defer cancel()
	// a scope that is listed and empty does no harm; the set may be on another node of a Cluster than the hash
	if err := s.client.SAdd(ctx, s.shared("templates"), scope).Err(); err != nil {
		return s.templatesFailed(err)
	}
	key := s.templatesKey(scope)
	var next *TemplateShelf
	var version *redis.IntCmd
	var refused error
	err := transact(ctx, s.client, key, func(tx *redis.Tx) error {
		fields, err := tx.HGetAll(ctx, key).Result()
		if err != nil {
			return err
		}
		shelf, err := shelfFrom(scope, fields)
		if err != nil {
			return err
		}
		if next, refused = change(shelf); refused != nil {
			return refused
		}
		put, gone, err := shelf.changes(next)
		if err != nil {
			return err
		}
		_, err = tx.TxPipelined(ctx, func(p redis.Pipeliner) error {
			for id, data := range put {
				p.HSet(ctx, key, id, data)
			}
			if len(gone) > 0 {
				p.HDel(ctx, key, gone...)
			}
			version = p.HIncrBy(ctx, key, templateVersion, 1)
			return nil
		})
		return err
	})
	switch {
	case refused != nil:
		return refused
	case err != nil:
		return s.templatesFailed(err)
	}
	s.templates.put(scope, &redisShelf{next, fmt.Sprint(version.Val()), s.now(), s.now()})
	return nil
}

// templatesFailed marks what kept Redis from doing as it was told.
func (s *redisStore) templatesFailed(err error) error {
	return fmt.Errorf("templates in Redis: %w: %w", errUnavailable, err)
}

// TemplateScopes returns the scopes there have been templates in.
func (s *redisStore) TemplateScopes(ctx context.Context) ([]string, error) {
	if s.degraded() {
		return nil, errRedisDown
	}
	ctx, cancel := context.WithTimeout(ctx, max(s.timeout, settleTimeout))
	defer cancel()
	scopes, err := s.client.SMembers(ctx, s.shared("templates")).Result()
	if err != nil {
		return nil, s.templatesFailed(err)
	}
	return scopes, nil
}

var _ TemplateStore = (*redisStore)(nil)
