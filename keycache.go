package mesh

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// keySource is where the keys are that a keyCache knows some of.
type keySource interface {
	// LookUpKey returns the key with a secret of this digest, or nil where there is none. An error means that the
	// source could not be asked; a key that cannot be understood is none.
	LookUpKey(ctx context.Context, secret digest) (*Key, error)

	// WatchKeys calls changed, one call at a time, after a key was written or deleted; with all set, after any key may
	// have been, as when messages may have been missed. After stop has returned there are no more calls.
	WatchKeys(changed func(secret digest, all bool)) (stop func())

	// Away returns a channel that is closed while the source does not answer, or as soon as it does not. LookUpKey asks
	// nothing then.
	Away() <-chan struct{}

	// KeysOutliveOutage reports whether a key that was known stays valid while LookUpKey fails.
	KeysOutliveOutage() bool
}

const (
	knownFor = 30 * time.Second // a change takes effect after this time where WatchKeys tells nothing
	maxKnown = 65_536           // keys; about 30 MB
	keyTurns = 8                // lookups of known keys at a time; with firstTurns, fewer than there are connections
)

// keyCache remembers which keys there are. It is what a store with keys asks first, and for almost every request the
// only thing.
//
// Whoever has no key can make up any number of digests, and each has to be looked up to be refused. So digests that
// were never a key's have their own memory, their own turns and a pace (see unknownKeys), and when those are used up
// the answer is an error (503, come again) and not that there is no such key (401): the gateway does not know, and a
// client with a good key that this instance has not seen yet must not throw it away. A key that was seen or announced
// by WatchKeys has nothing to do with any of that, even when it has to be looked up anew.
type keyCache struct {
	source  keySource
	stop    func()
	now     func() time.Time
	flying  sync.WaitGroup // lookups
	timeout time.Duration  // of a lookup, and for how long a request waits for one

	knownFor time.Duration
	maxKnown int
	turns    chan struct{} // for lookups of known keys

	mu      sync.Mutex // held for memory only
	known   map[digest]*knownKey
	era     uint64 // knownKeys of an earlier one have to be looked up again
	unknown unknownKeys
	flights map[digest]*keyFlight
}

// knownKey is a key that exists; or one that was changed and not looked up since, which has no key here.
type knownKey struct {
	key   *Key
	until time.Time
	era   uint64
	used  time.Time
}

func (k *knownKey) fresh(now time.Time, era uint64) bool {
	return k != nil && k.key != nil && k.era == era && now.Before(k.until)
}

// keyFlight is one lookup, for all who want its key.
type keyFlight struct {
	delay time.Duration // until it may begin
	turns chan struct{}

	done chan struct{} // is closed when key and err are there
	key  *Key
	err  error
}

var (
	errKeyOutage   = fmt.Errorf("%w: the store of keys does not answer", errUnavailable)
	errSlowLookup  = fmt.Errorf("%w: looking up the key takes too long", errUnavailable)
	errManyUnknown = fmt.Errorf("%w: too many unknown keys at once", errUnavailable)
	errLookupDied  = errors.New("the lookup of a key did not end")
)

func newKeyCache(source keySource, timeout time.Duration) *keyCache {
	return &keyCache{
		source:   source,
		now:      time.Now,
		timeout:  timeout,
		knownFor: knownFor,
		maxKnown: maxKnown,
		turns:    make(chan struct{}, keyTurns),
		known:    make(map[digest]*knownKey),
		unknown:  newUnknownKeys(min(maxDelay, timeout/2)),
		flights:  make(map[digest]*keyFlight),
	}
}

// open begins to follow changes, until close.
func (c *keyCache) open() { c.stop = c.source.WatchKeys(c.changed) }

// close waits for lookups that are under way.
func (c *keyCache) close() {
	c.stop()
	c.flying.Wait()
}

// FindKey returns the key with a secret of this digest, or nil where there is none. An error means that this is not
// known at the moment.
func (c *keyCache) FindKey(ctx context.Context, secret [sha256.Size]byte) (*Key, error) {
	now := c.now()
	c.mu.Lock()
	known := c.known[secret]
	if known.fresh(now, c.era) {
		known.used = now
		key := known.key
		c.mu.Unlock()
		return key, nil
	}
	if known == nil && c.unknown.has(secret, now) {
		c.mu.Unlock()
		return nil, nil
	}
	f, err := c.board(secret, known != nil, now)
	c.mu.Unlock()
	if err == nil {
		err = c.wait(ctx, f)
	}
	if err != nil {
		return c.outlived(secret, err)
	}
	return f.key, nil
}

