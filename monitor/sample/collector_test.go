package sample

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// machine is a made-up one: directories that look like control groups and /proc.
type machine struct {
	t    interface{ Fatal(...any) }
	root string
}

func newMachine(t *testing.T) *machine { return &machine{t, t.TempDir()} }

func (m *machine) file(path, text string) {
	path = filepath.Join(m.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) thread(tid int, schedstat, stat string) {
	dir := "proc/" + strconv.Itoa(tid)
	m.file(dir+"/schedstat", schedstat)
	m.file(dir+"/task/"+strconv.Itoa(tid)+"/stat", stat)
	m.file(dir+"/stat", stat)
}

func (m *machine) remove(path string) {
	if err := os.RemoveAll(filepath.Join(m.root, path)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) collector(group Group) *Collector {
	below := Group{V1: map[string]string{}}
	if group.Unified != "" {
		below.Unified = filepath.Join(m.root, group.Unified)
	}
	for controller, dir := range group.V1 {
		below.V1[controller] = filepath.Join(m.root, dir)
	}
	c := NewCollector(below)
	c.proc = filepath.Join(m.root, "proc")
	return c
}

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func (m *machine) collect(c *Collector) Task {
	task, err := c.Collect(noon)
	if err != nil {
		m.t.Fatal(err)
	}
	return task
}

// stat of a thread: state, major faults, ticks used, ticks waited for block I/O.
func stat(state string, faults, used, block int) string {
	return "7 (a (strange) name) " + state + " 1 7 7 0 -1 4194304 100 0 " + strconv.Itoa(faults) + " 0 " +
		strconv.Itoa(used) + " 0 0 0 20 0 1 0 100 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 1 0 0 " +
		strconv.Itoa(block) + " 0 0\n"
}

func psi(some, full int) string {
	return "some avg10=0.00 avg60=0.00 avg300=0.00 total=" + strconv.Itoa(some) +
		"\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=" + strconv.Itoa(full) + "\n"
}

func TestCollectOnCgroupV2(t *testing.T) {
	m := newMachine(t)
	m.file("v2/cgroup.procs", "7\n9\n")
	m.file("v2/cgroup.threads", "7\n8\n9\n")
	m.file("v2/cgroup.events", "populated 1\nfrozen 0\n")
	m.file("v2/cpu.stat", "usage_usec 5000000\nuser_usec 1\nsystem_usec 1\nnr_periods 3\nnr_throttled 2\nthrottled_usec 700000\n")
	m.file("v2/cpu.max", "150000 100000\n")
	m.file("v2/cpu.pressure", psi(1000, 500))
	m.file("v2/memory.pressure", psi(2000, 1500))
	m.file("v2/io.pressure", psi(3000, 2500))
	m.file("v2/memory.stat", "anon 1\nworkingset_refault_anon 5\nworkingset_refault_file 6\npgmajfault 44\n")
	m.file("v2/memory.current", "1048576\n")
	m.file("v2/memory.max", "2097152\n")
	m.file("v2/memory.swap.current", "4096\n")
	m.file("v2/io.stat", "254:0 rbytes=100 wbytes=20 rios=3 wios=4 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=2 rios=5 wios=6 dbytes=0 dios=0\n")
	m.thread(7, "3000000000 200 5\n", stat("S", 1, 300, 0))
	m.thread(8, "1000000000 100 6\n", stat("R", 0, 300, 7))
	m.thread(9, "500000000 50 7\n", stat("D", 2, 100, 9))
	got := m.collect(m.collector(Group{Unified: "v2"}))
	want := Task{
		Time: noon, CPU: 5 * time.Second, Delay: 350, Throttled: 700 * time.Millisecond, Quota: 1.5, Switches: 18,
		PSI: true,
		Pressure: Pressures{
			CPU:    Pressure{time.Millisecond, 500 * time.Microsecond},
			Memory: Pressure{2 * time.Millisecond, 1500 * time.Microsecond},
			IO:     Pressure{3 * time.Millisecond, 2500 * time.Microsecond},
		},
		MajorFaults: 44, Refaults: 11, MemoryBytes: 1 << 20, MemoryLimit: 2 << 20, SwapBytes: 4096,
		BlockDelay: 160 * time.Millisecond, ReadBytes: 101, WriteBytes: 22, Operations: 18, BlockAccounting: true,
		Processes: 2, Threads: 3, Running: 1, Sleeping: 1, Blocked: 1,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("measured\n%+v\nwant\n%+v", got, want)
	}
}

func TestCollectOnCgroupV1(t *testing.T) {
	m := newMachine(t)
	m.file("cpu/cgroup.procs", "7\n")
	m.file("cpu/tasks", "7\n")
	m.file("cpu/cpu.stat", "nr_periods 5\nnr_throttled 4\nthrottled_time 900000000\n")
	m.file("cpu/cpu.cfs_quota_us", "50000\n")
	m.file("cpu/cpu.cfs_period_us", "100000\n")
	m.file("cpuacct/cpuacct.usage", "4000000000\n")
	m.file("memory/memory.stat", "pgmajfault 1\ntotal_pgmajfault 12\ntotal_swap 8192\ntotal_workingset_refault_file 3\n")
	m.file("memory/memory.usage_in_bytes", "1000\n")
	m.file("memory/memory.limit_in_bytes", "9223372036854771712\n")
	m.file("blkio/blkio.throttle.io_service_bytes_recursive", "254:0 Read 100\n254:0 Write 50\n254:0 Sync 1\n254:0 Total 150\nTotal 150\n")
	m.file("blkio/blkio.throttle.io_serviced_recursive", "254:0 Read 10\n254:0 Write 5\n254:0 Total 15\nTotal 15\n")
	m.thread(7, "3000000000 200 5\n", stat("T", 1, 300, 0))
	got := m.collect(m.collector(Group{V1: map[string]string{"cpu": "cpu", "cpuacct": "cpuacct", "memory": "memory", "blkio": "blkio"}}))
	want := Task{
		Time: noon, CPU: 4 * time.Second, Delay: 200, Throttled: 900 * time.Millisecond, Quota: 0.5, Switches: 5,
		MajorFaults: 12, Refaults: 3, MemoryBytes: 1000, SwapBytes: 8192,
		ReadBytes: 100, WriteBytes: 50, Operations: 15, BlockAccounting: true,
		Processes: 1, Threads: 1, Stopped: 1, StoppedShare: 1,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("measured\n%+v\nwant\n%+v", got, want)
	}
}

func TestProcessesTellWhatTheGroupDoesNot(t *testing.T) {
	m := newMachine(t)
	m.file("v1/cgroup.procs", "7\n9\n")
	m.file("v1/tasks", "7\n9\n")
	for _, pid := range []int{7, 9} {
		m.thread(pid, "3000000000 200 5\n", stat("S", 2, 300, 0))
		m.file("proc/"+strconv.Itoa(pid)+"/io", "rchar: 1\nread_bytes: 4096\nwrite_bytes: 512\n")
	}
	c := m.collector(Group{V1: map[string]string{"cpu": "v1"}})
	got := m.collect(c)
	if got.CPU != 6*time.Second || got.MajorFaults != 4 || got.ReadBytes != 8192 || got.WriteBytes != 1024 || got.BlockAccounting {
		t.Errorf("measured %+v, want the sums of two processes", got)
	}
	m.remove("proc/9")
	m.file("v1/cgroup.procs", "7\n")
	m.file("v1/tasks", "7\n")
	after := m.collect(c)
	if after.CPU != got.CPU || after.MajorFaults != got.MajorFaults || after.ReadBytes != got.ReadBytes {
		t.Errorf("a process ended and the sums changed from %+v to %+v", got, after)
	}
}

func TestGroupsBelowAreTheTasksToo(t *testing.T) {
	m := newMachine(t)
	m.file("v2/cgroup.procs", "")
	m.file("v2/cgroup.threads", "")
	m.file("v2/a/b/cgroup.procs", "7\n")
	m.file("v2/a/b/cgroup.threads", "7\n")
	m.file("v2/a/cgroup.procs", "")
	m.file("v2/a/cgroup.threads", "")
	m.thread(7, "1 2 3\n", stat("S", 0, 0, 0))
	if got := m.collect(m.collector(Group{Unified: "v2"})); got.Processes != 1 || got.Delay != 2 {
		t.Errorf("measured %d processes and %v of delay, want 1 and 2ns", got.Processes, got.Delay)
	}
}

func TestFrozenIsSeen(t *testing.T) {
	m := newMachine(t)
	m.file("v2/cgroup.procs", "")
	m.file("v2/cgroup.threads", "")
	m.file("v2/cgroup.events", "populated 1\nfrozen 1\n")
	if !m.collect(m.collector(Group{Unified: "v2"})).Frozen {
		t.Error("a frozen group is not seen as frozen")
	}
}

func TestZombiesAreNotCounted(t *testing.T) {
	m := newMachine(t)
	m.file("v2/cgroup.procs", "7\n")
	m.file("v2/cgroup.threads", "7\n")
	m.thread(7, "1 2 3\n", stat("Z", 0, 100, 0))
	if got := m.collect(m.collector(Group{Unified: "v2"})); got.Processes != 0 || got.Threads != 0 {
		t.Errorf("measured %d processes and %d threads, want none", got.Processes, got.Threads)
	}
}

func TestAGroupThatIsGoneSaysSo(t *testing.T) {
	m := newMachine(t)
	if _, err := m.collector(Group{Unified: "v2"}).Collect(noon); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want one that is fs.ErrNotExist", err)
	}
}

// Threads come, run, wait and end, numbers are used again: the sums are right and
// never go back.
func TestSumsNeverGoBack(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		root, err := os.MkdirTemp(dir, "")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(root)
		m := &machine{rt, root}
		m.file("v2/cgroup.procs", "")
		c := m.collector(Group{Unified: "v2"})
		alive := map[int][3]uint64{}
		var truth, last uint64
		for range rapid.IntRange(1, 8).Draw(rt, "rounds") {
			var list string
			for tid := 1; tid <= 4; tid++ {
				path := "proc/" + strconv.Itoa(tid)
				if rapid.Bool().Draw(rt, "ends") {
					delete(alive, tid)
					m.remove(path)
					continue
				}
				figures := alive[tid]
				for i := range figures {
					figures[i] += rapid.Uint64Range(0, 1000).Draw(rt, "gain")
				}
				truth += figures[1] - alive[tid][1]
				alive[tid] = figures
				list += strconv.Itoa(tid) + "\n"
				text := ""
				for _, n := range figures {
					text += strconv.FormatUint(n, 10) + " "
				}
				m.thread(tid, text+"\n", stat("S", 0, 0, 0))
			}
			m.file("v2/cgroup.threads", list)
			got := m.collect(c)
			if uint64(got.Delay) < last {
				rt.Fatalf("delay went back from %d to %d", last, got.Delay)
			}
			if uint64(got.Delay) != truth {
				rt.Fatalf("delay %d, want %d", got.Delay, truth)
			}
			last = uint64(got.Delay)
		}
	})
}

func TestManyThreadsAreReadInTurns(t *testing.T) {
	m := newMachine(t)
	const n = MaxThreads + 200
	list := ""
	for tid := 1; tid <= n; tid++ {
		list += strconv.Itoa(tid) + "\n"
		m.thread(tid, "0 0 0\n", stat("S", 0, 0, 0))
	}
	m.file("v2/cgroup.procs", "")
	m.file("v2/cgroup.threads", list)
	c := m.collector(Group{Unified: "v2"})
	if got := m.collect(c); got.Sleeping != n {
		t.Fatalf("%d threads sleep, want all %d", got.Sleeping, n)
	}
	for tid := 1; tid <= n; tid++ {
		m.thread(tid, "1 1 1\n", stat("S", 0, 0, 0))
	}
	if got := m.collect(c); got.Delay != MaxThreads {
		t.Errorf("the next round read %d threads, want %d", got.Delay, MaxThreads)
	}
	if got := m.collect(c); got.Delay != n {
		t.Errorf("after two rounds %d threads were read, want %d", got.Delay, n)
	}
}
