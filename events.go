package mesh

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
)

// The events there are. A Caddyfile reacts to them in the global option `events`; what they bring is in placeholders,
// such as {event.data.key_name}.
const (
	eventSpendCapReached = "mesh.spend_cap_reached" // once for each key and period
	eventUpstreamDown    = "mesh.upstream_down"     // it has failed maxUpstreamFailures times in a row
	eventUpstreamUp      = "mesh.upstream_up"       // it answers again
	eventStoreDegraded   = "mesh.store_degraded"    // the store cannot be reached
	eventStoreRecovered  = "mesh.store_recovered"   // it can be reached again
)

// notices are the events on their way. They are the process's, as what they are about is.
var notices = &emitter{queue: make(chan notice, maxNotices)}

const (
	maxNotices = 64              // that wait to be emitted
	lastNotice = 2 * time.Second // for the events that wait when Caddy stops
)

// notice is an event to be emitted.
type notice struct {
	name string
	data map[string]any
}

// emitter emits events from a goroutine of its own, because Caddy calls an event's handlers where it is emitted, and
// they may take their time. It does so through the newest configuration that has wholly started: at the time of the event
// the one that caused it may be gone, or the handlers of the next not there yet. Without a configuration events wait.
type emitter struct {
	queue   chan notice
	dropped atomic.Int64

	mu   sync.Mutex
	apps []*App        // of configurations that have started and not stopped, the newest last
	stop chan struct{} // ends the goroutine; nil where there is none
	done chan struct{} // it has ended
}

// emit never waits. An event there is no room for is dropped.
func (e *emitter) emit(name string, data map[string]any) {
	select {
	case e.queue <- notice{name, data}:
	default:
		e.dropped.Add(1)
	}
}

// open has events go through a's configuration from now on.
func (e *emitter) open(a *App) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.apps = append(e.alive(), a)
	if e.stop == nil {
		e.stop, e.done = make(chan struct{}), make(chan struct{})
		go e.run(e.stop, e.done)
	}
}

// leave ends what open began, if it did. When the last configuration stops, events that wait are still emitted.
func (e *emitter) leave(a *App) {
	e.mu.Lock()
	e.apps = e.alive()
	last := len(e.apps) == 1 && e.apps[0] == a
	done := e.done
	if last {
		close(e.stop)
		e.stop = nil
	}
	e.mu.Unlock()
	if last {
		select {
		case <-done:
		case <-time.After(lastNotice): // a handler hangs
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.apps = slices.DeleteFunc(e.apps, func(other *App) bool { return other == a })
}

func (e *emitter) run(stop, done chan struct{}) {
	defer close(done)
	for {
		select {
		case n := <-e.queue:
			e.deliver(n)
		case <-stop:
			e.deliverAll()
			return
		}
	}
}

func (e *emitter) deliverAll() {
	for {
		select {
		case n := <-e.queue:
			e.deliver(n)
		default:
			return
		}
	}
}

func (e *emitter) deliver(n notice) {
	app := e.newest()
	if app == nil {
		return
	}
	if dropped := e.dropped.Swap(0); dropped > 0 {
		app.logger.Warn("events dropped, because their handlers are slower than they come", zap.Int64("events", dropped))
	}
	app.events.Emit(app.ctx, n.name, n.data)
}

func (e *emitter) newest() *App {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.apps = e.alive(); len(e.apps) > 0 {
		return e.apps[len(e.apps)-1]
	}
	return nil
}

// alive returns the configurations there are. Caddy does not stop one that fails after it has started: it is cancelled.
func (e *emitter) alive() []*App {
	return slices.DeleteFunc(e.apps, func(a *App) bool { return a.ctx.Err() != nil })
}

// Provision finds Caddy's events.
func (a *App) Provision(ctx caddy.Context) error {
	a.ctx, a.logger = ctx, ctx.Logger()
	app, err := ctx.App("events")
	if err != nil {
		return err
	}
	a.events = app.(*caddyevents.App)
	return a.events.On("started", a)
}

// Handle takes Caddy's event that the whole configuration has started. Apps start in no order: before that, the
// handlers of events may not be there.
func (a *App) Handle(context.Context, caddy.Event) error {
	notices.open(a)
	return nil
}

// capsReached are the spend caps that there has been an event about.
var capsReached capSet

// capSet remembers, for each key, the last cap and period in which it was reached.
type capSet struct {
	mu   sync.Mutex
	last map[capKey]capPeriod
}

type capKey struct{ store, key string }

type capPeriod struct {
	limit Money
	unit  Period
	end   int64 // of the period, in Unix seconds to the nearest hour, as the store's clock may differ from ours; 0: none
}

// maxCaps bounds the memory. Beyond it all are forgotten, and a key may have its event again.
const maxCaps = 10_000

// first reports whether the cap is reached for the first time.
func (c *capSet) first(key capKey, period capPeriod) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if last, ok := c.last[key]; ok && last == period {
		return false
	}
	if c.last == nil || len(c.last) >= maxCaps {
		c.last = make(map[capKey]capPeriod)
	}
	c.last[key] = period
	return true
}

// noteCap emits the event of a key that has spent up to its cap. A hard cap also refuses what is only too large for the
// rest of it.
func (x *exchange) noteCap(limits Limits, v Verdict) {
	if v.Refused != LimitSpend || v.Spend < limits.SpendCap {
		return
	}
	period := capPeriod{limit: limits.SpendCap, unit: limits.SpendPeriod}
	if v.Reset > 0 {
		period.end = time.Now().Add(v.Reset).Round(time.Hour).Unix()
	}
	if !capsReached.first(capKey{x.h.store.module.StoreKey(), x.key.id}, period) {
		return
	}
	unit := limits.SpendPeriod
	if unit == "" {
		unit = PeriodTotal
	}
	notices.emit(eventSpendCapReached, map[string]any{
		"key_id":        x.key.id,
		"key_name":      x.key.Name,
		"owner":         x.key.Owner,
		"spend_cap_usd": limits.SpendCap.String(),
		"spend_usd":     v.Spend.String(),
		"spend_period":  string(unit),
	})
}

// tellBreaker has the breaker's changes become events, and its failures metrics.
func (s *redisStore) tellBreaker() {
	failed := collectors.storeErrors.WithLabelValues("redis", "command")
	s.breaker.failed = failed.Inc
	s.breaker.turned = func(open bool) {
		name := eventStoreRecovered
		if open {
			name = eventStoreDegraded
		}
		notices.emit(name, map[string]any{"store": "redis, " + s.mode, "on_failure": s.onFailure()})
	}
}

var (
	_ caddy.Provisioner   = (*App)(nil)
	_ caddyevents.Handler = (*App)(nil)
)
