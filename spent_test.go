package mesh

import (
	"testing"
	"time"
)

func TestRedisSaysWhatAKeyHasSpent(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	for _, period := range []Period{PeriodTotal, PeriodMonth, PeriodDay} {
		if spent, err := s.Spent(t.Context(), "key", period); err != nil || spent != 0 {
			t.Errorf("%s, before anything was: %s %v", period, spent, err)
		}
	}
	settleNow(t, s, Event{KeyID: "key", RequestID: newRequestID(), Cost: 7 * usd, Time: time.Now()})
	settleNow(t, s, Event{KeyID: "other", RequestID: newRequestID(), Cost: usd, Time: time.Now()})
	for _, period := range []Period{PeriodTotal, PeriodMonth, PeriodDay} {
		if spent, err := s.Spent(t.Context(), "key", period); err != nil || spent != 7*usd {
			t.Errorf("%s: %s %v", period, spent, err)
		}
	}
}
