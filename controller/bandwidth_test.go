package controller

import (
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
)

func TestShareOfTheCloudsBandwidth(t *testing.T) {
	b := newBandwidth()
	want := func(what, cloud, node string, share int64) {
		t.Helper()
		if got := b.share(cloud, node, 1200); got != share {
			t.Errorf("%s: want %d, got %d", what, share, got)
		}
	}
	want("nobody sends", "east", "a", 1200)
	endA := b.begin("east", "a")
	endAgain := b.begin("east", "a")
	endB := b.begin("east", "b")
	b.begin("west", "z")
	want("one of two nodes that send", "east", "a", 600)
	want("a third that might begin", "east", "c", 400)
	want("another cloud is none of it", "west", "z", 1200)
	endA()
	want("a node with another upload still sends", "east", "b", 600)
	endAgain()
	want("the last that sends", "east", "b", 1200)
	endB()
	want("nobody sends any more", "east", "c", 1200)
	if got := b.share("east", "a", 0); got != 0 {
		t.Errorf("no limit: want 0, got %d", got)
	}
	if got := b.share("east", "a", 1); got != 1 {
		t.Errorf("a share is never 0, which is no limit: got %d", got)
	}
}

func TestNodesThatUploadShareTheirCloudsBandwidth(t *testing.T) {
	s := newSimulation(t, "east-0", "east-1")
	s.c.mu.Lock()
	cloud := s.c.clouds["east"]
	cloud.UploadRate = 1000
	s.c.clouds["east"] = cloud
	s.c.mu.Unlock()
	id := s.running(api.JobSpec{Tasks: 2, CPUs: 3})
	s.setFault(func(a *simAgent, c *agentpb.Command) fault {
		if c.GetUpload() != nil && s.c.uploadRate("east", a.node) != 500 {
			t.Errorf("node %s uploads with %d, want half of 1000", a.node, s.c.uploadRate("east", a.node))
		}
		return fault{}
	})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	if rate := s.c.uploadRate("east", "east-0"); rate != 1000 {
		t.Errorf("after the upload: want 1000, got %d", rate)
	}
}