// board joins the lookup of a key that is under way, or begins one. c.mu is held.
func (c *keyCache) board(secret digest, known bool, now time.Time) (*keyFlight, error) {
	if c.away() {
		return nil, errKeyOutage
	}
	if f := c.flights[secret]; f != nil {
		return f, nil
	}
	f := &keyFlight{turns: c.turns, done: make(chan struct{})}
	if !known {
		delay, ok := c.unknown.reserve(now)
		if !ok {
			return nil, errManyUnknown
		}
		f.delay, f.turns = delay, c.unknown.turns
	}
	c.flights[secret] = f
	c.flying.Go(func() { c.fly(secret, f) })
	return f, nil
}

func (c *keyCache) away() bool {
	select {
	case <-c.source.Away():
		return true
	default:
		return false
	}
}

// wait waits for a lookup, but no longer than a request may. The lookup goes on without those who leave.
func (c *keyCache) wait(ctx context.Context, f *keyFlight) error {
	timer := time.NewTimer(c.timeout)
	defer timer.Stop()
	select {
	case <-f.done:
		return f.err
	case <-c.source.Away():
		return errKeyOutage
	case <-timer.C:
		return errSlowLookup
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errUnavailable, ctx.Err())
	}
}

// fly looks the key up.
func (c *keyCache) fly(secret digest, f *keyFlight) {
	defer func() {
		if cause := recover(); cause != nil {
			f.err = fmt.Errorf("%w: %v\n%s", errLookupDied, cause, debug.Stack())
		}
		c.land(secret, f)
	}()
	time.Sleep(f.delay) // a moment, and only of the lookups that unknownKeys allows
	if f.err = c.takeTurn(f.turns); f.err != nil {
		return
	}
	defer func() { <-f.turns }()
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	f.key, f.err = c.source.LookUpKey(ctx, secret)
}

// takeTurn waits no longer than the request that began the lookup.
func (c *keyCache) takeTurn(turns chan struct{}) error {
	timer := time.NewTimer(c.timeout)
	defer timer.Stop()
	select {
	case turns <- struct{}{}:
		return nil
	case <-c.source.Away():
		return errKeyOutage
	case <-timer.C:
		return errSlowLookup
	}
}

// land remembers what a lookup found, unless the key was changed while it was under way: then it may have found what
// was there before. Those who wait for it came before the change as well.
func (c *keyCache) land(secret digest, f *keyFlight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(f.done)
	if c.flights[secret] != f {
		return
	}
	delete(c.flights, secret)
	now := c.now()
	switch {
	case f.err != nil:
	case f.key == nil:
		delete(c.known, secret)
		c.unknown.add(secret, now)
	default:
		c.keep(secret, f.key, now)
	}
}

func (c *keyCache) keep(secret digest, key *Key, now time.Time) {
	known := c.known[secret]
	if known == nil {
		c.makeRoom()
		known = new(knownKey)
		c.known[secret] = known
	}
	*known = knownKey{key: key, until: now.Add(c.knownFor), era: c.era, used: now}
}

// makeRoom forgets, when the cache is full, the key of some that was not used for the longest time.
func (c *keyCache) makeRoom() {
	if len(c.known) < c.maxKnown {
		return
	}
	const enough = 16
	var oldest digest
	var used time.Time
	seen := 0
	for secret, known := range c.known {
		if seen == 0 || known.used.Before(used) {
			oldest, used = secret, known.used
		}
		if seen++; seen == enough {
			break
		}
	}
	delete(c.known, oldest)
}

// changed lets go of a key, and of a lookup that may have been made too early. If all may have changed, those that
// were known stay for an outage: a store that answers again for a moment only must not take them away. A key that is
// named is known to be another now, and gone at once; or it is new, and thereby no longer one of the unknown.
func (c *keyCache) changed(secret digest, all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if all {
		c.era++
		clear(c.flights)
		c.unknown.clear()
		return
	}
	delete(c.flights, secret)
	c.unknown.remove(secret)
	if c.known[secret] != nil || len(c.known) < c.maxKnown {
		c.known[secret] = new(knownKey)
	}
}

// outlived returns a key that was known before err, if that is enough.
func (c *keyCache) outlived(secret digest, err error) (*Key, error) {
	if !c.source.KeysOutliveOutage() {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.known[secret]
	if known == nil || known.key == nil {
		return nil, err
	}
	known.used = c.now()
	return known.key, nil
}
