package sandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/agent/sandbox"
	"dormouse/api"
)

func TestExitStatusIsTruthful(t *testing.T) {
	b := newBench(t)
	for script, want := range map[string]sandbox.ExitStatus{
		"exit 0":        {Code: 0},
		"exit 7":        {Code: 7},
		"exit 255":      {Code: 255},
		"kill -TERM $$": {Code: 128 + 15, Signal: "SIGTERM"},
		"kill -SEGV $$": {Code: 128 + 11, Signal: "SIGSEGV"},
		"kill -KILL $$": {Code: 128 + 9, Signal: "SIGKILL"},
	} {
		if got := b.wait(b.start(b.config(script))); got != want {
			t.Errorf("%s: got %+v, want %+v", script, got, want)
		}
	}
}

func TestExitStatusWhenPid1IsKilled(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("sleep 1000"))
	if err := syscall.Kill(s.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	got := b.wait(s)
	if got.Code != 137 || got.Signal != "SIGKILL" || got.OOMKilled || got.Reason == "" {
		t.Errorf("got %+v, want 137 by SIGKILL with a reason", got)
	}
}

func TestOutputGoesToFiles(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("echo out; echo err >&2; echo again >> /dev/stdout"))
	b.wait(s)
	expect(t, "stdout", b.log(s, "stdout"), "out\nagain\n")
	expect(t, "stderr", b.log(s, "stderr"), "err\n")
	stdout, _ := s.LogPaths()
	if _, err := os.Stat(stdout); err != nil {
		t.Errorf("LogPaths names no file: %v", err)
	}
}

func TestLogsCannotBeLinksOutOfTheSandbox(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("rm /.dormouse/stdout; ln -s /etc/shadow /.dormouse/stdout"))
	b.wait(s)
	if file, err := s.OpenLog("stdout"); err == nil {
		file.Close()
		t.Error("OpenLog followed a link that the task made")
	}
}

func TestKeptLogsSurviveDestroy(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("echo last words"))
	b.wait(s)
	if err := s.Destroy(b.context(), sandbox.DestroyOptions{KeepLogs: true}); err != nil {
		t.Fatal(err)
	}
	expect(t, "stdout", b.log(s, "stdout"), "last words\n")
	entries, err := os.ReadDir(s.Dir())
	if err != nil || len(entries) != 2 {
		t.Errorf("left in %s: %v (%v), want the two logs", s.Dir(), entries, err)
	}
}

func TestNamespacesAreTheSandboxesOwn(t *testing.T) {
	b := newBench(t)
	out := b.output(b.config("for n in pid mnt net ipc uts; do readlink /proc/self/ns/$n; done"))
	inside := strings.Fields(out)
	for i, name := range []string{"pid", "mnt", "net", "ipc", "uts"} {
		outside, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if i >= len(inside) || inside[i] == outside {
			t.Errorf("the sandbox shares the %s namespace %s", name, outside)
		}
	}
}

func TestProcessesSeeOnlyThemselves(t *testing.T) {
	b := newBench(t)
	out := b.output(b.config("cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l"))
	lines := strings.Split(out, "\n")
	expect(t, "pid 1", lines[0], "init")
	if n := lines[1]; n != "3" && n != "4" { // pid 1, the shell, ls, wc
		t.Errorf("%s processes are visible", n)
	}
}

func TestIdentity(t *testing.T) {
	b := newBench(t)
	cfg := b.config("hostname; cat /etc/hostname /etc/hosts; hostname -I || ip addr show lo")
	cfg.Hostname = "task-3"
	cfg.Hosts = []sandbox.Host{{Name: "task-3", IP: "10.99.0.1"}, {Name: "task-4", IP: "10.99.0.2"}}
	out := b.output(cfg)
	if !strings.HasPrefix(out, "task-3\ntask-3\n127.0.0.1\tlocalhost\n") {
		t.Errorf("host name and hosts: %q", out)
	}
	contains(t, "hosts", out, "10.99.0.1\ttask-3\n10.99.0.2\ttask-4\n")
	contains(t, "addresses", out, "10.99.0.1")
}

