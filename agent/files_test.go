package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// rootFor makes a small root with programs and the libraries they need.
func rootFor(t *testing.T, dir string, programs ...string) {
	t.Helper()
	for _, name := range append(programs, "etc/passwd") {
		copyInto(t, dir, "/"+name)
		if !strings.Contains(name, "bin/") {
			continue
		}
		for _, library := range libraries(t, "/"+name) {
			copyInto(t, dir, library)
		}
	}
	for _, name := range []string{"root", "tmp", "proc", "dev", "sys"} {
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
	}
}

func libraries(t *testing.T, program string) []string {
	t.Helper()
	list, err := exec.Command("ldd", program).Output()
	must(t, err)
	return regexp.MustCompile(`/\S+`).FindAllString(strings.ReplaceAll(string(list), program, ""), -1)
}

func copyInto(t *testing.T, dir, name string) {
	t.Helper()
	text, err := os.ReadFile(name)
	must(t, err)
	info, err := os.Stat(name)
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, name), text, info.Mode()))
}

// A node may have other versions of what the task runs from, or none.
func TestRestoreWhereTheRootHasChanged(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	root := filepath.Join(c.dir, "root")
	rootFor(t, root, "bin/sh", "bin/sleep")
	spec := counter()
	spec.Root = "dir:" + root
	ref := c.start("east-0", "j-root", spec)
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.checkpoint("east-0", ref, "c-root")
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})

	must(t, os.Remove(filepath.Join(root, "bin/sh")))
	found, err := filepath.Glob(filepath.Join(root, "lib/*/libc.so.6"))
	must(t, err)
	if len(found) != 1 {
		t.Fatalf("the C library of the root: %q", found)
	}
	f, err := os.OpenFile(found[0], os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("another version")
	must(t, err)
	must(t, f.Close())

	again := c.restore("east-0", ref, "c-root", spec)
	last, err := countsUp(c.logs("east-0", again, false))
	must(t, err)
	c.awaitLog("east-0", again, "more lines", counted(last+10))
	// What came from the checkpoint belongs to the next one, too.
	c.checkpoint("east-0", again, "c-root-two")
	c.mustDo("east-0", again, &agentpb.DestroyTask{})
	again = c.restore("east-0", again, "c-root-two", spec)
	c.awaitLog("east-0", again, "more lines", counted(last+20))
}

// A node may not have the root at all: what was captured goes on from the
// closure alone.
func TestRestoreWhereTheRootIsMissing(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	root := filepath.Join(c.dir, "root")
	rootFor(t, root)
	source := filepath.Join(c.dir, "count.c")
	must(t, os.WriteFile(source, []byte(`
#include <stdio.h>
#include <unistd.h>
int main(void) { for (int i = 1;; i++) { printf("%d\n", i); fflush(stdout); usleep(20000); } }
`), 0o600))
	out, err := exec.Command("gcc", "-o", filepath.Join(root, "count"), source).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, library := range libraries(t, filepath.Join(root, "count")) {
		copyInto(t, root, library)
	}
	spec := api.JobSpec{Command: []string{"/count"}, Root: "dir:" + root, CPUs: 1, MemBytes: 64 << 20}
	ref := c.start("east-0", "j-bare", spec)
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.checkpoint("east-0", ref, "c-bare")
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	must(t, os.Rename(root, root+".away"))

	again := c.restore("east-0", ref, "c-bare", spec)
	last, err := countsUp(c.logs("east-0", again, false))
	must(t, err)
	c.awaitLog("east-0", again, "more lines", counted(last+10))
	c.checkpoint("east-0", again, "c-bare-two")
	c.mustDo("east-0", again, &agentpb.DestroyTask{})
	must(t, os.Rename(root+".away", root))
	again = c.restore("east-0", again, "c-bare-two", spec)
	c.awaitLog("east-0", again, "more lines", counted(last+20))
}

// files is a program that holds on to files in every way, and looks after
// each second line on standard input's behalf whether they are as it left them.
const files = `
import os, mmap, fcntl, socket, sys, time, threading
os.makedirs("/data/dir", exist_ok=True)
os.chdir("/data/dir")
gone = open("/data/gone", "w+b"); gone.write(b"deleted but open"); gone.flush(); os.unlink("/data/gone")
linked = open("/data/linked", "w+b"); linked.write(b"deleted name, other name left"); linked.flush()
os.link("/data/linked", "/data/other"); os.unlink("/data/linked")
with open("/data/map", "wb") as f: f.write(b"\0" * 8192)
f = open("/data/map", "r+b"); shared = mmap.mmap(f.fileno(), 8192)
log = open("/data/log", "a")
lock = open("/data/lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
lower = open("/etc/hostname") if os.path.exists("/etc/hostname") else open("/etc/passwd")
text = lower.read()
os.mkfifo("/data/fifo"); fifo = os.open("/data/fifo", os.O_RDWR)
os.write(fifo, b"in the pipe")
server = socket.create_server(("127.0.0.1", 0))
a = socket.create_connection(server.getsockname()); b, _ = server.accept()
a.sendall(b"unread")
os.symlink("nowhere", "/data/soft")
os.setxattr("/data/log", "user.note", b"kept")
i = 0
while True:
    i += 1
    shared[0:8] = b"%08d" % i
    log.write("%d\n" % i); log.flush()
    gone.seek(0); linked.seek(0); lower.seek(0)
    assert gone.read() == b"deleted but open"
    assert linked.read() == b"deleted name, other name left"
    assert os.stat("/data/other").st_ino == os.fstat(linked.fileno()).st_ino
    assert lower.read() == text
    assert open("/data/map", "rb").read(8) == b"%08d" % i
    assert len(open("/data/log").read().splitlines()) == i, "log"
    assert os.readlink("/data/soft") == "nowhere" and os.getxattr("/data/log", "user.note") == b"kept"
    other = open("/data/lock", "w")
    try: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB); assert False, "the lock is lost"
    except BlockingIOError: pass
    other.close()
    if i % 10 == 0:
        assert b.recv(6) == b"unread"; a.sendall(b"unread")
        assert os.read(fifo, 11) == b"in the pipe"; os.write(fifo, b"in the pipe")
    assert os.getcwd() == "/data/dir"
    print(i, flush=True)
    time.sleep(0.02)
`

