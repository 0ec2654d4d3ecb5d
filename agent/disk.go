package agent

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
)

// A disk is nearly full when it has less left than either, and not any more when
// it has half as much again.
const (
	diskShare = 0.05
	diskBytes = 10 << 30
)

// diskWatch looks at the file system of a directory.
type diskWatch struct{ dir string }

// look returns how many bytes it has, and how many of them are free for the agent.
func (d diskWatch) look() (free, total uint64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(d.dir, &s); err != nil {
		return 0, 0, fmt.Errorf("look at the disk of %s: %w", d.dir, err)
	}
	return s.Bfree * uint64(s.Bsize), s.Blocks * uint64(s.Bsize), nil
}

// judge says whether the disk is nearly full, knowing whether it was.
func (d diskWatch) judge(free, total uint64, was bool) (f api.Finding, changed bool) {
	limit := min(diskShare*float64(total), diskBytes)
	if was {
		limit *= 1.5
	}
	full := float64(free) < limit
	f = api.Finding{Kind: api.FindingNode, Condition: api.ConditionHealthy}
	f.Explanation = fmt.Sprintf("the disk of %s has %s of %s left", d.dir, gigabytes(free), gigabytes(total))
	if full {
		f.Condition = api.ConditionDiskFull
		f.Explanation += ", which is little for checkpoints and logs"
	}
	return f, full != was
}

func gigabytes(bytes uint64) string { return fmt.Sprintf("%.1f GB", float64(bytes)/1e9) }

// diskKey is under what the node's disk is remembered.
const diskKey = "disk"

// lookAtDisk looks and says what has changed.
func (m *monitor) lookAtDisk(now time.Time) {
	free, total, err := m.disk.look()
	if err != nil {
		m.log.Debug("the disk is not looked at", "error", err)
		return
	}
	m.mu.Lock()
	m.node.DiskFree, m.node.DiskBytes = free, total
	m.mu.Unlock()
	was := m.agent.tree.last(diskKey).Condition == api.ConditionDiskFull
	f, changed := m.disk.judge(free, total, was)
	if !changed {
		return
	}
	f.Time, f.Node = now, m.agent.config.Node
	m.log.Warn("disk", "condition", f.Condition, "explanation", f.Explanation)
	if err := m.agent.tree.say(diskKey, f); err != nil {
		m.log.Error("a finding is not told yet", "error", err)
	}
}
