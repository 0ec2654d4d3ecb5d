// Package policy checks what a job asks of the monitor, for who submits it and
// for the controller alike, and says what holds where it asks for nothing.
package policy

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"time"

	"dormouse/api"
)

// What holds where a health check says nothing.
const (
	HealthPeriod  = 10 * time.Second
	HealthTimeout = 5 * time.Second
	HealthRetries = 3
)

// Bounds of what may be asked for.
const (
	leastPeriod = 100 * time.Millisecond  // of a health check
	leastSample = 2500 * time.Millisecond // shorter ones cost more than they tell
	longest     = 24 * time.Hour
	mostRetries = 1000
	longestText = 4096 // of an expression, an address, a command's argument
)

// target is [:PORT]/PATH.
var target = regexp.MustCompile(`^(?::([0-9]{1,5}))?(/[^\s#]*)$`)

// Check refuses what a job cannot ask for, in one sentence.
func Check(spec api.JobSpec) error {
	switch period := milliseconds(spec.StarvationPeriodMS); {
	case spec.OnStarvation != "" && !slices.Contains(api.StarvationPolicies(), spec.OnStarvation):
		return fmt.Errorf("what is done about starvation must be suspend, migrate, notify or ignore, got %q", spec.OnStarvation)
	case spec.StarvationPeriodMS != 0 && (period < leastSample || period > longest):
		return fmt.Errorf("tasks are measured every %s at most and every %s at least, got %s", leastSample, longest, period)
	}
	if err := checkRegex(spec.ProgressRegex); err != nil {
		return err
	}
	if err := checkWebhook(spec.Webhook); err != nil {
		return err
	}
	return checkHealth(spec.Health)
}

func checkRegex(text string) error {
	if len(text) > longestText {
		return fmt.Errorf("the expression for progress has %d characters, at most %d are allowed", len(text), longestText)
	}
	if _, err := regexp.Compile(text); err != nil {
		return fmt.Errorf("the expression for progress is not one that Go's regexp knows: %w", err)
	}
	return nil
}

func checkWebhook(text string) error {
	if text == "" {
		return nil
	}
	at, err := url.Parse(text)
	if err != nil || at.Scheme != "http" && at.Scheme != "https" || at.Hostname() == "" || len(text) > longestText {
		return fmt.Errorf("the webhook must be an http or https address such as https://example.org/hook, got %q", text)
	}
	return nil
}

func checkHealth(h *api.HealthCheck) error {
	if h == nil {
		return nil
	}
	switch {
	case len(h.Command) == 0 && h.HTTP == "":
		return fmt.Errorf("the health check asks nothing: give it a command or an HTTP path")
	case len(h.Command) > 0 && h.HTTP != "":
		return fmt.Errorf("a health check is a command or an HTTP request, not both")
	case len(h.Command) > 0 && h.Command[0] == "":
		return fmt.Errorf("the health check's command names no program")
	case h.Retries < 0 || h.Retries > mostRetries:
		return fmt.Errorf("a health check may fail from 1 to %d times in a row, got %d", mostRetries, h.Retries)
	}
	for _, word := range h.Command {
		if len(word) > longestText {
			return fmt.Errorf("a health check's argument has %d characters, at most %d are allowed", len(word), longestText)
		}
	}
	if h.HTTP != "" {
		if _, err := ParseTarget(h.HTTP); err != nil {
			return err
		}
	}
	for _, d := range []struct {
		what  string
		ms    int64
		least time.Duration
	}{{"period", h.PeriodMS, leastPeriod}, {"timeout", h.TimeoutMS, leastPeriod}, {"start delay", h.StartDelayMS, 0}} {
		if value := milliseconds(d.ms); d.ms != 0 && (value < d.least || value > longest) {
			return fmt.Errorf("the health check's %s must be from %s to %s, got %s", d.what, d.least, longest, value)
		}
	}
	return nil
}

// Target is what a health check by HTTP asks: a port of the task and a path.
type Target struct {
	Port uint16
	Path string
}

// ParseTarget reads [:PORT]/PATH; without a port it is 80.
func ParseTarget(text string) (Target, error) {
	parts, port := target.FindStringSubmatch(text), uint64(80)
	var err error
	if parts != nil && parts[1] != "" {
		port, err = strconv.ParseUint(parts[1], 10, 16)
	}
	if parts == nil || err != nil || port == 0 || len(text) > longestText {
		return Target{}, fmt.Errorf("a health check's HTTP request is [:PORT]/PATH, such as :8080/healthz, got %q", text)
	}
	return Target{uint16(port), parts[2]}, nil
}

// Fill writes into a job's spec what holds where it says nothing.
func Fill(spec *api.JobSpec) {
	if spec.Health == nil {
		return
	}
	h := *spec.Health
	orMilliseconds(&h.PeriodMS, HealthPeriod)
	orMilliseconds(&h.TimeoutMS, HealthTimeout)
	if h.Retries == 0 {
		h.Retries = HealthRetries
	}
	spec.Health = &h
}

func milliseconds(ms int64) time.Duration {
	const most = int64(longest/time.Millisecond) + 1 // a greater one would overflow
	return time.Duration(max(-most, min(ms, most))) * time.Millisecond
}

func orMilliseconds(field *int64, value time.Duration) {
	if *field == 0 {
		*field = value.Milliseconds()
	}
}
