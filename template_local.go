package mesh

import (
	"bytes"
	"context"
	"sync"

	"go.etcd.io/bbolt"
)

// bucketTemplates has a bucket for each scope: id → the template as JSON.
var bucketTemplates = []byte("templates")

// localTemplates are the templates of a local store. All are in memory.
type localTemplates struct {
	mu      sync.Mutex // for changes, which wait for the disk
	shelves sync.Map   // scope → *TemplateShelf
}

// loadTemplates reads the templates of the database.
func (s *localStore) loadTemplates() error {
	return guard(func() error {
		return s.database.bolt.View(func(tx *bbolt.Tx) error {
			all := tx.Bucket(bucketTemplates)
			if all == nil {
				return nil
			}
			return all.ForEachBucket(func(scope []byte) error {
				templates := make(map[string]*Template)
				err := all.Bucket(scope).ForEach(func(id, data []byte) error {
					t, err := decodeTemplate(templateScope(scope), bytes.Clone(data))
					templates[string(id)] = t
					return err
				})
				s.templates.shelves.Store(string(scope), shelfOf(templates))
				return err
			})
		})
	})
}

// TemplateShelf returns what is in memory.
func (s *localStore) TemplateShelf(_ context.Context, scope string) (*TemplateShelf, error) {
	if shelf, ok := s.templates.shelves.Load(scope); ok {
		return shelf.(*TemplateShelf), nil
	}
	return emptyShelf, nil
}

// ChangeTemplates commits the change before anybody sees it.
func (s *localStore) ChangeTemplates(ctx context.Context, scope string, change func(*TemplateShelf) (*TemplateShelf, error)) error {
	s.templates.mu.Lock()
	defer s.templates.mu.Unlock()
	shelf, err := s.TemplateShelf(ctx, scope)
	if err != nil {
		return err
	}
	next, err := change(shelf)
	if err != nil {
		return err
	}
	put, gone, err := shelf.changes(next)
	if err != nil {
		return err
	}
	err = guard(func() error {
		return s.database.bolt.Update(func(tx *bbolt.Tx) error { return writeTemplates(tx, scope, put, gone) })
	})
	if err != nil {
		return err
	}
	s.templates.shelves.Store(scope, next)
	return nil
}

func writeTemplates(tx *bbolt.Tx, scope string, put map[string][]byte, gone []string) error {
	all, err := tx.CreateBucketIfNotExists(bucketTemplates)
	if err != nil {
		return err
	}
	bucket, err := all.CreateBucketIfNotExists([]byte(scope))
	if err != nil {
		return err
	}
	for id, data := range put {
		if err := bucket.Put([]byte(id), data); err != nil {
			return err
		}
	}
	for _, id := range gone {
		if err := bucket.Delete([]byte(id)); err != nil {
			return err
		}
	}
	return nil
}

// TemplateScopes returns the scopes there have been templates in.
func (s *localStore) TemplateScopes(context.Context) (scopes []string, err error) {
	s.templates.shelves.Range(func(scope, _ any) bool {
		scopes = append(scopes, scope.(string))
		return true
	})
	return scopes, nil
}

var _ TemplateStore = (*localStore)(nil)
