package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dormouse/api/agentpb"
)

// accept takes a command from the controller: a repeated one is answered as
// before, a new one is put on its lane. Commands of one task run in their
// order; storing what was captured, and streams, run beside them, so that a
// task can be ended while its checkpoint is stored.
func (a *Agent) accept(ctx context.Context, command *agentpb.Command) {
	fresh, reply := a.answers.begin(command.GetId())
	if !fresh {
		if reply != nil {
			a.reply(reply)
		}
		return
	}
	a.lanes.run(laneOf(command), func() {
		reply := a.execute(ctx, command)
		a.answers.end(reply)
		a.reply(reply)
	})
}

func (a *Agent) reply(reply *agentpb.Reply) {
	a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Reply{Reply: reply}})
}

func laneOf(command *agentpb.Command) string {
	task := taskID(command.GetTask())
	switch body := command.GetBody().(type) {
	case *agentpb.Command_Upload:
		return task + " " + body.Upload.GetCheckpoint()
	case *agentpb.Command_Discard:
		return task + " " + body.Discard.GetCheckpoint()
	case *agentpb.Command_OpenStream:
		return "stream " + body.OpenStream.GetStream()
	}
	return task
}

func (a *Agent) execute(ctx context.Context, command *agentpb.Command) *agentpb.Reply {
	reply := &agentpb.Reply{Id: command.GetId()}
	a.log.Debug("command", "id", command.GetId(), "task", taskID(command.GetTask()), "kind", fmt.Sprintf("%T", command.GetBody()))
	if err := a.perform(ctx, command, reply); err != nil {
		reply.Result = nil
		reply.Failure = failure(err)
		a.log.Warn("command failed", "id", command.GetId(), "task", taskID(command.GetTask()), "error", err)
	}
	return reply
}

// perform executes one command and fills in the result.
func (a *Agent) perform(ctx context.Context, command *agentpb.Command, reply *agentpb.Reply) error {
	ref := command.GetTask()
	if ref == nil {
		return errors.New("a command names no task")
	}
	progress := func(fraction float64, message string) {
		a.send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Progress{Progress: &agentpb.Progress{
			Id: command.GetId(), Fraction: fraction, Message: message,
		}}})
	}
	if why := excuseOf(command); why != "" {
		if t, err := a.find(ref); err == nil {
			end := t.excuses.begin(why)
			defer end()
			defer time.AfterFunc(longestExcuse, end).Stop()
		}
	}
	switch body := command.GetBody().(type) {
	case *agentpb.Command_Start:
		state, err := a.start(ctx, ref, body.Start)
		reply.Result = &agentpb.Reply_Started{Started: state}
		return err
	case *agentpb.Command_PrepareNetwork:
		endpoint, err := a.prepareNetwork(ctx, networkOf(ref), body.PrepareNetwork.GetPlan())
		reply.Result = &agentpb.Reply_Network{Network: endpoint}
		return err
	case *agentpb.Command_ConnectNetwork:
		return a.connectNetwork(ctx, ref, body.ConnectNetwork)
	case *agentpb.Command_OpenNetwork:
		return a.openNetwork(ref)
	case *agentpb.Command_Release:
		state, err := a.release(ctx, ref)
		reply.Result = &agentpb.Reply_Restored{Restored: state}
		return err
	case *agentpb.Command_Preflight:
		result, err := a.preflight(ctx, ref, body.Preflight.GetCheckpoint(), progress)
		reply.Result = &agentpb.Reply_Preflight{Preflight: result}
		return err
	case *agentpb.Command_Freeze:
		if body.Freeze.GetAlone() {
			return a.freezeAlone(ctx, ref, body.Freeze.GetCheckpoint())
		}
		return a.freeze(ctx, ref, body.Freeze.GetCheckpoint())
	case *agentpb.Command_Capture:
		result, err := a.capture(ctx, ref, body.Capture.GetCheckpoint())
		reply.Result = &agentpb.Reply_Captured{Captured: result}
		return err
	case *agentpb.Command_Thaw:
		return a.thaw(ctx, ref, body.Thaw.GetCheckpoint(), body.Thaw.GetAbort())
	case *agentpb.Command_Upload:
		result, err := a.upload(ctx, ref, body.Upload.GetCheckpoint(), progress)
		reply.Result = &agentpb.Reply_Uploaded{Uploaded: result}
		return err
	case *agentpb.Command_Discard:
		return a.discard(ref, body.Discard.GetCheckpoint())
	case *agentpb.Command_Restore:
		state, err := a.restore(ctx, ref, body.Restore, progress)
		reply.Result = &agentpb.Reply_Restored{Restored: state}
		return err
	case *agentpb.Command_Signal:
		return a.signal(ctx, ref, body.Signal.GetSignal())
	case *agentpb.Command_Destroy:
		return a.destroy(ctx, ref, body.Destroy.GetKeepLogs())
	case *agentpb.Command_OpenStream:
		return a.openStream(ref, body.OpenStream)
	}
	return fmt.Errorf("this agent does not know the command %T: it is older than the controller", command.GetBody())
}
