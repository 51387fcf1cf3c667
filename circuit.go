package mesh

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Circuit says when an upstream is left alone for a while, for each of its models by itself. What counts as a failure is
// that it cannot be reached, does not answer in time, answers with a status of 500 or more or with what is no answer, or
// breaks off. That the client leaves, or that the upstream says that the request is at fault, does not count.
type Circuit struct {
	// Whether it is asked whatever happens. Default: false.
	Off bool `json:"off,omitempty"`

	// After how many failures in a row it is left alone. Default: 5.
	Failures int64 `json:"failures,omitempty"`

	// After which share of failures, from 0 to 1, among the requests of the window. Default: 0.5.
	ErrorRate float64 `json:"error_rate,omitempty"`

	// How many requests the window must have for the share to say anything. Default: 20.
	MinRequests int64 `json:"min_requests,omitempty"`

	// How far back the share looks. Default: 30 seconds.
	Window caddy.Duration `json:"window,omitempty"`

	// For how long it is left alone; then one request finds out how it is. Each failure of such a one doubles the time, up
	// to 5 minutes. Default: 30 seconds.
	Rest caddy.Duration `json:"rest,omitempty"`
}

const (
	defaultCircuitFailures = 5
	defaultCircuitRate     = 0.5
	defaultCircuitRequests = 20
	defaultCircuitWindow   = 30 * time.Second
	defaultCircuitRest     = 30 * time.Second

	maxCircuitRest = 5 * time.Minute
	maxBusy        = time.Minute     // that an upstream's Retry-After keeps it from being asked
	probeLease     = 5 * time.Minute // after which a probe that has not ended does not keep others from probing
	maxCircuits    = 1000            // of an upstream; clients can make up names that a pattern covers
	circuitSlots   = 10              // of the window
)

func (c *Circuit) check() error {
	if c == nil {
		return nil
	}
	if c.Failures < 0 || c.MinRequests < 0 || c.Window < 0 || c.Rest < 0 {
		return errors.New("circuit: a number is negative")
	}
	if c.ErrorRate < 0 || c.ErrorRate > 1 {
		return fmt.Errorf("circuit: error_rate %v is not between 0 and 1", c.ErrorRate)
	}
	return nil
}

// withDefaults returns what is used; c may be nil.
func (c *Circuit) withDefaults() *Circuit {
	rules := new(Circuit)
	if c != nil {
		*rules = *c
	}
	if rules.Failures == 0 {
		rules.Failures = defaultCircuitFailures
	}
	if rules.ErrorRate == 0 {
		rules.ErrorRate = defaultCircuitRate
	}
	if rules.MinRequests == 0 {
		rules.MinRequests = defaultCircuitRequests
	}
	if rules.Window == 0 {
		rules.Window = caddy.Duration(defaultCircuitWindow)
	}
	if rules.Rest == 0 {
		rules.Rest = caddy.Duration(defaultCircuitRest)
	}
	return rules
}

// circuit is how one model at one upstream has done. It outlives a configuration with its upstreamHealth. The mutex is
// held for arithmetic only.
type circuit struct {
	upstream string

	mu     sync.Mutex
	row    int64 // failures, without anything else between
	recent [circuitSlots]circuitSlot

	open    bool
	until   time.Time     // while open: when it may be probed
	rest    time.Duration // how long it rests now
	probing time.Time     // since when a request has been finding out how it is; zero: none does

	busy    time.Time // until when it said that it does not want to be asked
	latency latency
}

// circuitSlot counts the requests of a part of the window.
type circuitSlot struct{ number, asked, failed int64 }

// sign is what an attempt says about its upstream.
type sign int

const (
	signNone  sign = iota // nothing
	signAlive             // it answers
	signFailed
)

// mayAsk returns for how long a request would have to wait, 0 if it need not.
func (c *circuit) mayAsk(now time.Time, rules *Circuit) *failure {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closedTo(now, rules)
}

