package main

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"math/big"
	"sort"
	"strings"
)

const digitsPerLine = 50

// piLines returns what pi.py prints, computed another way: by Machin's formula,
// pi = 16 arctan(1/5) - 4 arctan(1/239), in fixed point.
func piLines(lines int) string {
	digits := lines * digitsPerLine
	const guard = 20
	one := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(digits+guard)), nil)
	pi := new(big.Int).Sub(
		new(big.Int).Mul(big.NewInt(16), arctanInverse(5, one)),
		new(big.Int).Mul(big.NewInt(4), arctanInverse(239, one)))
	text := pi.String()[:digits]
	var out strings.Builder
	for line := range lines {
		fmt.Fprintln(&out, line+1, text[line*digitsPerLine:(line+1)*digitsPerLine])
	}
	return out.String()
}

// arctanInverse returns arctan(1/x) times one.
func arctanInverse(x int64, one *big.Int) *big.Int {
	square := big.NewInt(x * x)
	term := new(big.Int).Div(one, big.NewInt(x))
	sum := new(big.Int).Set(term)
	for k := int64(3); term.Sign() != 0; k += 2 {
		term.Div(term, square)
		step := new(big.Int).Div(term, big.NewInt(k))
		if k%4 == 3 {
			step.Neg(step)
		}
		sum.Add(sum, step)
	}
	return sum
}

// entry returns the i-th key and value of the data set.
func entry(i int) (key, value string) {
	sum := sha1.Sum(fmt.Appendf(nil, "value %d", i))
	return fmt.Sprintf("user:%06d", i), hex.EncodeToString(sum[:]) + strings.Repeat("-", i%64)
}

// dataSet returns count entries as the Redis protocol's SET commands.
func dataSet(count int) string {
	var out strings.Builder
	for i := range count {
		key, value := entry(i)
		fmt.Fprintf(&out, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(key), key, len(value), value)
	}
	return out.String()
}

// digestScript is digest as a script that redis runs over what it holds.
const digestScript = `
local keys = redis.call('KEYS', '*')
table.sort(keys)
local digest = ''
for _, key in ipairs(keys) do
  digest = redis.sha1hex(digest .. key .. '=' .. redis.call('GET', key))
end
return #keys .. ' ' .. digest`

// digest returns what digestScript must answer for the data set.
func digest(count int) string {
	keys := make([]string, count)
	values := make(map[string]string, count)
	for i := range count {
		key, value := entry(i)
		keys[i], values[key] = key, value
	}
	sort.Strings(keys)
	sum := ""
	for _, key := range keys {
		h := sha1.Sum([]byte(sum + key + "=" + values[key]))
		sum = hex.EncodeToString(h[:])
	}
	return fmt.Sprintf("%d %s", count, sum)
}
