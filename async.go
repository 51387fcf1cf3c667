package mesh

import (
	"encoding/json"
	"fmt"
	"regexp"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Async sets up jobs: requests with `async_mode`, which are answered later.
type Async struct {
	// How many jobs this instance runs at the same time; 0: none, so that others do. Those that run on after a reload count,
	// and so do those of other handlers with the same store and queue. Default: 8.
	Workers *int64 `json:"workers,omitempty"`

	// How long a job can be asked for after its end. Default: 24 hours.
	Retention caddy.Duration `json:"retention,omitempty"`

	// How many jobs may wait to be run. Beyond that, requests for more are answered 429. Default: 1000.
	MaxPending int64 `json:"max_pending,omitempty"`

	// How many bytes the answer of a job may have. A job with a longer one fails, and is charged. Default: 16 MB.
	MaxResult int64 `json:"max_result,omitempty"`

	// What the queue is called in the store: letters, digits, `_` and `-`. Handlers with one store and one name share a
	// queue, whichever instances they belong to: each of them may run the jobs of the others, with its own models. So
	// handlers of one configuration that share a store but not their models each need a name of their own; as long as one
	// of those has none, it takes no jobs. Default: `default`.
	Queue string `json:"queue,omitempty"`
}

const (
	defaultWorkers    = 8
	defaultRetention  = 24 * time.Hour
	defaultMaxPending = 1000
	defaultMaxResult  = 16_000_000
	defaultQueue      = "default"

	maxWorkers   = 10_000
	maxRetention = 30 * 24 * time.Hour
)

var queueName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func (a *Async) check() error {
	switch {
	case a.Workers != nil && (*a.Workers < 0 || *a.Workers > maxWorkers):
		return fmt.Errorf("async: workers is %d, and not from 0 to %d", *a.Workers, maxWorkers)
	case a.Retention < 0 || time.Duration(a.Retention) > maxRetention:
		return fmt.Errorf("async: retention is %s, and not up to %s", time.Duration(a.Retention), maxRetention)
	case a.MaxPending < 0:
		return fmt.Errorf("async: max_pending: %d is negative", a.MaxPending)
	case a.MaxResult < 0 || a.MaxResult > maxWhole:
		return fmt.Errorf("async: max_result is %d, and not up to %d", a.MaxResult, maxWhole)
	case a.Queue != "" && !queueName.MatchString(a.Queue):
		return fmt.Errorf("async: queue: %q is not a name of letters, digits, _ and -", a.Queue)
	}
	return nil
}

// asyncRules are an Async with its defaults.
type asyncRules struct {
	workers    int
	retention  time.Duration
	maxPending int64
	maxResult  int64
	queue      string
	named      bool // the queue's name is the configuration's
}

func (a *Async) rules() asyncRules {
	r := asyncRules{defaultWorkers, defaultRetention, defaultMaxPending, defaultMaxResult, defaultQueue, false}
	if a == nil {
		return r
	}
	if a.Workers != nil {
		r.workers = int(*a.Workers)
	}
	if a.Retention > 0 {
		r.retention = time.Duration(a.Retention)
	}
	if a.MaxPending > 0 {
		r.maxPending = a.MaxPending
	}
	if a.MaxResult > 0 {
		r.maxResult = a.MaxResult
	}
	if a.Queue != "" {
		r.queue, r.named = a.Queue, true
	}
	return r
}

// settleQueues finds the handlers that would share a queue with others that have other models, by no wish of the
// operator's. They take no jobs, and run none: no job is ever to run at a site that it was not sent to.
func (a *App) settleQueues() {
	models := make(map[string]string) // by store and queue; of the first handler there
	mixed := make(map[string]bool)
	for _, h := range a.handlers {
		place, own := h.queuePlace(), h.serves
		if first, known := models[place]; known && first != own {
			mixed[place] = true
		}
		models[place] = own
	}
	for _, h := range a.handlers {
		if !mixed[h.queuePlace()] || h.async.named {
			continue
		}
		h.jobs.queueless.Store(true)
		h.logger.Warn("sites share a store and have different models: this one takes no jobs until its async block names a queue")
	}
}

func (h *Handler) queuePlace() string { return h.store.module.StoreKey() + "\x00" + h.async.queue }

// modelsDigest is the same for handlers with which a request means the same. It is taken before they are provisioned.
func (h *Handler) modelsDigest() string {
	encoded, _ := json.Marshal([]any{h.Models, h.Upstreams, h.DefaultModel, h.Prices, h.Auto}) // they were JSON before
	return digestText(string(encoded))
}
