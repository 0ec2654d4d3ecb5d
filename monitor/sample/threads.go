package sample

import (
	"strconv"
	"time"
)

// threads sums what the kernel only knows of each living thread.
type threads struct {
	last       map[int]thread
	turn       int // the first thread of the next round, where there are too many
	run, delay time.Duration
	block      time.Duration
	switches   uint64
}

// thread is what was last read of one thread.
type thread struct {
	run, delay, slices uint64 // schedstat
	state              byte
	block              time.Duration
}

// measureThreads reads every thread, or as many as one round may, and adds what
// each has gained.
func (c *Collector) measureThreads(tids []int, task *Task) error {
	t := &c.threads
	seen := make(map[int]thread, len(tids))
	for i, tid := range tids {
		last, known := t.last[tid]
		if known && !t.due(i, len(tids)) {
			seen[tid] = last
			continue
		}
		now, err := c.thread(tid, last, known)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		t.gained(last, now)
		seen[tid] = now
	}
	t.last = seen
	if len(tids) > 0 {
		t.turn = (t.turn + MaxThreads) % len(tids)
	}
	for _, one := range seen {
		task.count(one.state)
	}
	task.Delay, task.BlockDelay, task.Switches = t.delay, t.block, t.switches
	return nil
}

// due reports whether the i-th of n threads is read in this round. A thread
// never read before always is, so that its state is known.
func (t *threads) due(i, n int) bool {
	if n <= MaxThreads {
		return true
	}
	return (i-t.turn+n)%n < MaxThreads
}

// thread reads one. Its state is read only if it has run since: a thread that
// has not run cannot have gone to sleep, stopped or blocked.
func (c *Collector) thread(tid int, last thread, known bool) (thread, error) {
	dir := c.proc + "/" + strconv.Itoa(tid)
	text, err := c.reader.read(dir + "/schedstat")
	if err != nil {
		return thread{}, err
	}
	now := thread{state: last.state, block: last.block}
	var ok bool
	now.run, now.delay, now.slices, ok = parseSchedstat(text)
	if ok && known && now == last {
		return now, nil
	}
	// Below task/ the figures are the thread's own, not the process's.
	if text, err = c.reader.read(dir + "/task/" + strconv.Itoa(tid) + "/stat"); err != nil {
		return thread{}, err
	}
	if stat, ok := parseStat(text); ok {
		now.state, now.block = stat.state, stat.blockDelay
	}
	return now, nil
}

func (t *threads) gained(last, now thread) {
	if now.run < last.run { // another thread under the same number
		last = thread{}
	}
	t.run += time.Duration(since(last.run, now.run))
	t.delay += time.Duration(since(last.delay, now.delay))
	t.block += time.Duration(since(uint64(last.block), uint64(now.block)))
	t.switches += since(last.slices, now.slices)
}

func (task *Task) count(state byte) {
	switch state {
	case 'Z', 'X':
		return
	case 'R':
		task.Running++
	case 'D':
		task.Blocked++
	case 'S', 'I':
		task.Sleeping++
	}
	task.Threads++
}
