package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// With CONFIG_RT_GROUP_SCHED every v1 cpu group has its own share of the time for
// real-time threads, none at first, so that sched_setscheduler(2) fails in it. A
// group's share is taken from its parent's, down from the machine's own
// (sched_rt_runtime_us), so each level above has to be raised by what one more
// group needs, and lowered when the group goes.

const realtimeFile = "cpu.rt_runtime_us"

// realtimeShare is a group's share, in microseconds per second.
const realtimeShare = 50_000

// allowRealtime gives the group dir in the hierarchy at mount its share, and
// reports whether there was one. That there is none is no error: the capability
// is good for more than this.
func allowRealtime(mount, dir string) bool {
	levels := levelsBetween(mount, dir)
	for i, level := range levels {
		if addRealtime(level, realtimeShare) {
			continue
		}
		for _, raised := range levels[:i] {
			addRealtime(raised, -realtimeShare)
		}
		return false
	}
	return true
}

// returnRealtime takes back what allowRealtime gave to dir, if it still has it.
// It comes before dir is removed: a removed group counts for a while.
func returnRealtime(dir string) {
	for addRealtime(dir, -realtimeShare) {
		dir = filepath.Dir(dir)
	}
}

// levelsBetween are the groups from below mount down to dir.
func levelsBetween(mount, dir string) []string {
	var levels []string
	for name := range strings.SplitSeq(strings.TrimPrefix(dir, mount+"/"), "/") {
		mount = filepath.Join(mount, name)
		levels = append(levels, mount)
	}
	return levels
}

// addRealtime changes the share of one group. Another agent may be doing the
// same to a group above both: the kernel refuses a share that does not add up,
// and then it is read again.
func addRealtime(dir string, change int64) bool {
	if isMount(dir) {
		return false
	}
	for range 10 {
		content, err := os.ReadFile(filepath.Join(dir, realtimeFile))
		if err != nil {
			return false
		}
		now, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
		if err != nil || now < 0 || now+change < 0 {
			return false
		}
		if write(dir, realtimeFile, strconv.FormatInt(now+change, 10)) == nil {
			return true
		}
	}
	return false
}

// isMount reports whether dir is the root of its hierarchy, whose share is the
// machine's own. Only there is a release_agent.
func isMount(dir string) bool { return exists(filepath.Join(dir, "release_agent")) }
