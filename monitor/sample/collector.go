package sample

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// MaxThreads of one task that are read in one round.
const MaxThreads = 1024

// Collector measures one task. It is not safe for concurrent use.
type Collector struct {
	group Group
	proc  string // /proc, or a copy of it
	reader
	threads   threads
	processes map[int]process
	faults    uint64 // major faults of processes, where there is no memory.stat
	read      uint64 // bytes of processes, where the group has no I/O accounting
	written   uint64
	accounts  bool // the group was seen to have I/O accounting: processes need not be asked
}

// process is what was last read of one process.
type process struct {
	majorFaults   uint64
	read, written uint64
}

// NewCollector returns the collector of the task in group. The task need not be
// there yet.
func NewCollector(group Group) *Collector {
	return &Collector{group: group, proc: "/proc", processes: map[int]process{}}
}

// Collect measures the task now. It fails when the task's control group cannot
// be read, with an error that is fs.ErrNotExist when the group is gone.
func (c *Collector) Collect(now time.Time) (Task, error) {
	task := Task{Time: now}
	pids, tids, err := c.members(c.group.members())
	if err != nil {
		return Task{}, fmt.Errorf("cannot measure the task: %w", err)
	}
	if err := c.measureThreads(tids, &task); err != nil {
		return Task{}, fmt.Errorf("cannot measure the task's threads: %w", err)
	}
	if err := c.measureProcesses(pids, &task); err != nil {
		return Task{}, fmt.Errorf("cannot measure the task's processes: %w", err)
	}
	for _, measure := range []func(*Task) error{c.cpu, c.memory, c.io, c.pressures} {
		if err := measure(&task); err != nil {
			return Task{}, fmt.Errorf("cannot measure the task: %w", err)
		}
	}
	return task, nil
}

