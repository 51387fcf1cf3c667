package mesh

import (
	"bytes"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Money is an amount in nano-dollars (10⁻⁹ USD). It is never a float.
type Money int64

const usd Money = 1_000_000_000

// ParseMoney reads a decimal amount of USD, such as "2.50". It refuses a sign, an exponent, more than nine decimals
// and amounts that do not fit.
func ParseMoney(s string) (Money, error) {
	whole, fraction, hasPoint := strings.Cut(s, ".")
	if whole == "" || hasPoint && fraction == "" || strings.Trim(whole+fraction, "0123456789") != "" {
		return 0, fmt.Errorf("%q is not a decimal amount of USD, such as 2.50", s)
	}
	if len(fraction) > 9 {
		return 0, fmt.Errorf("%q has more than nine decimals", s)
	}
	n, err := strconv.ParseInt(whole+fraction+strings.Repeat("0", 9-len(fraction)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is too large an amount", s)
	}
	return Money(n), nil
}

// String returns the amount as a decimal number of USD, as short as it can be without rounding.
func (m Money) String() string { return string(m.append(nil)) }

// append appends the amount as String returns it.
func (m Money) append(b []byte) []byte {
	n := uint64(m)
	if m < 0 {
		b, n = append(b, '-'), -n
	}
	b = strconv.AppendUint(b, n/uint64(usd), 10)
	fraction := n % uint64(usd)
	if fraction == 0 {
		return b
	}
	point := len(b)
	b = strconv.AppendUint(b, uint64(usd)+fraction, 10) // with a 1 in front, for the zeros behind the point
	b[point] = '.'
	return bytes.TrimRight(b, "0")
}

// thousandth returns a thousandth of m, exactly.
func (m Money) thousandth() string {
	digits := fmt.Sprintf("%013d", int64(m)) // 10⁻¹² USD
	whole, fraction := digits[:len(digits)-12], strings.TrimRight(digits[len(digits)-12:], "0")
	if fraction == "" {
		return whole
	}
	return whole + "." + fraction
}

// MarshalText writes the amount as String does.
func (m Money) MarshalText() ([]byte, error) { return m.append(nil), nil }

// UnmarshalText reads what ParseMoney reads.
func (m *Money) UnmarshalText(text []byte) (err error) {
	*m, err = ParseMoney(string(text))
	return err
}

// plus is saturating addition of amounts that are not negative.
func (m Money) plus(n Money) Money {
	if m > math.MaxInt64-n {
		return math.MaxInt64
	}
	return m + n
}

// tokenCost is an exact sum of tokens times prices, before it is rounded to nano-dollars. It is a 128-bit number of
// millionths of a nano-dollar, because prices are per million tokens. It saturates.
type tokenCost struct{ hi, lo uint64 }

// add adds tokens at a price per million of them.
func (c *tokenCost) add(tokens int64, perMillion Money) {
	if tokens <= 0 || perMillion <= 0 {
		return
	}
	hi, lo := bits.Mul64(uint64(tokens), uint64(perMillion))
	var carry uint64
	c.lo, carry = bits.Add64(c.lo, lo, 0)
	if c.hi, carry = bits.Add64(c.hi, hi, carry); carry != 0 {
		c.hi, c.lo = math.MaxUint64, math.MaxUint64
	}
}

// addEach adds n times a price of one.
func (c *tokenCost) addEach(n int64, price Money) { c.add(n*1_000_000, price) }

// round returns the sum to the nearest nano-dollar, halves up.
func (c tokenCost) round() Money {
	const million = 1_000_000
	if c.hi >= million/2 { // 2⁶³ nano-dollars or more
		return math.MaxInt64
	}
	lo, carry := bits.Add64(c.lo, million/2, 0)
	quotient, _ := bits.Div64(c.hi+carry, lo, million)
	return Money(min(quotient, math.MaxInt64))
}