func TestMounts(t *testing.T) {
	b := newBench(t)
	cfg := b.config(`
set -e
echo x > /dev/null; head -c1 /dev/zero > /dev/null; head -c1 /dev/urandom > /dev/null
for d in null zero full random urandom tty ptmx pts/ptmx fd stdin stdout stderr shm; do test -e /dev/$d || { echo missing /dev/$d; exit 1; }; done
stat -c '%a' /tmp /dev/shm
echo hi > /tmp/f; echo hi > /dev/shm/f
test -z "$(ls -A /run | grep -v lock)" || { ls -A /run; exit 1; }
grep -E ' (/proc|/sys|/dev|/dev/pts|/dev/shm|/tmp) ' /proc/self/mounts | cut -d' ' -f2,3
! echo 1 > /sys/kernel/mm/ksm/run || exit 1
! echo 0 > /proc/sys/kernel/sysrq || exit 1
! echo h > /proc/sysrq-trigger || exit 1
test -z "$(head -c1 /proc/kcore)"
`)
	cfg.TmpBytes = 4 << 20
	s := b.start(cfg)
	if status := b.wait(s); status.Code != 0 {
		t.Fatalf("%+v: %s %s", status, b.log(s, "stdout"), b.log(s, "stderr"))
	}
	out := b.log(s, "stdout")
	contains(t, "modes", out, "1777\n1777\n")
	for _, m := range []string{"/proc proc", "/sys sysfs", "/dev tmpfs", "/dev/pts devpts", "/dev/shm tmpfs", "/tmp tmpfs"} {
		contains(t, "mounts", out, m)
	}
}

func TestTmpIsLimited(t *testing.T) {
	b := newBench(t)
	cfg := b.config("head -c 8388608 /dev/zero > /tmp/big")
	cfg.TmpBytes = 4 << 20
	s := b.start(cfg)
	if b.wait(s).Code == 0 {
		t.Error("8 MiB fitted into a /tmp of 4 MiB")
	}
	contains(t, "stderr", b.log(s, "stderr"), "No space left")
}

