package interval

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
)

// Auto is the text of the policy that chooses the interval itself.
const Auto = "auto"

// Shortest and Longest bound a fixed interval.
const (
	Shortest = time.Second
	Longest  = 366 * 24 * time.Hour
)

// Policy says when a job is checkpointed by itself. The zero Policy says never.
type Policy struct {
	text     string
	auto     bool
	every    time.Duration // fixed; 0: not so
	schedule cron.Schedule // nil: not so
}

// zoned are the ways to name a time zone in a cron line.
var zoned = regexp.MustCompile(`^(CRON_)?TZ=`)

// Parse reads a duration such as 10m, a cron line of five fields such as
// "0 * * * *" or a name such as @hourly, both in UTC, or auto. Nothing is the
// zero Policy.
func Parse(text string) (Policy, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Policy{}, nil
	case text == Auto:
		return Policy{text: text, auto: true}, nil
	case strings.ContainsRune(text, ' ') || strings.HasPrefix(text, "@"):
		return parseSchedule(text)
	}
	every, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return Policy{}, fmt.Errorf("%q is neither a duration such as 10m, nor a cron line such as \"0 * * * *\", nor auto", text)
	case every < Shortest || every > Longest:
		return Policy{}, fmt.Errorf("a job is checkpointed every %s at the most and every %s at the least, not every %s", Short(Shortest), Short(Longest), text)
	}
	return Policy{text: text, every: every}, nil
}

func parseSchedule(text string) (Policy, error) {
	if zoned.MatchString(text) {
		return Policy{}, fmt.Errorf("the cron line %q names a time zone, but all are in UTC", text)
	}
	if strings.HasPrefix(text, "@every") {
		return Policy{}, fmt.Errorf("%q is a fixed interval: write it as a duration such as 10m", text)
	}
	schedule, err := cron.ParseStandard(text)
	if err != nil {
		return Policy{}, fmt.Errorf("the cron line %q cannot be read: %w", text, err)
	}
	p := Policy{text: text, schedule: schedule}
	if p.tick(time.Unix(0, 0)).IsZero() { // the 30th of February
		return Policy{}, errors.New("the cron line \"" + text + "\" names a time that never comes")
	}
	return p, nil
}

// String is the policy as it was written.
func (p Policy) String() string { return p.text }

// IsZero reports whether the job is never checkpointed by itself.
func (p Policy) IsZero() bool { return p.text == "" }

// tick is the schedule's first time after t.
func (p Policy) tick(t time.Time) time.Time { return p.schedule.Next(t.UTC()) }
