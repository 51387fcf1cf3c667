package mesh

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/redis/go-redis/v9"
)

// redisClock has the scripts see a time of the test's.
func (s *redisStore) redisClock(now time.Time) {
	clock := fmt.Sprintf("{'%d', '%d'}", now.Unix(), now.Nanosecond()/1000)
	s.admits = newRedisScript("admit", strings.Replace(admitLua, "redis.call('TIME')", clock, 1))
	s.settles = newRedisScript("settle", strings.Replace(settleLua, "redis.call('TIME')", clock, 1))
}

func admitRedis(t testing.TB, s *redisStore, a Admission) Verdict {
	t.Helper()
	v, err := s.Admit(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	if s.degraded() {
		t.Fatal("decided without Redis")
	}
	return v
}

// settleNow settles in the test's goroutine.
func settleNow(t testing.TB, s *redisStore, e Event) {
	t.Helper()
	enterNow(t, s, settlement{Kind: settleEvent, Event: e})
}

func enterNow(t testing.TB, s *redisStore, batch ...settlement) {
	t.Helper()
	for i, f := range s.enter(batch) {
		if f != entered {
			t.Fatalf("%s %s was not entered", batch[i].Kind, batch[i].Event.RequestID)
		}
	}
}

func TestRedisKeepsTheWindowsOfALocalStore(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	for i, tc := range windowCases {
		t.Run(tc.name, func(t *testing.T) {
			for _, step := range tc.steps {
				s.redisClock(at(t, step.now))
				step.check(t, admitRedis(t, s, Admission{KeyID: strconv.Itoa(i), Limits: windowLimits}))
			}
		})
	}
}

func TestRedisSumsSpendLikeALocalStore(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	for i, charge := range spent {
		s.redisClock(at(t, charge.at))
		settleNow(t, s, Event{RequestID: requestID(i), KeyID: "key", Cost: charge.cost})
	}
	for _, tc := range spendCases {
		s.redisClock(at(t, tc.now))
		tc.check(t, admitRedis(t, s, Admission{KeyID: "key", Limits: tc.limits()}))
	}
}

func TestMonthsInRedisBeginWhereGoSays(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	for day := at(t, "2027-12-25T13:00:00Z"); day.Year() < 2029; day = day.AddDate(0, 0, 3) {
		s.redisClock(day)
		v := admitRedis(t, s, Admission{KeyID: day.String(), Limits: Limits{SpendPeriod: PeriodMonth}})
		if want := until(day, monthAfter(monthOf(day))); v.Reset != want {
			t.Fatalf("%s: the month ends in %s, want %s", day, v.Reset, want)
		}
	}
}

func TestRequestRefusedByRedisCountsNowhere(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	s.redisClock(at(t, "2026-11-24T10:00:00Z"))
	for i, tc := range refusalCases {
		keyID := strconv.Itoa(i)
		ended, underWay := requestID(2*i), requestID(2*i+1)
		for _, id := range []string{ended, underWay} {
			admitRedis(t, s, Admission{KeyID: keyID, RequestID: id, Limits: refusalBegin})
		}
		settleNow(t, s, Event{RequestID: ended, KeyID: keyID, Cost: 1, PromptTokens: 2, CompletionTokens: 3, Time: s.now()})
		dump := func() string {
			return fmt.Sprint(s.client.HGetAll(t.Context(), s.key(keyID, "account")).Val(), readRedis(t, s, keyID))
		}
		before := dump()
		got := admitRedis(t, s, Admission{KeyID: keyID, RequestID: requestID(100 + i), Limits: tc.limits})
		if got.Refused != tc.want {
			t.Errorf("%+v: refused by %q, want %q", tc.limits, got.Refused, tc.want)
		}
		if after := dump(); tc.want != "" && after != before {
			t.Errorf("%+v: a refused request changed %s to %s", tc.limits, before, after)
		}
	}
}

func TestTwoStoresOnOneRedisAdmitExactlyTheLimit(t *testing.T) {
	server := startRedis(t)
	stores := []*redisStore{openRedis(t, redisModule(t, server.address)), openRedis(t, redisModule(t, server.socket()))}
	for _, s := range stores {
		s.redisClock(at(t, "2026-11-24T10:00:00Z"))
	}
	admitAtOnce(t, stores[0], stores[1])
	if b := readRedis(t, stores[0], "key"); b.pending != 60 {
		t.Errorf("%d requests are pending, want 60", b.pending)
	}
}

func TestAdmittingARequestTwiceCountsOnce(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	s.redisClock(at(t, "2026-11-24T10:00:00Z"))
	a := Admission{KeyID: "key", RequestID: requestID(1), Limits: Limits{RPM: 1, SpendCap: 100, Hard: true}, MaxCost: 100}
	for range 3 {
		if v := admitRedis(t, s, a); v.Refused != "" || v.Minute.Used != 1 {
			t.Fatalf("%+v", v)
		}
	}
	settleNow(t, s, Event{RequestID: requestID(1), KeyID: "key", Cost: 5})
	admitRedis(t, s, a) // late
	if b := readRedis(t, s, "key"); b.pending != 0 || b.reserved != "0" || b.total != "5" {
		t.Errorf("%+v", b)
	}
}

func TestHardCapInRedisIsNeverPassed(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	testHardCap(t, s, func() Money {
		text, err := s.client.HGet(t.Context(), s.key("hard", "account"), "total").Result()
		if err == redis.Nil {
			return 0
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return Money(n)
	})
	if b := readRedis(t, s, "hard"); b.reserved != "0" || b.pending != 0 {
		t.Errorf("left behind: %+v", b)
	}
}

// A double tells 2⁵³ and 2⁵³+1 not apart.
func TestCapsAreExactWhereADoubleIsNot(t *testing.T) {
	s := openRedis(t, redisModule(t, startRedis(t).address))
	const big = 1<<53 + 1
	settleNow(t, s, Event{RequestID: requestID(1), KeyID: "key", Cost: big})
	for _, tc := range []struct {
		limits  Limits
		maxCost Money
		want    Limit
	}{
		{Limits{SpendCap: big + 1}, 0, ""},
		{Limits{SpendCap: big}, 0, LimitSpend},
		{Limits{SpendCap: big - 1}, 0, LimitSpend},
		{Limits{SpendCap: big + 1, Hard: true}, 1, ""},
		{Limits{SpendCap: big + 1, Hard: true}, 2, LimitSpend},
		{Limits{SpendCap: big + 2, Hard: true}, 2, ""},
		{Limits{SpendCap: big + 1, Hard: true}, math.MaxInt64, LimitSpend},
		{Limits{SpendCap: math.MaxInt64}, math.MaxInt64, ""},
	} {
		if v := admitRedis(t, s, Admission{KeyID: "key", Limits: tc.limits, MaxCost: tc.maxCost}); v.Refused != tc.want || v.Spend != big {
			t.Errorf("%+v, %d: %+v", tc.limits, tc.maxCost, v)
		}
		s.client.HSet(t.Context(), s.key("key", "account"), "reserved", "0")
	}
	settleNow(t, s, Event{RequestID: requestID(2), KeyID: "key", Cost: math.MaxInt64 - big - 3})
	settleNow(t, s, Event{RequestID: requestID(3), KeyID: "key", Cost: 100})
	if b := readRedis(t, s, "key"); b.total != strconv.Itoa(math.MaxInt64) || b.entries != 3 {
		t.Errorf("does not saturate: %+v", b)
	}
}

func TestEveryKeyInRedisHasATTLAndItsKeysTag(t *testing.T) {
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	for i := range 4 {
		a := Admission{KeyID: "abc", RequestID: requestID(i), Limits: Limits{SpendCap: 1 << 40, Hard: true}, MaxCost: 5}
		admitRedis(t, s, a)
	}
	settleNow(t, s, Event{RequestID: requestID(0), KeyID: "abc", SessionID: "a}b{c", Model: "m", Cost: 1})
	lost := Event{RequestID: requestID(1), KeyID: "abc", Model: "m", Cost: 1}
	enterNow(t, s, settlement{Kind: settleLost, Event: lost}, settlement{Kind: settleVoid, Event: Event{RequestID: requestID(2), KeyID: "abc"}})
	eventually(t, "the key is registered", func() bool { return s.client.SIsMember(t.Context(), "mesh:keyids", "abc").Val() })
	if err := s.reapAll(t.Context(), map[string]time.Time{}); err != nil {
		t.Fatal(err)
	}
	admitRedis(t, s, Admission{KeyID: "abc", RequestID: "req_" + ulid.Make().String()})
	for range 3 {
		j, a := newTestJob(Limits{}, 0)
		submitJob(t, s, j, a)
	}
	run := takeJob(t, s, "q")
	if err := s.FinishJob(t.Context(), run, endOf(run, "{}", 1)); err != nil {
		t.Fatal(err)
	}
	takeJob(t, s, "q")
	settledAll(t, s)
	names := server.client().Keys(t.Context(), "*").Val()
	for _, name := range names {
		if name == "mesh:id" {
			continue // for ever
		}
		if ttl := s.client.TTL(t.Context(), name).Val(); ttl <= 0 {
			t.Errorf("%s has no TTL", name)
		}
		shared := name == "mesh:keyids" || name == "mesh:reaper" || name == "mesh:usagekeys" || strings.HasPrefix(name, "mesh:instance:")
		if !shared && !strings.HasPrefix(name, "mesh:{abc}:") && !strings.HasPrefix(name, "mesh:{jobs:q}:") {
			t.Errorf("%s has not the tag of its key", name)
		}
	}
	if len(names) != 22 {
		t.Errorf("%d keys: %v", len(names), names)
	}
}

// TestRequestCostsTwoCommands, or less where several are settled together, counts with MONITOR, which shows what scripts do inside as well, marked.
func TestRequestCostsTwoCommands(t *testing.T) {
	const n = 200
	server := startRedis(t)
	s := openRedis(t, redisModule(t, server.address))
	warm := func(i int) {
		admitRedis(t, s, Admission{KeyID: "warm", RequestID: requestID(i)})
		s.Settle(Event{RequestID: requestID(i), KeyID: "warm"})
		settledAll(t, s)
	}
	warm(0)
	conn, err := net.Dial("tcp", server.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprint(conn, "MONITOR\r\n")
	lines := bufio.NewScanner(conn)
	if !lines.Scan() || lines.Text() != "+OK" {
		t.Fatalf("MONITOR: %q, %v", lines.Text(), lines.Err())
	}
	for i := range n {
		admitRedis(t, s, Admission{KeyID: "key", RequestID: requestID(100 + i), Limits: Limits{RPM: 1 << 30}})
		s.Settle(Event{RequestID: requestID(100 + i), KeyID: "key", Model: "m", Cost: 3})
	}
	settledAll(t, s)
	server.client().Echo(t.Context(), "the end")
	seen := make(map[string]int)
	for lines.Scan() && !strings.Contains(lines.Text(), "the end") {
		line := lines.Text()
		if fields := strings.Fields(line); !strings.Contains(line, " lua]") && strings.Contains(line, "{key}") {
			seen[fields[3]]++
		}
	}
	if lines.Err() != nil {
		t.Fatal(lines.Err())
	}
	if seen[`"evalsha"`] <= n || seen[`"evalsha"`] > 2*n || len(seen) != 1 {
		t.Errorf("%d requests cost %v", n, seen)
	}
	for _, name := range []string{"set-info", "client"} {
		if strings.Contains(server.client().Info(t.Context(), "commandstats").Val(), "cmdstat_"+name) {
			t.Errorf("it sends %s", name)
		}
	}
}

func BenchmarkRedisAdmit(b *testing.B) {
	server := startRedis(b, "--appendonly", "no")
	for name, address := range map[string]string{"tcp": server.address, "unix": server.socket()} {
		s := openRedis(b, redisModule(b, address))
		var next atomic.Int64
		admission := func() Admission {
			return Admission{
				KeyID: name, RequestID: requestID(int(next.Add(1))),
				Limits:  Limits{RPM: 1 << 40, RPD: 1 << 40, SpendCap: usd, SpendPeriod: PeriodMonth},
				Pending: Event{Model: "openai/gpt-4o", PromptTokens: 100},
			}
		}
		b.Run(name+"/one", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Admit(b.Context(), admission()); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := s.Admit(b.Context(), admission()); err != nil {
						b.Error(err)
					}
				}
			})
		})
		if s.degraded() {
			b.Error("decided without Redis")
		}
	}
}

