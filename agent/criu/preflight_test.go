package criu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func preflight(t *testing.T, s *sandbox, change func(*PreflightRequest)) *PreflightReport {
	t.Helper()
	r := PreflightRequest{Pid: s.pid, Cgroup: s.cgroup}
	if change != nil {
		change(&r)
	}
	report, err := s.engine.Preflight(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// TestPreflightNamesWhatCannotBeCaptured has one small program for each kind.
func TestPreflightNamesWhatCannotBeCaptured(t *testing.T) {
	e := newEngine(t)
	program := objects(t)
	for _, c := range []struct{ kind, want string }{
		{"io_uring", "process 1 (job) uses io_uring (descriptor 3): run it without io_uring"},
		{"io_uring-mapped", "uses io_uring (mapped at "},
		{"userfaultfd", "uses userfaultfd (descriptor 3)"},
		{"perf", "has a perf event open (descriptor 3)"},
		{"bpf", "has a BPF map open (descriptor 3)"},
		{"landlock", "has a landlock ruleset open (descriptor 3)"},
		{"secretmem", "uses secret memory (memfd_secret)"},
		{"device", "has the device /tmp/kmsg open (descriptor 3)"},
		{"vsock", "has a vsock socket (descriptor 3)"},
		{"alg", "has a kernel crypto (AF_ALG) socket (descriptor 3)"},
		{"mptcp", "has an MPTCP socket (descriptor 3): use plain TCP (Go programs: GODEBUG=multipathtcp=0)"},
		{"ping", "has a ping (ICMP) socket (descriptor 4)"},
		{"mqueue", "has the POSIX message queue /queue open (descriptor 3)"},
		{"userns", "runs in a nested user namespace"},
		{"pidns", "runs in a nested pid namespace"},
		{"utsns", "runs in a nested uts namespace"},
		{"ipcns", "runs in a nested ipc namespace"},
		{"traced", "is being traced by process"},
		{"procself", "has the directory /proc/1 open (descriptor 3)"},
		{"deleted", "holds the deleted file /tmp/gone of 2048 MiB open (descriptor 3)"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			s := startSandbox(t, e, program, c.kind)
			if out := s.output(); !strings.Contains(out, "ready") {
				t.Logf("this kernel has nothing of the kind to refuse: %s", out)
				return
			}
			expectRefusal(t, preflight(t, s, nil), c.want)
		})
	}
}

func expectRefusal(t *testing.T, report *PreflightReport, want string) {
	t.Helper()
	for _, r := range report.Refusals {
		if strings.Contains(r.String(), want) {
			return
		}
	}
	t.Errorf("refusals are %v, expected %q", report.Refusals, want)
}

func TestPreflightAcceptsWhatCanBeCaptured(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, objects(t), "plain")
	if out := s.output(); !strings.Contains(out, "ready") {
		t.Fatal(out)
	}
	report := preflight(t, s, nil)
	if len(report.Refusals) > 0 {
		t.Errorf("refused: %v", report.Refusals)
	}
	if report.Processes != 2 || report.ImageBytes < 4096 {
		t.Errorf("report is %+v", report)
	}
	r := s.request()
	mustDump(t, s, r)
	s.restore(r.ImagesDir)
}

func TestPreflightAcceptsAnAllowedDevice(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, objects(t), "device")
	report := preflight(t, s, func(r *PreflightRequest) { r.AllowDevices = []string{"/tmp/kmsg"} })
	if len(report.Refusals) > 0 {
		t.Errorf("refused: %v", report.Refusals)
	}
}

func TestPreflightNamesAProcessEnteredFromOutside(t *testing.T) {
	e := newEngine(t)
	s := startSandbox(t, e, job(t), "counter")
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	s.write("cgroup.procs", strconv.Itoa(cmd.Process.Pid))
	want := fmt.Sprintf("process %d (sleep) was entered into the task from outside", cmd.Process.Pid)
	expectRefusal(t, preflight(t, s, nil), want)
}

