package mesh

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// StoreModule is a guest module in the namespace mesh.stores. It is only the description of a store: opening it is
// left until the configuration starts, because a configuration is also provisioned to be validated, while another
// process has the database open.
type StoreModule interface {
	// StoreKey identifies the thing the store keeps its data in, such as a file, and nothing else. Handlers whose
	// stores have the same key share one store, across sites and across reloads of the configuration. It begins with the
	// module's name and a colon.
	StoreKey() string

	// OpenStore opens the store. Its errors name the thing and say what is wrong with it.
	OpenStore() (Store, error)
}

// Store keeps what has to outlive a request: each key's counters, and the ledger. Its methods may be called
// concurrently. Destruct writes what is still unwritten and closes it.
type Store interface {
	caddy.Destructor

	// Admit decides whether a request may run and counts it if it may, in one atomic step. A request that is
	// refused counts nowhere. An error means that the store could not be asked.
	Admit(ctx context.Context, a Admission) (Verdict, error)

	// Spent returns what a key has spent in the current period. It is asked only where another model than the first one
	// is about to be asked on behalf of a key with a cap.
	Spent(ctx context.Context, keyID string, period Period) (Money, error)

	// Settle enters the end of an admitted request into the ledger and adds its cost to its key's spend: both or
	// neither, and once for each request id, however often it is called. It does not wait for a disk or a network.
	Settle(e Event)

	// Leave gives back the place under MaxConcurrency that a settled request has kept. It does nothing where there is none.
	Leave(keyID, requestID string)
}

// KeyStore is a Store that has keys of its own, beside those of the configuration.
type KeyStore interface {
	Store

	// FindKey returns the key whose secret has this SHA-256, or nil where there is none. It is asked for every request
	// with a key that the configuration does not have, so it has to answer from memory nearly always. An error means
	// that it cannot be said at present whether there is such a key. The key must not be changed any more.
	FindKey(ctx context.Context, secret [sha256.Size]byte) (*Key, error)
}

// errUnavailable is in errors of a store that is away, slow or busy. That is to be expected now and then, and the store
// says itself in the log when it begins and ends. Any other error is a fault.
var errUnavailable = errors.New("the store cannot be asked at present")

// Admission asks for one request to be let through.
type Admission struct {
	KeyID     string
	RequestID string
	Limits    Limits
	MaxCost   Money         // the most the request can cost; a hard cap must have room for it
	Waited    time.Duration // for the store already, to find the key
	Uncounted bool          // it is part of a request that was counted, and takes no place of its own under MaxConcurrency
	Keeps     bool          // it keeps its place under MaxConcurrency when it is settled, until Leave
	Pending   Event         // what a store that several gateways share charges if this one dies before it settles the request
	Job       *Job          // that the request is; it belongs to no instance
}

// Limits are what a key may use. Zero values mean no limit.
type Limits struct {
	RPM            int64 // requests in a UTC minute
	RPD            int64 // requests in a UTC day
	TPM            int64 // tokens, of requests that have ended, in a UTC minute
	MaxConcurrency int64 // requests under way
	SpendCap       Money
	SpendPeriod    Period // of SpendCap
	Hard           bool   // SpendCap is never passed: each request reserves its MaxCost until it is settled
}

// Period is the time over which spend is summed, in UTC: "total" (also when empty), "month" or "day".
type Period string

// The periods there are.
const (
	PeriodTotal Period = "total"
	PeriodMonth Period = "month"
	PeriodDay   Period = "day"
)

// Limit names one of the limits of a key.
type Limit string

// The limits a request can be refused by. Where several would refuse it, the first of these does.
const (
	LimitSpend       Limit = "spend"
	LimitRPD         Limit = "rpd"
	LimitRPM         Limit = "rpm"
	LimitTPM         Limit = "tpm"
	LimitConcurrency Limit = "concurrency"
	LimitQueue       Limit = "queue" // of jobs; it is no key's
)

// Verdict is the answer to an Admission, and where the key stands after it.
type Verdict struct {
	Refused Limit         // which limit refused the request; empty if it may run
	Minute  Window        // requests in the current minute
	Day     Window        // requests in the current day
	Tokens  Window        // tokens in the current minute; where there is a limit for them
	Spend   Money         // in the period that was asked for
	Reset   time.Duration // until the period of spend ends; 0 for a total

	void bool // the request's id has been used up, and must not be asked for again
}

// Window is a fixed window aligned to UTC.
type Window struct {
	Used  int64         // requests counted in it so far
	Reset time.Duration // until it ends
}

