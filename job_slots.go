package mesh

import (
	"context"
	"sync"

	"github.com/caddyserver/caddy/v2"
)

// jobSlots are what the runners of one queue of one store share, so that all together run no more jobs at a time than each
// may: a reload leaves the jobs of the runner before alone.
type jobSlots struct {
	mu    sync.Mutex
	taken int
	freed chan struct{} // is closed, and another made, when there is one less
}

// slotsOfQueues has those that are in use, by queuePlace.
var slotsOfQueues = caddy.NewUsagePool()

func (h *Handler) shareJobSlots() *jobSlots {
	shared, _, _ := slotsOfQueues.LoadOrNew(h.queuePlace(), func() (caddy.Destructor, error) { // which cannot fail
		return &jobSlots{freed: make(chan struct{})}, nil
	})
	return shared.(*jobSlots)
}

func (h *Handler) leaveJobSlots() {
	slotsOfQueues.Delete(h.queuePlace()) //nolint:errcheck // there is none
}

// Destruct is for the pool.
func (s *jobSlots) Destruct() error { return nil }

// take waits until fewer than most are taken, and takes one. It returns an error only when ctx has ended.
func (s *jobSlots) take(ctx context.Context, most int) error {
	for ctx.Err() == nil {
		freed := s.tryTake(most)
		if freed == nil {
			return nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// tryTake takes one, or returns a channel that says when to try again.
func (s *jobSlots) tryTake(most int) (freed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken >= most {
		return s.freed
	}
	s.taken++
	return nil
}

func (s *jobSlots) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	close(s.freed)
	s.freed = make(chan struct{})
}
