package criu

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
)

// TestDumpsFromInsideOfTheNetwork: a CRIU that knows the kernel runs in the task's
// network, which it then does not lock; what it writes is restored as what one
// outside of it writes.
func TestDumpsFromInsideOfTheNetwork(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "tcp")
	s.moreLines(2)
	for _, inside := range []bool{false, true} {
		r := s.request()
		r.LeaveRunning = true
		var events []Event
		r.Notify = func(_ context.Context, event Event, _ int) error {
			events = append(events, event)
			return nil
		}
		mustDump(t, s, r)
		if locked := slices.Contains(events, "network-lock"); locked == inside {
			t.Errorf("the dump came from inside: %v, expected %v", !locked, inside)
		}
		s.kill()
		s = s.restore(r.ImagesDir)
		s.moreLines(3)
	}
}

func TestBrokenInventories(t *testing.T) {
	inventory := []byte{0x16, 0x31, 0x31, 0x58}
	for _, image := range [][]byte{nil, inventory[:3], inventory, append(bytes.Clone(inventory), 9, 0, 0, 0, 1), {1, 2, 3, 4, 0, 0, 0, 0}} {
		if _, _, err := withoutNet(image); !errors.Is(err, errBadImage) {
			t.Errorf("% x: got %v, expected a bad image", image, err)
		}
	}
}
