package mesh

import "time"

const (
	unknownFor  = 5 * time.Second // a new key is refused for this time at most, where nothing announces it
	maxUnknown  = 20_000          // digests; under 2 MB
	firstTurns  = 6               // first lookups at a time
	firstRate   = 1000            // first lookups in a second: under a hundredth of what a Redis can do
	firstBurst  = 1000            // first lookups at once after a pause, for instance at a start
	maxDelay    = 250 * time.Millisecond
	firstPeriod = time.Second / firstRate
)

// unknownKeys remembers digests that are no key's, and bounds how fast digests that nothing is known of are looked
// up. Its memory is two sets that take turns, so that an entry costs no more than its digest.
type unknownKeys struct {
	recent, older map[digest]struct{}
	turned        time.Time // when recent was begun

	lifetime time.Duration
	turns    chan struct{} // for first lookups
	pace     pace
	maxDelay time.Duration // until a first lookup may begin
}

func newUnknownKeys(maxDelay time.Duration) unknownKeys {
	return unknownKeys{
		recent:   make(map[digest]struct{}),
		older:    make(map[digest]struct{}),
		lifetime: unknownFor,
		turns:    make(chan struct{}, firstTurns),
		maxDelay: maxDelay,
	}
}

func (u *unknownKeys) has(secret digest, now time.Time) bool {
	u.turn(now)
	_, ok := u.recent[secret]
	if !ok {
		_, ok = u.older[secret]
	}
	return ok
}

func (u *unknownKeys) add(secret digest, now time.Time) {
	u.turn(now)
	if len(u.recent) >= maxUnknown/2 {
		u.age()
		u.turned = now
	}
	u.recent[secret] = struct{}{}
}

func (u *unknownKeys) remove(secret digest) {
	delete(u.recent, secret)
	delete(u.older, secret)
}

func (u *unknownKeys) clear() {
	clear(u.recent)
	clear(u.older)
}

// turn forgets what is too old: an entry lives for half the lifetime at least and for the lifetime at most.
func (u *unknownKeys) turn(now time.Time) {
	switch age := now.Sub(u.turned); {
	case age >= u.lifetime:
		u.clear()
		u.turned = now
	case age >= u.lifetime/2:
		u.age()
		u.turned = u.turned.Add(u.lifetime / 2)
	}
}

func (u *unknownKeys) age() {
	u.recent, u.older = u.older, u.recent
	clear(u.recent)
}

// reserve returns how long a first lookup has to wait. It refuses one that would wait too long.
func (u *unknownKeys) reserve(now time.Time) (delay time.Duration, ok bool) {
	return u.pace.reserve(now, u.maxDelay)
}

// pace gives out places in a row, firstRate in a second. A short wait slows those down who send one request after
// another, and lets everybody through as long as they are few.
type pace struct{ next time.Time }

// reserve returns how long to wait for the next place. It refuses if that is longer than most.
func (p *pace) reserve(now time.Time, most time.Duration) (delay time.Duration, ok bool) {
	place := p.next
	if earliest := now.Add(-firstBurst * firstPeriod); place.Before(earliest) {
		place = earliest
	}
	delay = max(0, place.Sub(now))
	if delay > most {
		return 0, false
	}
	p.next = place.Add(firstPeriod)
	return delay, true
}