func TestPreflightNamesUnixSocketsThatLeaveTheJob(t *testing.T) {
	e := newEngine(t)
	program := objects(t)
	for _, c := range []struct{ kind, network string }{{"unix", "unix"}, {"unix-dgram", "unixgram"}} {
		t.Run(c.kind, func(t *testing.T) {
			// Outside of /tmp, which the sandbox has its own of.
			dir, err := os.MkdirTemp("/var/tmp", "criu-test-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			path := filepath.Join(dir, "outside")
			if c.network == "unix" {
				l, err := net.Listen(c.network, path)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				go func() {
					if conn, err := l.Accept(); err == nil {
						defer conn.Close()
						conn.Read(make([]byte, 1))
					}
				}()
			} else {
				l, err := net.ListenUnixgram(c.network, &net.UnixAddr{Name: path, Net: c.network})
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
			}
			s := startSandbox(t, e, program, c.kind, path)
			if out := s.output(); !strings.Contains(out, "ready") {
				t.Fatal(out)
			}
			expectRefusal(t, preflight(t, s, nil), "has a unix socket (descriptor 3) connected to "+path)
		})
	}
}

func TestPreflightNamesWatchesThatCannotBeFoundAgain(t *testing.T) {
	e := newEngine(t)
	program := objects(t)
	for _, c := range []struct{ options, file, want string }{
		{"", "/usr/bin/env", "watches a file"},
		{",index=on,nfs_export=on", "/usr/bin/env", ""},
		{"", "/etc/hostname", ""},
		{"", "/tmp/job", ""},
	} {
		for _, kind := range []string{"inotify", "fanotify"} {
			dir, err := os.MkdirTemp("", "criu-test-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			for _, sub := range []string{"upper", "work"} {
				if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			overlay := fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%[1]s/work%s", dir, c.options)
			s := startStage(t, e, unix.CLONE_NEWNET, stage{Program: program, Args: []string{kind, c.file}, Overlay: overlay})
			if out := s.output(); !strings.Contains(out, "ready") {
				t.Fatal(out)
			}
			report := preflight(t, s, nil)
			if c.want != "" {
				expectRefusal(t, report, c.want)
			} else if len(report.Refusals) > 0 {
				t.Errorf("%s of %s on an overlay with %q is refused: %v", kind, c.file, c.options, report.Refusals)
			}
			// The verdict is CRIU's own.
			_, err = e.Dump(t.Context(), s.request())
			if (err != nil) != (c.want != "") {
				t.Errorf("%s of %s on an overlay with %q: preflight says %v, the dump %v", kind, c.file, c.options, report.Refusals, err)
			}
			s.kill()
		}
	}
}

func TestEventsThatWereNotReadAreNotLost(t *testing.T) {
	e := newEngine(t)
	for _, kind := range []string{"inotify", "fanotify"} {
		s := startSandbox(t, e, objects(t), kind+"-unread")
		if out := s.output(); !strings.Contains(out, "ready") {
			t.Fatal(out)
		}
		_, looked := e.Preflight(t.Context(), PreflightRequest{Pid: s.pid, Cgroup: s.cgroup})
		_, dumped := e.Dump(t.Context(), s.request())
		for _, err := range []error{looked, dumped} {
			if !errors.Is(err, ErrUnread) || !strings.Contains(err.Error(), "process 1 (job) has ") || !strings.Contains(err.Error(), "(descriptor 3)") {
				t.Errorf("%s: got %v, want ErrUnread, the process and the descriptor from preflight and dump", kind, err)
			}
		}
		if err := unix.Kill(s.pid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the program to read", func() bool { return strings.Contains(s.output(), "has read") })
		preflight(t, s, nil)
		mustDump(t, s, s.request())
		s.kill()
	}
}

func TestPreflightNamesForeignMounts(t *testing.T) {
	e := newEngine(t)
	volume := t.TempDir()
	if err := unix.Mount("ramfs", volume, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(volume, unix.MNT_DETACH)
	s := startStage(t, e, unix.CLONE_NEWNET, stage{Program: job(t), Args: []string{"counter"}, Volume: volume})
	expectRefusal(t, preflight(t, s, nil), "has a ramfs file system (ramfs) mounted at /mnt: give it to the job as a --volume")
	report := preflight(t, s, func(r *PreflightRequest) { r.ExternalMounts = []DumpMount{{Key: "v", Mountpoint: "/mnt"}} })
	if len(report.Refusals) > 0 {
		t.Errorf("a volume is refused: %v", report.Refusals)
	}
}

func TestPreflightNamesFilesOpenedOutside(t *testing.T) {
	e := newEngine(t)
	file := filepath.Join(t.TempDir(), "leaked")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := startStage(t, e, unix.CLONE_NEWNET, stage{Program: job(t), Args: []string{"counter"}, Leak: file})
	expectRefusal(t, preflight(t, s, nil), "that was opened outside of the task")
}

func FuzzParseWatch(f *testing.F) {
	f.Add("inotify wd:1 ino:5a sdev:800010 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:5a00000033b5a7d1\n")
	f.Add("fanotify mnt_id:12 mflags:0 mask:1 ignored_mask:0\n")
	f.Fuzz(func(t *testing.T, line string) { parseWatch(line) })
}
