package mesh

// underWay are the requests of one key that this instance has let through and not settled. They are known only while the
// key has a limit for them: of others nothing is noted. After a restart none is under way.
type underWay struct {
	requests map[string]bool // by id; whether the shared store counts the request too, or may

	// ended are those that the shared store still counts, because their settlement is on its way.
	ended map[string]struct{}
}

func (u *underWay) begin(requestID string, shared bool) {
	if requestID == "" {
		return
	}
	if u.requests == nil {
		u.requests = make(map[string]bool)
	}
	u.requests[requestID] = shared
}

// end is for a request that is about to be settled, or taken back.
func (u *underWay) end(requestID string) {
	shared := u.requests[requestID]
	delete(u.requests, requestID)
	if !shared {
		return
	}
	if u.ended == nil {
		u.ended = make(map[string]struct{})
	}
	u.ended[requestID] = struct{}{}
}

// unshared returns how many the shared store does not count.
func (u *underWay) unshared() (n int) {
	for _, shared := range u.requests {
		if !shared {
			n++
		}
	}
	return n
}

// settled is for when the shared store knows of the end.
func (u *underWay) settled(requestID string) { delete(u.ended, requestID) }
