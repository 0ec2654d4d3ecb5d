package agent

import (
	"testing"

	"dormouse/agent/sandbox"
)

func TestAnExcuseIsForAllTimeItTouches(t *testing.T) {
	var e excuses
	takes := func(want string) {
		t.Helper()
		if got := e.take(); got != want {
			t.Errorf("the excuse is %q, want %q", got, want)
		}
	}
	takes("")
	e.begin("a")() // began and ended between two samples
	takes("a")
	takes("")
	end, again := e.begin("a"), e.begin("a")
	takes("a")
	end()
	end()
	takes("a") // the second lasts
	takes("a")
	again()
	takes("a")
	takes("")
}

func TestWhyATaskStandsStill(t *testing.T) {
	for _, c := range []struct {
		record record
		want   string
	}{
		{record{}, ""},
		{record{Holds: []string{holdLease}}, excuseLease},
		{record{Holds: []string{holdLease, holdCheckpoint}}, excuseCheckpoint},
		{record{Checkpoint: "c-1"}, excuseCheckpoint},
		{record{Stopped: true}, excuseStopped},
	} {
		task := newTask(t.TempDir(), c.record)
		task.setBox(&sandbox.Sandbox{})
		task.excuses.begin("something else")()
		if got := task.standsStill(); got != c.want {
			t.Errorf("%+v stands still because %q, want %q", c.record, got, c.want)
		}
		want := c.want
		if want == "" {
			want = "something else"
		}
		if got := task.excuse(); got != want {
			t.Errorf("%+v is excused by %q, want %q", c.record, got, want)
		}
	}
}
