package mesh

import (
	"testing"
	"time"
)

// TestWhatWasAdmittedWithoutRedisCountsWhenItIsBack: an outage refills no day.
func TestWhatWasAdmittedWithoutRedisCountsWhenItIsBack(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	limits := Limits{RPD: 20}
	request := func(a Admission) {
		t.Helper()
		a.KeyID, a.RequestID, a.Limits = "key", newRequestID(), limits
		v, err := s.Admit(t.Context(), a)
		if err != nil || v.Refused != "" {
			t.Fatalf("%+v, %v", v, err)
		}
		s.Settle(Event{KeyID: "key", RequestID: a.RequestID, Cost: 1})
	}
	for range 2 {
		request(Admission{})
	}
	settledAll(t, s)
	server.kill()
	for range 8 {
		request(Admission{})
	}
	request(Admission{Uncounted: true})
	if !s.degraded() {
		t.Error("Redis was not missed")
	}
	server.start()
	settledAll(t, s)
	v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID(), Limits: limits})
	if err != nil || v.Day.Used != 11 {
		t.Errorf("the day has %d requests, %v; want 11", v.Day.Used, err)
	}
}

// TestLateAdmissionAndItsSettlementCountOnce is for a request of which nobody knew in time that Redis had admitted it.
func TestLateAdmissionAndItsSettlementCountOnce(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	late, early := newRequestID(), newRequestID()
	limits := Limits{RPD: 20}
	admitRedis(t, s, Admission{KeyID: "key", RequestID: early, Limits: limits})
	for _, id := range []string{early, late} {
		enterNow(t, s, settlement{Kind: settleEvent, Alone: true, Event: Event{KeyID: "key", RequestID: id}})
		enterNow(t, s, settlement{Kind: settleEvent, Alone: true, Sent: true, Event: Event{KeyID: "key", RequestID: id}})
	}
	if v := admitRedis(t, s, Admission{KeyID: "key", RequestID: late, Limits: limits}); v.Day.Used != 2 {
		t.Errorf("the day has %d requests, want 2", v.Day.Used)
	}
}

// TestVoidTakesNothingFromAMinuteThatBeginsBesideIt enters both in one run of the script.
func TestVoidTakesNothingFromAMinuteThatBeginsBesideIt(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	limits := Limits{RPM: 20, RPD: 20}
	first := at(t, "2026-11-24T10:00:00Z")
	next := first.Add(time.Minute)
	s.redisClock(first)
	undone := idFrom(first)
	admitRedis(t, s, Admission{KeyID: "key", RequestID: undone, Limits: limits})
	s.redisClock(next)
	enterNow(t, s,
		settlement{Kind: settleVoid, Event: Event{KeyID: "key", RequestID: undone}},
		settlement{Kind: settleEvent, Alone: true, Event: Event{KeyID: "key", RequestID: idFrom(next)}})
	if v := admitRedis(t, s, Admission{KeyID: "key", RequestID: idFrom(next), Limits: limits}); v.Minute.Used != 2 || v.Day.Used != 2 {
		t.Errorf("%d in the minute, %d in the day; want 2", v.Minute.Used, v.Day.Used)
	}
}