// Event is one entry of the ledger: a request that was admitted, and how it ended. It holds no prompt and no answer.
type Event struct {
	RequestID string `json:"request_id"`
	KeyID     string `json:"key_id"`
	KeyName   string `json:"key_name,omitempty"`
	Owner     string `json:"owner,omitempty"`
	SessionID string `json:"session_id,omitempty"`

	ComparisonID string `json:"comparison_id,omitempty"` // of the compare that the request was made for
	ParentID     string `json:"parent_id,omitempty"`     // of the request whose model this one chose

	Time     time.Time     `json:"time"`              // when it ended; decides the day and month that are charged
	Duration time.Duration `json:"duration_ns"`       // from the request's arrival
	TTFT     time.Duration `json:"ttft_ns,omitempty"` // from the request's arrival to the first byte of the answer

	Model    string  `json:"model"` // the model that served, or the one asked for where none did
	Upstream string  `json:"upstream,omitempty"`
	Stream   bool    `json:"stream,omitempty"`
	Attempts int     `json:"attempts"`
	Status   int     `json:"status"`
	Outcome  Outcome `json:"outcome"`
	Error    string  `json:"error,omitempty"` // the code of the error the client got
	Tried    []Tried `json:"tried,omitempty"` // what did not serve it, in order

	PromptTokens     int64 `json:"prompt_tokens"`
	CachedTokens     int64 `json:"cached_tokens,omitempty"` // part of PromptTokens
	CompletionTokens int64 `json:"completion_tokens"`

	PromptAudioTokens     int64 `json:"prompt_audio_tokens,omitempty"`     // part of PromptTokens
	CompletionAudioTokens int64 `json:"completion_audio_tokens,omitempty"` // part of CompletionTokens
	Images                int64 `json:"images,omitempty"`                  // that were made for a request for images

	Estimated bool  `json:"estimated,omitempty"` // the tokens are an estimate, because the upstream did not say
	Cost      Money `json:"cost_usd"`
	MaxCost   Money `json:"max_cost_usd,omitempty"` // of a lost request: the most it can have cost; 0 where nothing bounds that
}

// Outcome is how an admitted request ended.
type Outcome string

// The outcomes there are.
const (
	OutcomeCompleted  Outcome = "completed"   // the answer went out whole
	OutcomeError      Outcome = "error"       // no upstream answered, or the upstream refused
	OutcomeTimeout    Outcome = "timeout"     // the request's time ran out
	OutcomeCut        Outcome = "cut"         // the upstream broke off in the middle of its answer
	OutcomeClientGone Outcome = "client_gone" // the client left before the end
	OutcomeLost       Outcome = "lost"        // its gateway died; another entered an estimate
)

// stores holds every open store, by StoreKey.
var stores = caddy.NewUsagePool()

// storeRef is what one handler holds of a shared store. The store stays open until the handler's configuration is
// gone and the last of its requests has ended: on a reload, Caddy cleans the old configuration up while its streams
// still run.
type storeRef struct {
	module StoreModule
	faults storeFaults

	mu      sync.Mutex
	store   Store
	holders int  // requests, and the configuration itself while kept is true
	kept    bool // the configuration has started and is not cleaned up
	keyless bool // the store was opened once, and is no KeyStore
}

// keep opens the store for as long as the configuration lives.
func (s *storeRef) keep() error {
	if _, err := s.acquire(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = true
	return nil
}

// letGo ends what keep began, if it did.
func (s *storeRef) letGo() error {
	s.mu.Lock()
	kept := s.kept
	s.kept = false
	s.mu.Unlock()
	if !kept {
		return nil
	}
	return s.release()
}

// acquire returns the store, open, until release is called. It waits only where nobody else has the store open: a
// request may come before the configuration has wholly started, or on a kept-alive connection after its end.
func (s *storeRef) acquire() (Store, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holders == 0 {
		v, _, err := stores.LoadOrNew(s.module.StoreKey(), func() (caddy.Destructor, error) { return s.module.OpenStore() })
		if err != nil {
			return nil, err
		}
		s.store = v.(Store)
		_, hasKeys := v.(KeyStore)
		s.keyless = !hasKeys
	}
	s.holders++
	return s.store, nil
}

// withoutKeys reports whether the store is known to have no keys of its own, so that it need not be opened for them.
func (s *storeRef) withoutKeys() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keyless
}

func (s *storeRef) release() error {
	s.mu.Lock()
	s.holders--
	last := s.holders == 0
	if last {
		s.store = nil
	}
	s.mu.Unlock()
	if !last {
		return nil
	}
	_, err := stores.Delete(s.module.StoreKey())
	return err
}

// storeFaults are errors of the store that no outage explains, such as that it cannot be opened. What is wrong for one
// request is likely to be wrong for many, and not for all: so it is not known when it ends, and one in a minute is logged.
type storeFaults struct {
	last atomic.Int64 // when one was logged, in Unix nanoseconds
}

func (f *storeFaults) note(logger *zap.Logger, requestID string, err error) {
	now, last := time.Now().UnixNano(), f.last.Load()
	if now-last < int64(time.Minute) || !f.last.CompareAndSwap(last, now) {
		return
	}
	logger.Error("the store fails", zap.String("request_id", requestID), zap.Error(err))
}
