package agent

import (
	"sync"
	"time"
)

// clockReadings is how many answers of the controller are compared.
const clockReadings = 16

// controllerClock is the controller's clock as its answers to heartbeats show it:
// an answer was given at some moment between its heartbeat and its arrival, so the
// quickest of the last ones is the most exact (Mills, RFC 5905, section 10). Until
// there is one it is this node's own.
type controllerClock struct {
	mu       sync.Mutex
	readings []clockReading
	other    bool // they may be another controller's
}

// clockReading is one answer.
type clockReading struct {
	trip   time.Duration // from the heartbeat to the answer
	booted time.Time     // when this node booted, by the controller's clock
}

// read takes the answer to a heartbeat of boot time sent.
func (c *controllerClock) read(clock time.Time, sent, received time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.other {
		c.readings, c.other = nil, false
	}
	c.readings = append(c.readings, clockReading{received - sent, clock.Add(-(sent + received) / 2)})
	if len(c.readings) > clockReadings {
		c.readings = c.readings[1:]
	}
}

// connected says that the next answer is of a new connection: the earlier ones
// are good until it comes.
func (c *controllerClock) connected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.other = true
}

func (c *controllerClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.readings) == 0 {
		return time.Now()
	}
	best := c.readings[0]
	for _, r := range c.readings[1:] {
		if r.trip < best.trip {
			best = r
		}
	}
	return best.booted.Add(bootTime())
}
