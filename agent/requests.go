package agent

import (
	"context"
	"sync"

	"dormouse/agent/sandbox"
	"dormouse/api/agentpb"
)

// requests are what programs inside tasks have asked for and the controller has
// not answered. Pid 1 of each task remembers them, too, so that they survive the
// agent.
type requests struct {
	mu      sync.Mutex
	waiting map[string]*agentpb.AppRequest
}

// attend serves what programs inside a running task ask for until ctx, or the
// task, ends.
func (a *Agent) attend(ctx context.Context, t *task, box *sandbox.Sandbox) {
	r, _ := t.snapshot()
	if r.From != "" {
		if err := box.Restored(ctx, r.From, r.Run); err != nil && ctx.Err() == nil {
			a.log.Warn("the programs in a restored task are not told so", "task", t.id(), "error", err)
		}
	}
	err := box.Listen(ctx, func(request sandbox.AppRequest) {
		message := &agentpb.AppRequest{
			Id: request.ID, Task: r.ref(),
			Body: &agentpb.AppRequest_Checkpoint{Checkpoint: &agentpb.AppCheckpoint{Label: request.Label}},
		}
		a.requests.mu.Lock()
		a.requests.waiting[request.ID] = message
		a.requests.mu.Unlock()
		a.sendRequest(message)
	})
	if err != nil && ctx.Err() == nil {
		a.log.Warn("requests from inside a task are not heard", "task", t.id(), "error", err)
	}
}

func (a *Agent) sendRequest(message *agentpb.AppRequest) {
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_AppRequest{AppRequest: message}})
}

// repeatRequests tells a controller that may be new what it has not answered.
func (a *Agent) repeatRequests() {
	a.requests.mu.Lock()
	defer a.requests.mu.Unlock()
	for id, message := range a.requests.waiting {
		if _, err := a.find(message.GetTask()); err != nil {
			delete(a.requests.waiting, id)
			continue
		}
		a.sendRequest(message)
	}
}

// answered passes the controller's answer to the program that waits for it.
func (a *Agent) answered(ctx context.Context, answer *agentpb.AppAnswer) {
	a.requests.mu.Lock()
	request := a.requests.waiting[answer.GetId()]
	delete(a.requests.waiting, answer.GetId())
	a.requests.mu.Unlock()
	if request == nil {
		return
	}
	t, err := a.find(request.GetTask())
	if err != nil {
		return
	}
	_, box := t.snapshot()
	if box == nil {
		return
	}
	outcome := sandbox.Outcome{
		Checkpoint: answer.GetCheckpoint(), Failure: answer.GetFailure().GetMessage(), Refused: answer.GetFailure().GetRefused(),
	}
	a.lanes.run("answer "+answer.GetId(), func() {
		if err := box.Answer(ctx, answer.GetId(), outcome); err != nil && ctx.Err() == nil {
			a.log.Warn("a program inside a task was not answered", "task", t.id(), "error", err)
		}
	})
}
