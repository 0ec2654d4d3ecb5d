package agent

import (
	"os"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
)

func TestBig(t *testing.T) {
	if os.Getenv("BIG") == "" {
		t.Skip()
	}
	c := newController(t)
	n := c.addNode("east-0")
	defer func() { t.Log(n.log.String()) }()
	spec := api.JobSpec{Command: []string{"python3", "-c", `
import os, time
b = bytearray(os.urandom(512<<20) + bytes(512<<20))
for i in range(512<<20, 1<<30, 4096): b[i] = 0
i = 0
while True:
    i += 1
    print(i, flush=True)
    time.sleep(0.01)
`}, CPUs: 1, MemBytes: 2500 << 20}
	ref := c.start("east-0", "j-big", spec)
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	for i := range 3 {
		id := "c-big" + string(rune('0'+i))
		t.Logf("%+v", c.checkpoint("east-0", ref, id))
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	for range 2 {
		begin := time.Now()
		ref = c.restore("east-0", ref, "c-big2", spec)
		t.Logf("restore %v", time.Since(begin))
		c.mustDo("east-0", ref, &agentpb.DestroyTask{})
	}
}
