package mesh

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// recentlySettled are those that Redis has taken lately, for the writer. A Redis that fails may lose what it has
// confirmed: appendfsync everysec loses a second, and the replica that takes over lacks what had not reached it. They are
// sent once more after a connection has ended, which charges nothing twice. No command need fail for that: an idle
// connection that the server has closed is replaced in silence.
type recentlySettled struct {
	ended   uint32 // connections, when they were last sent
	batches []settledBatch
	count   int

	pause time.Duration // until they may be sent again
	next  time.Time

	servers string    // that had them
	checked time.Time // when these were last asked whether they are there
}

type settledBatch struct {
	at    time.Time
	batch []settlement
}

const (
	// resendWindow is for how long before its failure a Redis may have lost what it confirmed.
	resendWindow = 10 * time.Second

	// settledKept is after how long they are forgotten, while all is well.
	settledKept = 2 * resendWindow

	// maxResent is how many are kept at most, which at more than 2,000 a second is less than resendWindow.
	maxResent = 20_000

	// resendAge is after how long an outage they are not sent any more. A request may have begun a day before it was settled,
	// and Redis knows for three days what it has settled.
	resendAge = 24 * time.Hour

	// Where connections end all the time, as in a Cluster with a part that does not answer, this is how often all is sent again.
	firstResendPause = time.Second
	lastResendPause  = time.Minute
)

// add takes in what Redis has taken now. Should it be sent again, it may be there.
func (r *recentlySettled) add(batch []settlement, now time.Time) {
	for i := range batch {
		batch[i].Sent = true
	}
	r.batches = append(r.batches, settledBatch{now, batch})
	r.count += len(batch)
	for r.count > maxResent {
		r.drop()
	}
}

func (r *recentlySettled) drop() {
	r.count -= len(r.batches[0].batch)
	r.batches = r.batches[1:]
	if len(r.batches) == 0 {
		r.batches = nil
	}
}

func (r *recentlySettled) dropOlder(now time.Time, age time.Duration) {
	for len(r.batches) > 0 && now.Sub(r.batches[0].at) > age {
		r.drop()
	}
}

// take returns those that are to be sent again, and has none any more.
func (r *recentlySettled) take(now time.Time) (all []settlement) {
	r.dropOlder(now, resendAge)
	for _, recent := range r.batches {
		all = append(all, recent.batch...)
	}
	r.batches, r.count = nil, 0
	return all
}

// paced reports whether they may be sent again by now, and has the next time wait for the longer the sooner it comes.
func (r *recentlySettled) paced(now time.Time) bool {
	if now.Before(r.next) {
		return false
	}
	if now.Sub(r.next) > r.pause {
		r.pause = firstResendPause / 2
	}
	r.pause = min(2*r.pause, lastResendPause)
	r.next = now.Add(r.pause)
	return true
}

// resend sends once more what a Redis that may have failed since may have lost. What does not go through is kept in the
// journal.
func (s *redisStore) resend() {
	now := s.now()
	ended := s.endedConnections()
	if ended == s.settled.ended {
		s.forgetSettled(now)
		return
	}
	if !s.settled.paced(now) {
		return
	}
	s.settled.ended = ended
	again := s.settled.take(now)
	if left := leftOf(again, s.send(again)); len(left) > 0 {
		s.keep(left)
	}
}

// forgetSettled drops what is safe: what is older than what the servers there are can lose, if they are those that
// had it. Connections end unnoticed while they are not used, so that each server is asked for a sign of life first.
func (s *redisStore) forgetSettled(now time.Time) {
	r := &s.settled
	if len(r.batches) == 0 || now.Sub(r.batches[0].at) <= settledKept || now.Sub(r.checked) < resendWindow/2 {
		return
	}
	r.checked = now
	servers, err := s.liveServers()
	switch {
	case err != nil:
		s.writer.failed = true
	case servers != r.servers:
		r.servers = servers
		r.ended-- // as if a connection had ended: one server has taken the place of another
	case s.endedConnections() == r.ended:
		r.dropOlder(now, settledKept)
	}
}

// liveServers returns the addresses of the servers that have the data. It is an error if one of them does not answer.
func (s *redisStore) liveServers() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), max(settleTimeout, s.timeout))
	defer cancel()
	cluster, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return "", s.client.Ping(ctx).Err() // a new master is not to be had without a new connection
	}
	var mu sync.Mutex
	var masters []string
	err := cluster.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
		mu.Lock()
		masters = append(masters, master.Options().Addr)
		mu.Unlock()
		return master.Ping(ctx).Err()
	})
	slices.Sort(masters)
	return strings.Join(masters, " "), err
}

// keepUnsafe writes to the journal what Redis may have lost and has not been sent again, because this gateway ends.
func (s *redisStore) keepUnsafe() {
	if !s.degraded() && s.endedConnections() == s.settled.ended {
		return
	}
	if again := s.settled.take(s.now()); len(again) > 0 {
		s.keep(again)
	}
}

// endedConnections counts those that have ended, for whatever reason.
func (s *redisStore) endedConnections() uint32 {
	stats := s.client.PoolStats()
	ended := stats.StaleConns
	if pipelines := stats.PipelineStats; pipelines != nil {
		ended += pipelines.StaleConns
	}
	return ended
}