func TestNodeIsUntouched(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret") // below /tmp, which is covered
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	hidden, err := os.MkdirTemp("/var/lib", "dormouse-test-hidden-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(hidden)
	if err := os.WriteFile(hidden+"/key", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, hidden)
	out := b.output(b.config("ls -A " + hidden + "; ls -A " + b.state() + "; test ! -e " + secret + " && echo covered; echo mine > /etc/dormouse-test; rm -rf /usr/share/doc; cat /etc/dormouse-test"))
	expect(t, "sight", out, "covered\nmine\n")
	if _, err := os.Stat("/etc/dormouse-test"); err == nil {
		t.Error("a write went through to the node")
	}
	if _, err := os.Stat("/usr/share/doc"); err != nil {
		t.Error("a removal went through to the node")
	}
}

func TestDirectoryRoot(t *testing.T) {
	b := newBench(t)
	root := filepath.Join(b.dir, "root")
	copyProgram(t, root, "/bin/sh", "/bin/cat")
	if err := os.WriteFile(root+"/greeting", []byte("hello from below\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := b.config("cat /greeting; echo changed > /greeting")
	cfg.Root = "dir:" + root
	expect(t, "output", b.output(cfg), "hello from below\n")
	content, err := os.ReadFile(root + "/greeting")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "the directory itself", string(content), "hello from below\n")
}

func TestADirectoryRootDoesNotShowTheStateEither(t *testing.T) {
	b := newBench(t)
	cfg := b.config("ls -A " + b.state())
	cfg.Root = "dir:/"
	expect(t, "sight", b.output(cfg), "")
}

func TestVolumes(t *testing.T) {
	b := newBench(t)
	data, fixed := filepath.Join(b.dir, "data"), filepath.Join(b.dir, "fixed")
	for _, dir := range []string{data, fixed} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(fixed+"/f", []byte("fixed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := b.config("cat /data/in/f; echo out > /var/run/../../srv/data/f; ! touch /data/in/g 2>/dev/null || exit 1; cat /one")
	cfg.Volumes = []api.Volume{
		{Source: fixed, Destination: "/data/in", ReadOnly: true},
		{Source: data, Destination: "/srv/data"},
		{Source: fixed + "/f", Destination: "/one"},
	}
	s := b.start(cfg)
	if status := b.wait(s); status.Code != 0 {
		t.Fatalf("%+v %s", status, b.log(s, "stderr"))
	}
	expect(t, "output", b.log(s, "stdout"), "fixed\nfixed\n")
	content, err := os.ReadFile(data + "/f")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "shared file", string(content), "out\n")
	want := sandbox.External{Mountpoint: "/srv/data", Key: "volume-1", Source: data}
	if got := s.External(); len(got) != 3 || got[1] != want {
		t.Errorf("External: got %+v, want %+v as the second", got, want)
	}
}

func TestUser(t *testing.T) {
	b := newBench(t)
	for user, want := range map[string]string{
		"":             "0 0 0",
		"daemon":       "1 1 1",
		"1234":         "1234 0 0",
		"1234:77":      "1234 77 77",
		"daemon:games": "1 60 60",
	} {
		cfg := b.config("echo $(id -u) $(id -g) $(id -G)")
		cfg.User = user
		expect(t, "user "+user, b.output(cfg), want+"\n")
	}
	cfg := b.config("echo $HOME $USER $PATH $PWD; umask; echo again >> /dev/stdout")
	cfg.User = "daemon"
	contains(t, "environment", b.output(cfg), "/usr/sbin daemon /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/.dormouse/bin /\n0022\nagain\n")
}

func TestEnvironmentAndWorkingDirectory(t *testing.T) {
	b := newBench(t)
	cfg := b.config("echo $A,$HOME,$PWD,$GLIBC_TUNABLES; cat < /dev/stdin")
	cfg.Env = map[string]string{"A": "1=2", "HOME": "/nowhere"}
	cfg.WorkDir = "/usr/lib"
	cfg.CPUBaseline = "x86-64-v2"
	out := b.output(cfg)
	contains(t, "output", out, "1=2,/nowhere,/usr/lib,glibc.cpu.hwcaps=-AVX,")
	if strings.Contains(b.output(b.config("env")), "GODEBUG") {
		t.Error("pid 1's own environment reached the command")
	}
}

func TestPrivilegesAreThoseOfContainers(t *testing.T) {
	b := newBench(t)
	root := b.output(b.config("grep -E 'Cap|NoNewPrivs' /proc/self/status"))
	for _, want := range []string{"CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "CapPrm:\t00000000a80425fb", "CapInh:\t0000000000000000", "NoNewPrivs:\t1"} {
		contains(t, "root's", root, want)
	}
	cfg := b.config("grep Cap /proc/self/status")
	cfg.User = "daemon"
	cfg.CapAdd = []string{"net_admin"}
	user := b.output(cfg)
	for _, want := range []string{"CapEff:\t0000000000001000", "CapBnd:\t00000000a80435fb"} {
		contains(t, "the user's", user, want)
	}
	expect(t, "pid 1's", b.output(b.config("grep CapEff /proc/1/status")), "CapEff:\t00000000a80425fb\n")
}

func TestNoDeviceOfTheNodeCanBeOpened(t *testing.T) {
	b := newBench(t)
	// 7:0 is a loop device, 1:1 is /dev/mem's neighbour; a made node must not open.
	s := b.start(b.config("mknod /dev/mem c 1 1 && head -c1 /dev/mem; mknod /tmp/null c 1 3 && cat /tmp/null; mknod /x c 1 3 && cat /x"))
	if b.wait(s).Code == 0 {
		t.Error("a device on the root could be opened")
	}
	if n := strings.Count(b.log(s, "stderr"), "Operation not permitted") + strings.Count(b.log(s, "stderr"), "Permission denied"); n != 3 {
		t.Errorf("want three refusals, got: %s", b.log(s, "stderr"))
	}
}

func TestNothingIsInherited(t *testing.T) {
	b := newBench(t)
	leak, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, leak.Fd(), syscall.F_SETFD, 0); errno != 0 {
		t.Fatal(errno)
	}
	s := b.start(b.config("ls -l /proc/self/fd; ls -l /proc/1/fd; sleep 1000"))
	b.logs(s, "total 0\n")
	_, out, _ := b.exec(s, "for p in 1 2; do for f in /proc/$p/fd/*; do readlink $f; done; done")
	if strings.Contains(out, "passwd") {
		t.Errorf("a descriptor of the agent leaked: %s", out)
	}
	contains(t, "stdin", out, "/dev/null")
}

func TestCommandNotFoundIsSaidBeforeAnythingRuns(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		command []string
		want    string
	}{
		{[]string{"no-such-command"}, "the command no-such-command was not found in the sandbox's root"},
		{[]string{"/no/such/command"}, "there is no such file"},
		{[]string{"/etc/passwd"}, "no permission to execute"},
		{[]string{"/etc"}, "not a regular file"},
	} {
		cfg := b.config("")
		cfg.Command = c.command
		s := b.create(cfg)
		err := s.Start(b.context())
		if !errors.Is(err, sandbox.ErrCommandNotFound) {
			t.Errorf("%v: got error %v, want ErrCommandNotFound", c.command, err)
			continue
		}
		contains(t, c.command[0], err.Error(), c.want)
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("more than one sentence: %q", err)
		}
		if s.Pid() != 0 {
			t.Errorf("%v: a pid after a failed start", c.command)
		}
		for _, part := range []string{"upper", "root"} {
			if entries, err := os.ReadDir(filepath.Join(s.Dir(), part)); err != nil || len(entries) != 0 {
				t.Errorf("%v: left in %s: %v %v", c.command, part, entries, err)
			}
		}
	}
}

