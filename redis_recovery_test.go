package mesh

import (
	"errors"
	"testing"
)

// TestHardCapHoldsWhenRedisIsBackAndDoesNotKnowYet lets requests through without Redis, some of which have ended and some
// not. Redis is asked again before it was told of either.
func TestHardCapHoldsWhenRedisIsBackAndDoesNotKnowYet(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	limits := Limits{RPM: 1000, SpendCap: 1000, Hard: true}
	admit := func() (id string, v Verdict) {
		id = newRequestID()
		v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: id, Limits: limits, MaxCost: 100})
		if err != nil {
			t.Fatal(err)
		}
		return id, v
	}
	want := make(map[string]Money)
	settle := func(id string) {
		want[id] = 100
		s.Settle(Event{RequestID: id, KeyID: "key", Cost: 100})
	}
	s.breaker.trip("", errRedisDown)
	var running []string
	for range 10 {
		id, v := admit()
		if v.Refused != "" {
			t.Fatalf("without Redis: %+v", v)
		}
		running = append(running, id)
	}
	for _, id := range running[:5] {
		settle(id)
	}
	s.breaker.close()
	for range 10 {
		if _, v := admit(); v.Refused != LimitSpend {
			t.Fatalf("spent 500, and 500 are under way, of 1000: %+v", v)
		}
	}
	for _, id := range running[5:] {
		settle(id)
	}
	if _, v := admit(); v.Refused != LimitSpend || v.Spend != 1000 {
		t.Errorf("spent 1000 of 1000: %+v", v)
	}
	s.work()
	expectBalance(t, s, "key", want)
	if _, v := admit(); v.Refused != LimitSpend || v.Day.Used != 10 {
		t.Errorf("when Redis knows: %+v", v) // and counts those that ran, but nothing that was refused
	}
}

// TestCapGoesByRedisAgainWhenAllIsSettled corrects what this instance took for spent.
func TestCapGoesByRedisAgainWhenAllIsSettled(t *testing.T) {
	s := openStill(t, redisModule(t, startRedis(t).address))
	limits := Limits{SpendCap: 1000, Hard: true}
	s.accounts.of("key").balance.Total = 1000
	v, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID(), Limits: limits, MaxCost: 100})
	if err != nil || v.Refused != "" || v.Spend != 0 {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestKeyThatRedisCouldNotBeToldOfIsToldSoon has the place where the reapers look taken by something else for a while.
func TestKeyThatRedisCouldNotBeToldOfIsToldSoon(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	c := server.client()
	c.Set(t.Context(), s.shared("keyids"), "taken", 0)
	admitRedis(t, s, Admission{KeyID: "key", RequestID: newRequestID()})
	eventually(t, "it was tried", func() bool { return server.calls("sadd") > 0 || server.rejected("sadd") > 0 })
	c.Del(t.Context(), s.shared("keyids"))
	eventually(t, "it is told", func() bool { return c.SIsMember(t.Context(), s.shared("keyids"), "key").Val() })
}

func TestWhatStopsAScriptForGoodAndWhatMayPass(t *testing.T) {
	for said, forGood := range map[string]bool{
		"WRONGTYPE Operation against a key holding the wrong kind of value script: 3f, on @user_script:52.":                                      true,
		"ERR Error running script (call to f_3f): @user_script:52: WRONGTYPE Operation against a key holding the wrong kind of value ":           true,
		"ERR hash value is not an integer script: 3f, on @user_script:88.":                                                                       true,
		"ERR user_script:31: attempt to compare nil with number script: 3f, on @user_script:31.":                                                 true,
		"ERR The user executing the script can't run this command or subcommand script: 3f, on @user_script:1.":                                  false,
		"NOPERM this user has no permissions to run the 'evalsha' command":                                                                       false,
		"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk. script: 3f, on @user_script:52.":       false,
		"ERR Error running script (call to f_3f): @user_script:52: @user_script: 52: -READONLY You can't write against a read only replica. ":    false,
		"ERR Error running script (call to f_3f): @user_script:52: @user_script: 52: -MISCONF Redis is configured to save RDB snapshots, but … ": false,
		"OOM command not allowed when used memory > 'maxmemory'. script: 3f, on @user_script:52.":                                                false,
		"BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.":                                                 false,
	} {
		if got := isScriptFault(redisReply(said)); got != forGood {
			t.Errorf("%t: %s", got, said)
		}
	}
	if isScriptFault(errors.New("WRONGTYPE is not what a broken connection says")) {
		t.Error("takes what is no answer of Redis for one")
	}
}

// redisReply is an error that Redis answered.
type redisReply string

func (r redisReply) Error() string { return string(r) }
func (redisReply) RedisError()     {}