// take is mayAsk for who is going to ask, and says whether that is a probe.
func (c *circuit) take(now time.Time, rules *Circuit) (probe bool, f *failure) {
	if c == nil {
		return false, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.closedTo(now, rules); f != nil {
		return false, f
	}
	if c.open && !rules.Off {
		c.probing = now
		return true, nil
	}
	return false, nil
}

func (c *circuit) closedTo(now time.Time, rules *Circuit) *failure {
	if now.Before(c.busy) {
		return &failure{skipped: true, retriable: true, reason: "resting", cause: errResting, tell: busyFor(c.busy.Sub(now))}
	}
	if !c.open || rules.Off {
		return nil
	}
	wait := c.until.Sub(now)
	if wait <= 0 && now.Sub(c.probing) > probeLease {
		return nil
	}
	return &failure{skipped: true, retriable: true, reason: "circuit_open", cause: errCircuitOpen, tell: notAvailable(max(wait, time.Second))}
}

var (
	errResting     = errors.New("the upstream asked not to be asked yet")
	errCircuitOpen = errors.New("the upstream has failed too often lately")
)

func notAvailable(wait time.Duration) *apiError {
	e := errorf(http.StatusServiceUnavailable, "provider_not_available", "No upstream for this model is available at the moment.")
	e.retryAfter = wait
	return e
}

// restFor has nobody ask for as long as the upstream said.
func (c *circuit) restFor(now time.Time, wait time.Duration) {
	if c == nil || wait <= 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if until := now.Add(min(wait, maxBusy)); until.After(c.busy) {
		c.busy = until
	}
}

// note takes in how an attempt went, and reports whether that opened or closed the circuit.
func (c *circuit) note(now time.Time, rules *Circuit, s sign, probe bool) (changed bool) {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if probe {
		c.probing = time.Time{}
		return c.probed(now, s)
	}
	if c.open || s == signNone {
		return false
	}
	c.count(now, rules, s == signFailed)
	if rules.Off || !c.tooMany(now, rules) {
		return false
	}
	c.open, c.rest = true, time.Duration(rules.Rest)
	c.until = now.Add(c.rest)
	collectors.openCircuits.WithLabelValues(c.upstream).Inc()
	return true
}

func (c *circuit) probed(now time.Time, s sign) (closed bool) {
	switch {
	case !c.open:
	case s == signAlive:
		c.close()
		return true
	case s == signFailed:
		c.rest = min(2*c.rest, maxCircuitRest)
		c.until = now.Add(c.rest)
	}
	return false
}

// close begins anew. The caller holds c.mu.
func (c *circuit) close() {
	c.open, c.row, c.recent = false, 0, [circuitSlots]circuitSlot{}
	collectors.openCircuits.WithLabelValues(c.upstream).Dec()
}

func (c *circuit) count(now time.Time, rules *Circuit, failed bool) {
	number := now.UnixNano() / max(1, int64(rules.Window)/circuitSlots)
	slot := &c.recent[number%circuitSlots]
	if slot.number != number {
		*slot = circuitSlot{number: number}
	}
	slot.asked++
	if !failed {
		c.row = 0
		return
	}
	c.row++
	slot.failed++
}

func (c *circuit) tooMany(now time.Time, rules *Circuit) bool {
	if c.row == 0 {
		return false
	}
	if c.row >= rules.Failures {
		return true
	}
	oldest := now.UnixNano()/max(1, int64(rules.Window)/circuitSlots) - circuitSlots
	var asked, failed int64
	for _, slot := range c.recent {
		if slot.number > oldest {
			asked, failed = asked+slot.asked, failed+slot.failed
		}
	}
	return asked >= rules.MinRequests && float64(failed) >= rules.ErrorRate*float64(asked)
}

// circuits are those of an upstream, by what it calls the model.
type circuits struct {
	mu     sync.RWMutex
	byName map[string]*circuit
}

// circuit returns the circuit of a model under the upstream's own name for it.
func (u *Upstream) circuit(as string) *circuit {
	if u.health == nil {
		return nil
	}
	list := &u.health.circuits
	list.mu.RLock()
	c := list.byName[as]
	list.mu.RUnlock()
	if c != nil {
		return c
	}
	return list.add(as, u.Name)
}

func (l *circuits) add(as, upstream string) *circuit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.byName) >= maxCircuits {
		as = "" // which no model is called
	}
	if c := l.byName[as]; c != nil {
		return c
	}
	if l.byName == nil {
		l.byName = make(map[string]*circuit)
	}
	c := &circuit{upstream: upstream}
	l.byName[as] = c
	return c
}

// forget takes what is open out of the metrics, when the upstream is no longer configured.
func (l *circuits) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.byName {
		c.mu.Lock()
		if c.open {
			c.close()
		}
		c.mu.Unlock()
	}
	l.byName = nil
}