// TestWhatLookingUpTheKeyTookIsNotWaitedForAgain: timeout is what Redis may take of a request, not of a command.
func TestWhatLookingUpTheKeyTookIsNotWaitedForAgain(t *testing.T) {
	server := startRedis(t)
	for _, refuse := range []string{onFailureDegrade, onFailureRefuse} {
		module := redisModule(t, server.address)
		module.OnFailure = refuse
		s := openRedis(t, module)
		server.client().FlushAll(t.Context())
		verdict, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID(), Waited: s.timeout})
		if refuse == onFailureRefuse && !errors.Is(err, errUnavailable) || refuse == onFailureDegrade && (err != nil || verdict.Refused != "") {
			t.Errorf("%s: %v, %v", refuse, verdict, err)
		}
		if n := s.client.Exists(t.Context(), s.key("key", "account")).Val(); n != 0 {
			t.Errorf("%s: Redis was asked", refuse)
		}
		if _, err := s.Admit(t.Context(), Admission{KeyID: "key", RequestID: newRequestID(), Waited: s.timeout / 2}); err != nil {
			t.Errorf("%s: with half of the time left: %v", refuse, err)
		}
		if n := s.client.Exists(t.Context(), s.key("key", "account")).Val(); n != 1 {
			t.Errorf("%s: Redis was not asked", refuse)
		}
	}
}
