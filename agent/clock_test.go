package agent

import (
	"testing"
	"time"
)

func TestTheQuickestAnswerTellsTheControllersClock(t *testing.T) {
	var c controllerClock
	if off := time.Until(c.now()).Abs(); off > time.Second {
		t.Errorf("before any answer the clock is off by %s", off)
	}
	ahead := 5 * time.Minute
	now := bootTime()
	at := func(boot time.Duration) time.Time { return time.Now().Add(boot - bootTime() + ahead) }
	c.read(at(now-time.Second), now-40*time.Second, now-time.Second) // it came late: off by half of the trip
	c.read(at(now-500*time.Millisecond), now-501*time.Millisecond, now-499*time.Millisecond)
	c.read(at(now), now-10*time.Second, now)
	if off := (time.Until(c.now()) - ahead).Abs(); off > 2*time.Second {
		t.Errorf("the clock is off by %s", off)
	}
	c.connected()
	if off := (time.Until(c.now()) - ahead).Abs(); off > 2*time.Second {
		t.Errorf("before the new controller answered the clock is off by %s", off)
	}
	for range 2 {
		c.read(at(now).Add(time.Hour), now-time.Second, now)
	}
	if off := (time.Until(c.now()) - ahead - time.Hour).Abs(); off > 2*time.Second {
		t.Errorf("the new controller is not believed: the clock is off by %s", off)
	}
}
