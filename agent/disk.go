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
func (d diskWatch) look() (free, total uint64, id unix.Fsid, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(d.dir, &s); err != nil {
		return 0, 0, id, fmt.Errorf("look at the disk of %s: %w", d.dir, err)
	}
	return s.Bfree * uint64(s.Bsize), s.Blocks * uint64(s.Bsize), s.Fsid, nil
}

// judge says whether the disk is nearly full, knowing whether the node had one that was.
func (d diskWatch) judge(free, total uint64, was bool) api.Finding {
	limit := min(diskShare*float64(total), diskBytes)
	if was {
		limit *= 1.5
	}
	full := float64(free) < limit
	f := api.Finding{Kind: api.FindingNode, Condition: api.ConditionHealthy}
	f.Explanation = fmt.Sprintf("the disk of %s has %s of %s left", d.dir, gigabytes(free), gigabytes(total))
	if full {
		f.Condition = api.ConditionDiskFull
		f.Explanation += ", which is little for checkpoints and logs"
	}
	return f
}

func gigabytes(bytes uint64) string { return fmt.Sprintf("%.1f GB", float64(bytes)/1e9) }

// diskKey is under what the node's disks are remembered.
const diskKey = "disk"

// lookAtDisks looks at each disk once, the one of the state first, and says what
// has changed: whether any is nearly full.
func (m *monitor) lookAtDisks(now time.Time) {
	said := m.agent.tree.last(diskKey)
	was := said.Condition == api.ConditionDiskFull
	var found []api.Finding
	seen := map[unix.Fsid]bool{}
	for i, d := range m.disks {
		free, total, id, err := d.look()
		if err != nil {
			m.log.Debug("a disk is not looked at", "error", err)
			continue
		}
		if i == 0 {
			m.mu.Lock()
			m.node.DiskFree, m.node.DiskBytes = free, total
			m.mu.Unlock()
		}
		if !seen[id] {
			seen[id] = true
			found = append(found, d.judge(free, total, was))
		}
	}
	f, changed := worstDisk(found, was)
	if !changed {
		return
	}
	f.Time, f.Node = now, m.agent.config.Node
	m.log.Warn("disk", "condition", f.Condition, "explanation", f.Explanation)
	if err := m.agent.tree.say(diskKey, f); err != nil {
		m.log.Error("a finding is not told yet", "error", err)
	}
}

// worstDisk joins what was found of the disks, and reports whether it is new.
func worstDisk(found []api.Finding, was bool) (worst api.Finding, changed bool) {
	for i, f := range found {
		if i == 0 || f.Condition == api.ConditionDiskFull && worst.Condition != api.ConditionDiskFull {
			worst = f
		}
	}
	return worst, len(found) > 0 && (worst.Condition == api.ConditionDiskFull) != was
}
