package mesh

// underWay are the requests of one key that this instance has let through and not settled. They are known only while the
// key has a limit for them: of others nothing is noted. After a restart none is under way.
type underWay struct {
	requests map[string]place // by id

	// ended are those that the shared store still counts, because their settlement is on its way.
	ended map[string]struct{}
}

// place is what a request takes of max_concurrency.
type place struct {
	shared bool // the shared store counts the request too, or may
	keeps  bool // it is kept until leave, because others are made in the request's course
}

func (u *underWay) begin(requestID string, p place) {
	if requestID == "" {
		return
	}
	if u.requests == nil {
		u.requests = make(map[string]place)
	}
	u.requests[requestID] = p
}

// end is for a request that is about to be settled. It reports whether its place is kept.
func (u *underWay) end(requestID string) (kept bool) {
	if u.requests[requestID].keeps {
		return true
	}
	u.leave(requestID)
	return false
}

// leave gives a place back, if there is one, and reports whether the shared store has yet to hear of it.
func (u *underWay) leave(requestID string) (shared bool) {
	p := u.requests[requestID]
	delete(u.requests, requestID)
	if !p.shared {
		return false
	}
	if u.ended == nil {
		u.ended = make(map[string]struct{})
	}
	u.ended[requestID] = struct{}{}
	return true
}

// unshared returns how many the shared store does not count.
func (u *underWay) unshared() (n int) {
	for _, p := range u.requests {
		if !p.shared {
			n++
		}
	}
	return n
}

// settled is for when the shared store knows of the end.
func (u *underWay) settled(requestID string) { delete(u.ended, requestID) }
