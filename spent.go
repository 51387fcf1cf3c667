package mesh

import (
	"context"
	"fmt"
	"strconv"
	"time"
)

// Spent answers from memory.
func (s *localStore) Spent(_ context.Context, keyID string, period Period) (Money, error) {
	return s.account(keyID).spent(s.now(), period), nil
}

func (a *account) spent(now time.Time, period Period) Money {
	a.mu.Lock()
	defer a.mu.Unlock()
	spent, _ := a.balance.spent(now, period)
	return spent
}

// Spent asks Redis. While that is away, and for what this instance has yet to tell it, the instance's own account counts.
func (s *redisStore) Spent(ctx context.Context, keyID string, period Period) (Money, error) {
	own := s.accounts.of(keyID).spent(s.now(), period)
	if s.degraded() {
		return own, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.timeout)
	defer cancel()
	values, err := s.client.HMGet(ctx, s.key(keyID, "account"), "total", "month", "month_spent", "spend_day", "spend_day_spent").Result()
	s.breaker.noteTimed(keyID, err)
	if err != nil {
		return own, nil
	}
	var n [5]int64
	for i, value := range values {
		text, ok := value.(string)
		if !ok {
			continue // the key has not spent anything yet
		}
		if n[i], err = strconv.ParseInt(text, 10, 64); err != nil {
			return 0, fmt.Errorf("account of key %s: %w", keyID, err)
		}
	}
	b := balance{Total: Money(n[0]), Month: tally{n[1], n[2]}, SpendDay: tally{n[3], n[4]}}
	spent, _ := b.spent(s.now(), period)
	if s.unsettled() {
		spent = max(spent, own)
	}
	return spent, nil
}
