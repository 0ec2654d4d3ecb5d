package agent

import (
	"os/exec"
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// memory is a program whose parent and child share pages, of which each has
// overwritten some: with zeros where the other has data, and the other way
// round. Both check all pages again and again.
const memory = `
import mmap, os, sys, time
PAGE, PAGES = 4096, 2000
m = mmap.mmap(-1, PAGE * PAGES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def page(i): return m[i*PAGE:(i+1)*PAGE]
def put(i, byte): m[i*PAGE:(i+1)*PAGE] = bytes([byte]) * PAGE
want = {}
for i in range(PAGES):
    if i % 5 != 4: # the fifth is never touched
        want[i] = [0, 0x11, 0, 0x22][i % 5]
        put(i, want[i])
down, up = os.pipe()
back, forth = os.pipe()
child = os.fork() == 0
step = 7 if child else 11
for i in range(0, PAGES, step):
    want[i] = 0 if want.get(i, 0) else (0x33 if child else 0x44)
    put(i, want[i])
def check():
    for i in range(PAGES):
        assert page(i) == bytes([want.get(i, 0)]) * PAGE, "page %d" % i
if child:
    while True:
        os.read(down, 1)
        check()
        os.write(forth, b".")
i = 0
while True:
    i += 1
    check()
    os.write(up, b".")
    os.read(back, 1)
    print(i, flush=True)
    time.sleep(0.01)
`

func TestMemoryIsTheSameAfterARestoreWithoutItsZeros(t *testing.T) {
	t.Run("read as it is fetched", func(t *testing.T) { testMemory(t, func(*Config) {}) })
	t.Run("fetched first", func(t *testing.T) { testMemory(t, func(c *Config) { c.RestoreFromSpool = true }) })
	t.Run("spool on disk", func(t *testing.T) { testMemory(t, func(c *Config) { c.SpoolMemBytes = -1 }) })
}

func testMemory(t *testing.T, change func(*Config)) {
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3")
	}
	c := newController(t)
	c.addNode("east-0", change)
	spec := api.JobSpec{Command: []string{"python3", "-c", memory}, CPUs: 1, MemBytes: 256 << 20}
	ref := c.start("east-0", "j-memory", spec)
	for i := range 3 {
		id := "c-memory" + string(rune('0'+i))
		last, err := countsUp(c.logs("east-0", ref, false))
		must(t, err)
		c.awaitLog("east-0", ref, "more lines", counted(last+5))
		c.checkpoint("east-0", ref, id)
		c.mustDo("east-0", ref, &agentpb.DestroyTask{})
		ref = c.restore("east-0", ref, id, spec)
	}
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	c.awaitLog("east-0", ref, "lines of the last restore", counted(last+10))
}
