package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// humanSize words bytes in binary units, with three significant digits.
func humanSize(bytes int64) string {
	const unit = 1024
	if bytes < unit {
		return fmt.Sprintf("%d B", bytes)
	}
	value, exponent := float64(bytes)/unit, 0
	for value >= 999.5 && exponent < len("KMGTPE")-1 {
		value /= unit
		exponent++
	}
	digits := 2
	if value >= 9.995 {
		digits = 1
	}
	if value >= 99.95 {
		digits = 0
	}
	return fmt.Sprintf("%.*f %ciB", digits, value, "KMGTPE"[exponent])
}

// parseSize reads 1048576, 512M, 2G, 1GiB or 1.5g. All units are binary, as in
// every tool that limits memory.
func parseSize(text string) (int64, error) {
	number, unit := strings.TrimSpace(text), int64(1)
	lower := strings.ToLower(number)
	for i, letter := range "kmgt" {
		for _, suffix := range []string{"ib", "b", ""} {
			if cut, ok := strings.CutSuffix(lower, string(letter)+suffix); ok {
				lower, unit = cut, int64(1)<<(10*(i+1))
			}
		}
	}
	if unit == 1 {
		lower = strings.TrimSuffix(lower, "b")
	}
	value, err := strconv.ParseFloat(strings.TrimSpace(lower), 64)
	if err != nil || math.IsNaN(value) || math.IsInf(value, 0) || strings.ContainsAny(lower, "xXpP_") {
		return 0, fmt.Errorf("%q is not a size such as 512M, 2G or 1GiB", text)
	}
	if value < 0 {
		return 0, fmt.Errorf("the size %s is negative", text)
	}
	bytes := value * float64(unit)
	if bytes >= math.MaxInt64 {
		return 0, fmt.Errorf("the size %s is larger than any machine", text)
	}
	return int64(bytes), nil
}

// sizeFlag is a flag that takes a size.
type sizeFlag struct{ bytes *int64 }

func (s sizeFlag) String() string {
	if s.bytes == nil || *s.bytes == 0 {
		return ""
	}
	return humanSize(*s.bytes)
}

func (s sizeFlag) Set(text string) error {
	bytes, err := parseSize(text)
	if err != nil {
		return err
	}
	*s.bytes = bytes
	return nil
}

func (s sizeFlag) Type() string { return "size" }

// parseMilliseconds reads a duration such as 90s or 2h.
func parseMilliseconds(text string) (int64, error) {
	d, err := time.ParseDuration(strings.TrimSpace(text))
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration such as 30m or 2h", text)
	}
	if d <= 0 {
		return 0, fmt.Errorf("the duration %s is not more than nothing", text)
	}
	return max(d.Milliseconds(), 1), nil
}

// durationFlag is a flag that takes a duration and keeps it in milliseconds.
type durationFlag struct{ ms *int64 }

func (d durationFlag) String() string {
	if d.ms == nil || *d.ms == 0 {
		return ""
	}
	return (time.Duration(*d.ms) * time.Millisecond).String()
}

func (d durationFlag) Set(text string) error {
	ms, err := parseMilliseconds(text)
	if err != nil {
		return err
	}
	*d.ms = ms
	return nil
}

func (d durationFlag) Type() string { return "duration" }

// humanAge words a time in the past by its largest unit.
func humanAge(age time.Duration) string {
	switch {
	case age < 0:
		return "0s"
	case age < 2*time.Minute:
		return fmt.Sprintf("%ds", int(age.Seconds()))
	case age < 2*time.Hour:
		return fmt.Sprintf("%dm", int(age.Minutes()))
	case age < 48*time.Hour:
		return fmt.Sprintf("%dh", int(age.Hours()))
	}
	return fmt.Sprintf("%dd", int(age.Hours()/24))
}

// humanMS words a duration in milliseconds.
func humanMS(ms float64) string {
	switch {
	case ms <= 0:
		return "-"
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.2f s", ms/1000)
}

func (c *cli) age(then time.Time) string {
	if then.IsZero() {
		return "-"
	}
	return humanAge(c.now().Sub(then))
}
