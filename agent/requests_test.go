package agent

import (
	"testing"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// asker is a program that asks for a checkpoint of its job.
func asker() api.JobSpec {
	return api.JobSpec{
		Command: []string{"/bin/sh", "-c", "dormouse-ctl checkpoint --label mine; echo status $?; sleep 1000"},
		CPUs:    1, MemBytes: 256 << 20,
	}
}

// awaitRequest waits until the agents have told of a request for the nth time.
func (c *controller) awaitRequest(n int) *agentpb.AppRequest {
	c.t.Helper()
	var request *agentpb.AppRequest
	c.await("a request from inside", func() bool {
		if len(c.asked) >= n {
			request = c.asked[n-1]
		}
		return request != nil
	})
	return request
}

func (c *controller) answer(node string, answer *agentpb.AppAnswer) {
	c.t.Helper()
	c.mu.Lock()
	n := c.nodes[node]
	c.mu.Unlock()
	must(c.t, n.send(&agentpb.ToAgent{Body: &agentpb.ToAgent_AppAnswer{AppAnswer: answer}}))
}

func TestAProgramAsksForACheckpointOfItsJob(t *testing.T) {
	c := newController(t)
	n := c.addNode("east-0")
	ref := c.start("east-0", "j-ask", asker())
	first := c.awaitRequest(1)
	if first.GetCheckpoint().GetLabel() != "mine" || taskID(first.GetTask()) != taskID(ref) {
		t.Errorf("the request is %v", first)
	}
	n.kill()
	n.start()
	if again := c.awaitRequest(2); again.GetId() != first.GetId() {
		t.Errorf("the restarted agent tells of request %s; want %s", again.GetId(), first.GetId())
	}
	c.checkpoint("east-0", ref, "c-asked")
	c.answer("east-0", &agentpb.AppAnswer{Id: first.GetId(), Checkpoint: "c-asked"})
	c.awaitLog("east-0", ref, "the answer", says("checkpointed c-asked\nstatus 0"))
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})

	again := c.restore("east-0", ref, "c-asked", asker())
	c.awaitLog("east-0", again, "the word that it was restored", says("restored c-asked\nstatus 0"))
}

func TestARequestThatIsRefusedSaysWhy(t *testing.T) {
	c := newController(t)
	c.addNode("east-0")
	ref := c.start("east-0", "j-ask", asker())
	request := c.awaitRequest(1)
	c.answer("east-0", &agentpb.AppAnswer{Id: request.GetId(), Failure: &agentpb.Failure{Message: "not now", Refused: true}})
	c.awaitLog("east-0", ref, "the refusal", says("status 4"))
}
