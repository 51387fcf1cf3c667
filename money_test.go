package mesh

import (
	"encoding/json"
	"math"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestMoneyReadsDecimalAmounts(t *testing.T) {
	amounts := map[string]Money{
		"0":                    0,
		"0.0":                  0,
		"2.50":                 2_500_000_000,
		"25":                   25 * usd,
		"007.010":              7_010_000_000,
		"0.000000001":          1,
		"0.100000000":          100_000_000,
		"9223372036.854775807": math.MaxInt64,
	}
	for text, want := range amounts {
		if got, err := ParseMoney(text); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
}

func TestMoneyRefusesWhatIsNoAmount(t *testing.T) {
	for _, text := range []string{
		"", ".", "1.", ".5", "-1", "+1", "1e3", "1,000", "1.2.3", " 1", "1 ", "$1", "1_0", "0x1", "NaN", "Inf", "١", "1-2",
		"0.0000000001", "0.0000000000", "9223372036.854775808", "9223372037", strings.Repeat("9", 400),
	} {
		if got, err := ParseMoney(text); err == nil {
			t.Errorf("%q was read as %d", text, got)
		}
	}
}

func TestMoneyIsWrittenAsShortAsItIsExact(t *testing.T) {
	written := map[Money]string{
		0:                     "0",
		1:                     "0.000000001",
		usd:                   "1",
		2_500_000_000:         "2.5",
		10 * usd:              "10",
		1_000_000_010:         "1.00000001",
		-1:                    "-0.000000001",
		-2_500_000_000:        "-2.5",
		math.MaxInt64:         "9223372036.854775807",
		math.MinInt64:         "-9223372036.854775808",
		123_456_789_000_000:   "123456.789",
		9_000_000_000_000_000: "9000000",
	}
	for m, want := range written {
		if got := m.String(); got != want {
			t.Errorf("%d nano-dollars are written %s, want %s", int64(m), got, want)
		}
	}
}

func TestMoneyInJSONIsADecimalString(t *testing.T) {
	var price struct{ Input Money }
	if err := json.Unmarshal([]byte(`{"Input":"2.50"}`), &price); err != nil || price.Input != 2_500_000_000 {
		t.Fatalf("read %d, %v", price.Input, err)
	}
	if got, err := json.Marshal(price); err != nil || string(got) != `{"Input":"2.5"}` {
		t.Errorf("written as %s, %v", got, err)
	}
	if err := json.Unmarshal([]byte(`{"Input":"cheap"}`), &price); err == nil {
		t.Error("an amount that is none was accepted")
	}
}

func FuzzMoneySurvivesWritingAndReading(f *testing.F) {
	for _, n := range []int64{0, 1, 999_999_999, 1_000_000_000, math.MaxInt64} {
		f.Add(n, "1.5")
	}
	f.Fuzz(func(t *testing.T, n int64, text string) {
		if n >= 0 {
			if back, err := ParseMoney(Money(n).String()); err != nil || back != Money(n) {
				t.Errorf("%d was written %s and read %d, %v", n, Money(n), back, err)
			}
		}
		m, err := ParseMoney(text)
		if err != nil {
			return
		}
		exact, ok := new(big.Rat).SetString(text)
		if !ok || exact.Mul(exact, big.NewRat(1e9, 1)).Cmp(new(big.Rat).SetInt64(int64(m))) != 0 {
			t.Errorf("%q was read as %d nano-dollars", text, m)
		}
	})
}

func TestMoneyAdditionStopsAtTheLargestAmount(t *testing.T) {
	sums := []struct{ a, b, want Money }{
		{0, 0, 0},
		{1, 2, 3},
		{math.MaxInt64, 0, math.MaxInt64},
		{math.MaxInt64 - 1, 1, math.MaxInt64},
		{math.MaxInt64, 1, math.MaxInt64},
		{math.MaxInt64, math.MaxInt64, math.MaxInt64},
	}
	for _, s := range sums {
		if got := s.a.plus(s.b); got != s.want {
			t.Errorf("%d + %d = %d, want %d", s.a, s.b, got, s.want)
		}
	}
}

func TestCostRoundsHalfANanoDollarUp(t *testing.T) {
	costs := []struct {
		tokens     int64
		perMillion Money
		want       Money
	}{
		{1, 499_999, 0},
		{1, 500_000, 1},
		{1, 1_499_999, 1},
		{1, 1_500_000, 2},
		{3, 500_000, 2}, // 1.5
		{1_000_000, 2_500_000_000, 2_500_000_000},
		{7, 150_000_000, 1_050}, // 7 tokens at 0.15 USD
		{0, usd, 0},
		{-5, usd, 0},
		{5, -usd, 0},
	}
	for _, c := range costs {
		var cost tokenCost
		cost.add(c.tokens, c.perMillion)
		if got := cost.round(); got != c.want {
			t.Errorf("%d tokens at %d nano-dollars a million cost %d, want %d", c.tokens, c.perMillion, got, c.want)
		}
	}
}

func TestCostRoundsTheSumAndNotItsParts(t *testing.T) {
	var cost tokenCost
	for range 4 {
		cost.add(1, 250_000) // a quarter of a nano-dollar each
	}
	if got := cost.round(); got != 1 {
		t.Errorf("four quarters of a nano-dollar are %d", got)
	}
}

func TestCostAgreesWithBigIntegers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	million, half := big.NewInt(1_000_000), big.NewInt(500_000)
	for range 20_000 {
		var cost tokenCost
		exact := new(big.Int)
		for range 1 + random.IntN(4) {
			// of every magnitude, so that some do not fit
			tokens, price := random.Int64()>>random.IntN(63), random.Int64()>>random.IntN(63)
			cost.add(tokens, Money(price))
			exact.Add(exact, new(big.Int).Mul(big.NewInt(tokens), big.NewInt(price)))
		}
		want := Money(math.MaxInt64)
		if rounded := exact.Div(exact.Add(exact, half), million); rounded.IsInt64() {
			want = Money(rounded.Int64())
		}
		if got := cost.round(); got != want {
			t.Fatalf("%+v rounds to %d, want %d", cost, got, want)
		}
	}
}

func TestCostStopsAtTheLargestAmount(t *testing.T) {
	const most = Money(math.MaxInt64)
	var cost tokenCost
	for range 4 { // to just below 2¹²⁸
		cost.add(math.MaxInt64, most)
	}
	if got := cost.round(); got != most {
		t.Errorf("four of the largest cost %d", got)
	}
	if cost.add(1<<33, 1<<33); cost.round() != most { // would begin anew at 4
		t.Errorf("the sum wrapped around to %+v", cost)
	}
	for _, tokens := range []int64{999_999, 1_000_000, 1_000_001} {
		var cost tokenCost
		cost.add(tokens, most)
		want := most
		if tokens < 1_000_000 {
			want = most - most/1_000_000 - 1
		}
		if got := cost.round(); got != want {
			t.Errorf("%d tokens at the highest price cost %d, want %d", tokens, got, want)
		}
	}
}
