package criu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Feature is something that this machine can or cannot do.
type Feature struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Needed: without it Dormouse does not work here.
	Needed bool `json:"needed"`
	// Detail says what follows, and what to do about it.
	Detail string `json:"detail"`
}

// checked are features that `criu check --feature` can tell.
var checked = []struct {
	feature string
	needed  bool
	missing string
}{
	{"timens", true, "CLOCK_MONOTONIC would jump in a restored job; a kernel ≥ 5.11 is needed"},
	{"clone3_set_tid", true, "processes cannot get their numbers back quickly; a kernel ≥ 5.5 is needed"},
	{"external_net_ns", true, "the job's network cannot be given to it from outside; a newer CRIU is needed"},
	{"pidfd_store", false, "pre-copy cannot tell reused process numbers; a kernel ≥ 5.6 is needed"},
	{"move_mount_set_group", false, "jobs that share mounts among their own mount namespaces cannot be restored; a kernel ≥ 5.15 is needed"},
	{"mem_dirty_track", false, "the kernel does not track written pages for CRIU (CONFIG_MEM_SOFT_DIRTY): every dump writes all of the memory; unchanged chunks are still stored only once"},
	{"uffd-noncoop", false, "restores cannot load memory lazily (userfaultfd)"},
	{"pagemap_scan", false, "finding a process's pages is slower; a kernel ≥ 6.7 has it"},
	{"overlayfs_maps", false, "files mapped from an overlay root may be named wrongly; a kernel ≥ 6.8 or CRIU's work-around is used"},
	{"memfd_hugetlb", false, "memfd files with huge pages cannot be captured"},
}

// Features tells what CRIU and the kernel can do here, for `dormouse doctor`.
func (e *Engine) Features(ctx context.Context) ([]Feature, error) {
	var list []Feature
	for _, c := range checked {
		ok, err := e.hasFeature(ctx, c.feature)
		if err != nil {
			return nil, err
		}
		f := Feature{Name: c.feature, OK: ok, Needed: c.needed}
		if !ok {
			f.Detail = c.missing
		}
		list = append(list, f)
	}
	return append(list, e.resourceCapability(), freezerFeature(), pipeFeature()), nil
}

func (e *Engine) hasFeature(ctx context.Context, name string) (bool, error) {
	cmd := exec.CommandContext(ctx, e.path, "check", "--feature", name)
	cmd.Env = e.environ()
	err := cmd.Run()
	if _, exited := err.(*exec.ExitError); exited && ctx.Err() == nil {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("criu check --feature %s: %w", name, err)
	}
	return true, nil
}

func (e *Engine) resourceCapability() Feature {
	f := Feature{Name: "CAP_SYS_RESOURCE", OK: hasCapability(unix.CAP_SYS_RESOURCE)}
	switch {
	case f.OK:
	case e.shim != "":
		f.Detail = "root lacks it here; jobs of other users are captured with the help of " + e.shim
	default:
		f.Needed = true
		f.Detail = "root lacks it here, and without libdormouse-criu.so jobs of other users cannot be captured: run `make build`"
	}
	return f
}

// freezerFeature looks for a cgroup v2 hierarchy, whose freezer and kill switch
// work without any controller.
func freezerFeature() Feature {
	f := Feature{Name: "cgroup v2 freezer", Needed: true, Detail: "mount the cgroup v2 hierarchy: mount -t cgroup2 none /sys/fs/cgroup/unified"}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return f
	}
	for _, m := range parseMountInfo(string(mounts)) {
		if m.kind == "cgroup2" {
			controllers, _ := os.ReadFile(filepath.Join(m.mountpoint, "cgroup.controllers"))
			return Feature{Name: f.Name, OK: true, Needed: true,
				Detail: fmt.Sprintf("at %s, with controllers: %s", m.mountpoint, strings.TrimSpace(string(controllers)))}
		}
	}
	return f
}

// pipeFeature looks at the limit for pipes, through which CRIU drains memory.
func pipeFeature() Feature {
	const path, want = "/proc/sys/fs/pipe-max-size", 8 << 20
	f := Feature{Name: "large pipes"}
	var size int
	if data, err := os.ReadFile(path); err == nil {
		_, _ = fmt.Sscan(string(data), &size)
	}
	if f.OK = size >= want || hasCapability(unix.CAP_SYS_RESOURCE); !f.OK {
		f.Detail = fmt.Sprintf("dumps are somewhat slower: sysctl -w fs.pipe-max-size=%d", want)
	}
	return f
}