// inMemory is what a program adds to files when it holds them in a tmpfs.
const inMemory = `
import stat
os.makedirs("/dev/mine/deep"); os.chmod("/dev/shm", 0o1700)
with open("/dev/shm/words", "w") as f: f.write("of shm")
os.chown("/dev/shm/words", 1, 2); os.link("/dev/shm/words", "/dev/shm/twin")
ballast = open("/tmp/ballast", "wb"); ballast.write(b"b" * SIZE); ballast.flush()
def intact():
    assert os.path.isdir("/dev/mine/deep") and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.stat("/dev/shm").st_mode & 0o7777 == 0o1700
    words = os.stat("/dev/shm/words")
    assert (words.st_uid, words.st_gid, words.st_nlink) == (1, 2, 2) and open("/dev/shm/twin").read() == "of shm"
    assert open("/tmp/ballast", "rb").read() == b"b" * SIZE
    open("/dev/null", "w").write("live")
    for covered in "/proc/kcore", "/proc/keys", "/proc/timer_list":
        assert not os.path.exists(covered) or open(covered, "rb").read(1) == b"", covered
`

func TestFilesAreTheSameAfterARestore(t *testing.T) {
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3")
	}
	inTmp := func(ballast int) string {
		program := strings.ReplaceAll(files, "/data", "/tmp/data")
		program = strings.Replace(program, "\ni = 0", strings.ReplaceAll(inMemory, "SIZE", strconv.Itoa(ballast))+"\ni = 0", 1)
		return strings.Replace(program, "    i += 1\n", "    i += 1\n    intact()\n", 1)
	}
	xattrs := regexp.MustCompile(`(?m)^os\.setxattr.*$| and os\.getxattr\(.*$`)
	for name, program := range map[string]string{
		"upper layer": files,
		"small tmpfs": inTmp(100),
		"large tmpfs": xattrs.ReplaceAllString(inTmp(3<<20), ""), // tar keeps none
	} {
		t.Run(name, func(t *testing.T) { filesAreTheSameAfterARestore(t, program) })
	}
}

func filesAreTheSameAfterARestore(t *testing.T, program string) {
	c := newController(t)
	c.addNode("east-0")
	c.addNode("west-0")
	spec := api.JobSpec{Command: []string{"python3", "-c", program}, CPUs: 1, MemBytes: 256 << 20}
	ref := c.start("east-0", "j-files", spec)
	nodes := []string{"east-0", "west-0", "east-0"}
	for i, next := range nodes[1:] {
		id := "c-files" + string(rune('0'+i))
		last, _ := countsUp(c.logs(nodes[i], ref, false))
		c.awaitLog(nodes[i], ref, "lines", counted(last+15))
		c.checkpoint(nodes[i], ref, id+"-early")
		last, _ = countsUp(c.logs(nodes[i], ref, false))
		c.awaitLog(nodes[i], ref, "lines after a checkpoint", counted(last+15))
		c.checkpoint(nodes[i], ref, id)
		c.mustDo(nodes[i], ref, &agentpb.DestroyTask{})
		ref = c.restore(next, ref, id, spec)
	}
	last, _ := countsUp(c.logs("east-0", ref, false))
	c.awaitLog("east-0", ref, "lines after the restores", counted(last+25))
}

// A task of an ordinary user, too.
func TestTaskOfAnOrdinaryUserIsRestored(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	spec := counter()
	spec.User = "nobody"
	spec.Command = []string{"/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"}
	ref := c.start("east-0", "j-user", spec)
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	c.checkpoint("east-0", ref, "c-user")
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	again := c.restore("east-0", ref, "c-user", spec)
	last, err := countsUp(c.logs("east-0", again, false))
	must(t, err)
	c.awaitLog("east-0", again, "more lines", counted(last+10))
}

