package sample

import (
	"reflect"
	"testing"
	"time"
)

func TestLocateJoinsMountsAndPaths(t *testing.T) {
	mounts := []byte(`31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/mem\040ory rw - cgroup cgroup rw,memory
37 31 0:34 /below /elsewhere rw - cgroup cgroup rw,blkio
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`)
	paths := []byte("9:name=systemd:/x\n5:blkio:/job\n4:memory:/job\n2:cpu,cpuacct:/job/a\n0::/job\n")
	want := Group{
		Unified: "/sys/fs/cgroup/unified/job",
		V1: map[string]string{
			"cpu": "/sys/fs/cgroup/cpu,cpuacct/job/a", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/job/a",
			"memory": "/sys/fs/cgroup/mem ory/job",
		},
	}
	if got := locate(mounts, paths); !reflect.DeepEqual(got, want) {
		t.Errorf("located\n%+v\nwant\n%+v", got, want)
	}
	if got := locate(mounts, []byte("4:memory:/\n0::/\n")); got.members() != "" {
		t.Errorf("located %+v for a process in the roots, want nothing", got)
	}
}

func TestParseMax(t *testing.T) {
	for text, want := range map[string]float64{"max 100000\n": 0, "150000 100000\n": 1.5, "": 0, "1 0": 0, "-1 100000": 0} {
		if got := parseMax([]byte(text)); got != want {
			t.Errorf("parseMax(%q) = %v, want %v", text, got, want)
		}
	}
}

func TestParseDiskstats(t *testing.T) {
	operations, took := parseDiskstats([]byte("   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0\n" +
		" 254       0 vda 10 1 800 30 5 2 400 12 0 40 42 0 0 0 0 3 9\n"))
	if operations != 15 || took != 42*time.Millisecond {
		t.Errorf("%d operations took %v, want 15 and 42ms", operations, took)
	}
}

// Whatever a kernel to come writes, reading it must not panic.
func FuzzParsers(f *testing.F) {
	f.Add([]byte("some avg10=0.00 avg60=0.00 avg300=0.00 total=12\nfull total=\n"))
	f.Add([]byte("7 (a) b) S 1 2 3\n"))
	f.Add([]byte("254:0 rbytes=1 wbytes=\n254:0 Read 1\nTotal\n"))
	f.Add([]byte("1 2 3\n"))
	f.Fuzz(func(_ *testing.T, text []byte) {
		pressure(text)
		parseStat(text)
		parseSchedstat(text)
		parseIOStat(text)
		parseBlkio(text)
		parseMax(text)
		parseDiskstats(text)
		locate(text, text)
	})
}