// members lists the processes and threads in dir and the groups below it.
func (c *Collector) members(dir string) (pids, tids []int, err error) {
	if pids, err = c.numbers(nil, filepath.Join(dir, "cgroup.procs")); err != nil {
		return nil, nil, err
	}
	list := "tasks"
	if c.group.Unified != "" {
		list = "cgroup.threads"
	}
	if tids, err = c.numbers(nil, filepath.Join(dir, list)); err != nil {
		return nil, nil, err
	}
	children, err := subgroups(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, child := range children {
		p, t, err := c.members(child)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		pids, tids = append(pids, p...), append(tids, t...)
	}
	return pids, tids, nil
}

// subgroups of dir. A directory's link count tells whether listing it is worth
// while.
func subgroups(dir string) ([]string, error) {
	var stat syscall.Stat_t
	if err := syscall.Stat(dir, &stat); err != nil {
		return nil, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if stat.Nlink == 2 {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var children []string
	for _, entry := range entries {
		if entry.IsDir() {
			children = append(children, filepath.Join(dir, entry.Name()))
		}
	}
	return children, nil
}

func (c *Collector) numbers(list []int, path string) ([]int, error) {
	text, err := c.reader.read(path)
	if err != nil {
		return nil, err
	}
	lines(text, func(key, _ []byte) {
		if n := number(key); n > 0 {
			list = append(list, int(n))
		}
	})
	return list, nil
}

// optional reads a file of dir that this machine may not have, or whose group
// was not made: then the text is nil. An empty file's is not.
func (c *Collector) optional(dir, name string) ([]byte, error) {
	if dir == "" {
		return nil, nil
	}
	text, err := c.reader.read(filepath.Join(dir, name))
	if gone(err) {
		return nil, nil
	}
	return text, err
}

func (c *Collector) cpu(task *Task) error {
	text, err := c.optional(c.group.Unified, "cpu.stat")
	if err != nil {
		return err
	}
	known := false
	lines(text, func(key, value []byte) {
		switch string(key) {
		case "usage_usec":
			task.CPU, known = microseconds(value), true
		case "throttled_usec":
			task.Throttled = microseconds(value)
		}
	})
	if !known {
		text, err := c.optional(c.group.V1["cpuacct"], "cpuacct.usage")
		if err != nil {
			return err
		}
		if task.CPU = time.Duration(number(text)); len(text) == 0 {
			task.CPU = c.threads.run
		}
	}
	if text, err = c.optional(c.group.Unified, "cpu.max"); err != nil {
		return err
	}
	if len(text) > 0 {
		task.Quota = parseMax(text)
		return nil
	}
	return c.cpuV1(task)
}

func (c *Collector) cpuV1(task *Task) error {
	dir := c.group.V1["cpu"]
	text, err := c.optional(dir, "cpu.stat")
	if err != nil {
		return err
	}
	lines(text, func(key, value []byte) {
		if string(key) == "throttled_time" {
			task.Throttled = time.Duration(number(value))
		}
	})
	if text, err = c.optional(dir, "cpu.cfs_quota_us"); err != nil {
		return err
	}
	quota := string(text)
	if text, err = c.optional(dir, "cpu.cfs_period_us"); err != nil {
		return err
	}
	task.Quota = ratio(quota, string(text))
	return nil
}

func (c *Collector) memory(task *Task) error {
	dir, present, limit, prefix := c.group.Unified, "memory.current", "memory.max", ""
	text, err := c.optional(dir, "memory.stat")
	if err != nil {
		return err
	}
	if text == nil {
		dir, present, limit, prefix = c.group.V1["memory"], "memory.usage_in_bytes", "memory.limit_in_bytes", "total_"
		if text, err = c.optional(dir, "memory.stat"); err != nil {
			return err
		}
	}
	if text == nil {
		task.MajorFaults = c.faults
	}
	lines(text, func(key, value []byte) {
		name, ok := bytes.CutPrefix(key, []byte(prefix))
		if !ok {
			return
		}
		switch string(name) {
		case "pgmajfault":
			task.MajorFaults = number(value)
		case "workingset_refault_anon", "workingset_refault_file":
			task.Refaults += number(value)
		case "swap": // v1; v2 has a file
			task.SwapBytes = number(value)
		}
	})
	if text, err = c.optional(dir, present); err != nil {
		return err
	}
	task.MemoryBytes = number(text)
	if text, err = c.optional(dir, limit); err != nil {
		return err
	}
	// v1 has no word for "no limit": it is the greatest number of whole pages.
	if n := number(text); n < 1<<62 {
		task.MemoryLimit = n
	}
	if text, err = c.optional(c.group.Unified, "memory.swap.current"); err != nil {
		return err
	}
	if len(text) > 0 {
		task.SwapBytes = number(text)
	}
	return nil
}

func (c *Collector) io(task *Task) error {
	text, err := c.optional(c.group.Unified, "io.stat")
	if err != nil {
		return err
	}
	if text != nil { // empty until the first operation
		task.ReadBytes, task.WriteBytes, task.Operations = parseIOStat(text)
		task.BlockAccounting, c.accounts = true, true
		return nil
	}
	dir := c.group.V1["blkio"]
	if text, err = c.optional(dir, "blkio.throttle.io_service_bytes_recursive"); err != nil {
		return err
	}
	if text == nil {
		task.ReadBytes, task.WriteBytes = c.read, c.written
		return nil
	}
	task.ReadBytes, task.WriteBytes = parseBlkio(text)
	task.BlockAccounting, c.accounts = true, true
	if text, err = c.optional(dir, "blkio.throttle.io_serviced_recursive"); err != nil {
		return err
	}
	reads, writes := parseBlkio(text)
	task.Operations = reads + writes
	return nil
}

func (c *Collector) pressures(task *Task) error {
	for _, resource := range []struct {
		file string
		to   *Pressure
	}{
		{"cpu.pressure", &task.Pressure.CPU},
		{"memory.pressure", &task.Pressure.Memory},
		{"io.pressure", &task.Pressure.IO},
	} {
		text, err := c.optional(c.group.Unified, resource.file)
		if err != nil {
			return err
		}
		if len(text) > 0 {
			task.PSI = true
			*resource.to = pressure(text)
		}
	}
	text, err := c.optional(c.group.Unified, "cgroup.events")
	if err != nil {
		return err
	}
	task.Frozen = bytes.Contains(text, []byte("frozen 1"))
	return nil
}

// measureProcesses reads what only whole processes have: state, faults, bytes.
func (c *Collector) measureProcesses(pids []int, task *Task) error {
	var used, stopped time.Duration
	seen := make(map[int]process, len(pids))
	for _, pid := range pids {
		dir := c.proc + "/" + strconv.Itoa(pid)
		text, err := c.reader.read(dir + "/stat")
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		stat, ok := parseStat(text)
		if !ok || stat.state == 'Z' || stat.state == 'X' {
			continue
		}
		task.Processes++
		used += stat.cpu
		if stat.state == 'T' || stat.state == 't' {
			task.Stopped++
			stopped += stat.cpu
		}
		now := process{majorFaults: stat.majorFaults}
		if !c.accounts {
			if now.read, now.written, err = c.processIO(dir); err != nil {
				return err
			}
		}
		c.gained(c.processes[pid], now)
		seen[pid] = now
	}
	c.processes = seen
	if used > 0 {
		task.StoppedShare = float64(stopped) / float64(used)
	}
	return nil
}

func (c *Collector) processIO(dir string) (read, written uint64, err error) {
	text, err := c.reader.read(dir + "/io")
	if gone(err) || os.IsPermission(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	lines(text, func(key, value []byte) {
		switch string(key) {
		case "read_bytes:":
			read = number(value)
		case "write_bytes:":
			written = number(value)
		}
	})
	return read, written, nil
}

// gained adds what a process did since it was last read.
func (c *Collector) gained(last, now process) {
	c.faults += since(last.majorFaults, now.majorFaults)
	c.read += since(last.read, now.read)
	c.written += since(last.written, now.written)
}

// since is what a counter gained. One that went back belongs to a newcomer under
// an old number: all of it is new.
func since(last, now uint64) uint64 {
	if now < last {
		return now
	}
	return now - last
}