// hungry is a job whose dump is large.
func hungry(bytes int) api.JobSpec {
	return api.JobSpec{CPUs: 1, MemBytes: 512 << 20, Command: []string{"python3", "-c", fmt.Sprintf(`
import os, time
data = os.urandom(%d)
i = 0
while True:
    i += 1
    print(i, flush=True)
    time.sleep(0.02)
`, bytes)}}
}

func TestSpoolThatFillsUpDuringTheDumpFailsTheCheckpointOnly(t *testing.T) {
	c := newController(t)
	small := filepath.Join(c.dir, "small")
	must(t, os.Mkdir(small, 0o700))
	must(t, unix.Mount("small", small, "tmpfs", 0, "size=300m"))
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	c.addNode("east-0", func(config *Config) { config.Spool, config.SpoolMemBytes = filepath.Join(small, "spool"), -1 })
	ref := c.start("east-0", "j-full", hungry(64<<20))
	c.awaitLog("east-0", ref, "lines", counted(5))
	c.mustDo("east-0", ref, &agentpb.Preflight{Checkpoint: "c-full"})
	must(t, os.WriteFile(filepath.Join(small, "ballast"), make([]byte, 270<<20), 0o600))
	c.mustDo("east-0", ref, &agentpb.Freeze{Checkpoint: "c-full"})
	f := c.do("east-0", ref, &agentpb.Capture{Checkpoint: "c-full"}).GetFailure()
	if !strings.Contains(f.GetMessage(), "ran out of space") || !strings.Contains(f.GetMessage(), small) {
		t.Errorf("the failure is %v", f)
	}
	t.Log(f.GetMessage())
	c.mustDo("east-0", ref, &agentpb.Thaw{Checkpoint: "c-full", Abort: true})
	if left, err := os.ReadDir(filepath.Join(small, "spool")); err != nil || len(left) > 0 {
		t.Errorf("left in the spool: %v, %v", left, err)
	}
	log := regexp.MustCompile(`log: ([^)]+)`).FindStringSubmatch(f.GetMessage())
	if len(log) != 2 || !fileExists(log[1]) {
		t.Errorf("the log that the failure names is not there: %q", log)
	}
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	c.awaitLog("east-0", ref, "more lines", counted(last+10))
	must(t, os.Remove(filepath.Join(small, "ballast")))
	c.checkpoint("east-0", ref, "c-room")
}

func TestKilledCRIUFailsTheCheckpointOnly(t *testing.T) {
	c := newController(t)
	n := c.addNode("east-0")
	ref := c.start("east-0", "j-murder", hungry(200<<20))
	c.awaitLog("east-0", ref, "lines", counted(5))
	killed, lost := 0, 0
	for i := range 6 {
		id := "c-murder" + string(rune('0'+i))
		c.mustDo("east-0", ref, &agentpb.Preflight{Checkpoint: id})
		c.mustDo("east-0", ref, &agentpb.Freeze{Checkpoint: id})
		done := make(chan struct{})
		go func() {
			defer close(done)
			n.killCRIU(time.Duration(i) * 20 * time.Millisecond)
		}()
		f := c.do("east-0", ref, &agentpb.Capture{Checkpoint: id}).GetFailure()
		<-done
		if f != nil {
			killed++
			t.Log(f.GetMessage())
		}
		c.mustDo("east-0", ref, &agentpb.Thaw{Checkpoint: id, Abort: true})
		last, err := countsUp(c.logs("east-0", ref, false))
		must(t, err)
		// In the instants in which CRIU puts its code into a process, its end is the
		// process's, too. That is rare, and told.
		gone := false
		c.awaitLog("east-0", ref, "more lines", func(text string) bool {
			gone = f != nil && c.do("east-0", ref, &agentpb.Preflight{Checkpoint: id + "-after"}).GetFailure() != nil
			return gone || counted(last+5)(text)
		})
		if gone {
			lost++
			c.mustDo("east-0", ref, &agentpb.DestroyTask{})
			ref = c.start("east-0", "j-murder"+string(rune('0'+i)), hungry(200<<20))
			c.awaitLog("east-0", ref, "lines", counted(5))
		}
	}
	if killed == 0 {
		t.Error("no CRIU was killed while it dumped")
	}
	if lost > 1 {
		t.Errorf("%d of %d killed CRIUs took the task along", lost, killed)
	}
	c.checkpoint("east-0", ref, "c-calm")
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	again := c.restore("east-0", ref, "c-calm", hungry(200<<20))
	c.awaitLog("east-0", again, "lines", counted(5))
}

// killCRIU kills the criu that the node's agent starts next, some time after it
// has appeared.
func (n *node) killCRIU(after time.Duration) {
	children := fmt.Sprintf("/proc/%d/task/*/children", n.command.Process.Pid)
	for range 2000 {
		lists, _ := filepath.Glob(children)
		for _, list := range lists {
			text, _ := os.ReadFile(list)
			for _, child := range strings.Fields(string(text)) {
				comm, _ := os.ReadFile("/proc/" + child + "/comm")
				if strings.TrimSpace(string(comm)) != "criu" {
					continue
				}
				time.Sleep(after)
				pid, _ := strconv.Atoi(child)
				syscall.Kill(pid, syscall.SIGKILL)
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}