func TestBadRequestsAreRefused(t *testing.T) {
	b := newBench(t)
	for name, spoil := range map[string]func(*sandbox.Config){
		"user":        func(c *sandbox.Config) { c.User = "nobody-here" },
		"group":       func(c *sandbox.Config) { c.User = "daemon:no-such-group" },
		"work dir":    func(c *sandbox.Config) { c.WorkDir = "/no/such/dir" },
		"capability":  func(c *sandbox.Config) { c.CapAdd = []string{"FLY"} },
		"volume":      func(c *sandbox.Config) { c.Volumes = []api.Volume{{Source: "/no/such/dir", Destination: "/x"}} },
		"own state":   func(c *sandbox.Config) { c.Volumes = []api.Volume{{Source: b.state(), Destination: "/x"}} },
		"proc volume": func(c *sandbox.Config) { c.Volumes = []api.Volume{{Source: "/srv", Destination: "/proc/x"}} },
		"root":        func(c *sandbox.Config) { c.Root = "dir:/no/such/root" },
		"root kind":   func(c *sandbox.Config) { c.Root = "zip:/x" },
		"cpus":        func(c *sandbox.Config) { c.CPUs = -1 },
		"memory":      func(c *sandbox.Config) { c.MemBytes = 1 },
		"address":     func(c *sandbox.Config) { c.VirtualIP = "10.0.0" },
		"baseline":    func(c *sandbox.Config) { c.CPUBaseline = "x86-64-v9" },
		"command":     func(c *sandbox.Config) { c.Command = nil },
		"id":          func(c *sandbox.Config) { c.ID = "../x" },
	} {
		cfg := b.config("true")
		spoil(&cfg)
		s, err := b.runtime.Create(b.context(), cfg)
		if err == nil {
			b.destroyLater(s)
			err = s.Start(b.context())
		} else if _, statErr := os.Stat(cfg.Dir); statErr == nil {
			t.Errorf("%s: a failed Create left %s", name, cfg.Dir)
		}
		if !errors.Is(err, sandbox.ErrBadRequest) {
			t.Errorf("%s: got error %v, want ErrBadRequest", name, err)
		}
	}
}

func TestBrokenScriptsAreNamed(t *testing.T) {
	b := newBench(t)
	for content, want := range map[string]string{
		"#!/no/such/interpreter\n": "interpreter or dynamic loader is not in the sandbox's root",
		"echo no interpreter\n":    "neither a program of this machine's kind nor a script",
	} {
		script := filepath.Join(b.dir, "script")
		if err := os.WriteFile(script, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
		cfg := b.config("")
		cfg.Command = []string{"/script"}
		cfg.Volumes = []api.Volume{{Source: script, Destination: "/script"}}
		err := b.create(cfg).Start(b.context())
		if !errors.Is(err, sandbox.ErrCommandNotFound) {
			t.Fatalf("got error %v, want ErrCommandNotFound", err)
		}
		contains(t, "error", err.Error(), want)
	}
}

func TestAStartThatIsGivenUpLeavesNothing(t *testing.T) {
	b := newBench(t)
	s := b.create(b.config("sleep 1000"))
	ctx, cancel := context.WithTimeout(context.Background(), time.Microsecond)
	defer cancel()
	if err := s.Start(ctx); err == nil {
		t.Fatal("Start succeeded in a microsecond")
	}
	if pids, err := s.Pids(); err != nil || len(pids) != 0 {
		t.Errorf("processes left: %v %v", pids, err)
	}
}

func TestCreateRefusesADirectoryInUse(t *testing.T) {
	b := newBench(t)
	cfg := b.config("true")
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.Dir+"/precious", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.runtime.Create(b.context(), cfg); err == nil {
		t.Fatal("Create took a directory that was there")
	}
	if _, err := os.Stat(cfg.Dir + "/precious"); err != nil {
		t.Error("a failed Create removed what was not its own")
	}
}
