// Package tcp is what a checkpoint does about TCP connections beyond what CRIU
// does.
//
// Connections whose two ends are in tasks of the job are captured by CRIU and
// restored as they were: every task keeps its address for life, all of them stand
// still at once, what they have sent gets the time to arrive, and then no packet
// passes until all go on (network.Cut). So none is lost that only one side knows
// of, and no kernel that does not know a connection (yet, or any more) gets to
// answer for it with a reset.
//
// A connection that leaves the job has an end that no checkpoint holds. By the
// job's policy such a one
//
//	refuse  makes the checkpoint refuse itself, also if it was opened after the
//	        pre-flight: named are process, descriptor and both addresses
//	close   is ended, right before the cut: the peer gets a reset, the program
//	        ECONNABORTED. Each restored copy has a connection that was shut down, as
//	        CRIU restores an aborted one: it reads the end of the data, and EPIPE on
//	        writing; a connection request seems to have been answered first. A
//	        checkpoint that fails later does not bring it back.
//	keep    is captured like the others, and is alive again if the peer and the way
//	        to it still know it
//
// A connection leaves the job if its remote address is neither one of the task's
// own nor in the job's networks. One that is still being established (SYN_SENT)
// counts. One that the program has closed does not: the kernel goes on delivering
// what it was given, for the job that runs on, and nobody can tell a restored copy
// of it. Listening sockets, and those without a peer, are CRIU's.
//
// # What belongs to no process
//
// CRIU captures sockets that a process holds. Three kinds of connections belong to
// the kernel alone, and would be lost in a restored copy without their peers
// noticing: one that waits to be accepted; one that is being established or whose
// listener defers it (SYN_RECV); and one that its program has closed before all data
// was delivered (FIN_WAIT1, CLOSING, LAST_ACK). The first makes a checkpoint
// unsettled at once, wherever it comes from, and is not ended under any policy. The
// others do between tasks of the job, if they are still there after the time to
// arrive. FIN_WAIT2 and TIME_WAIT lose nothing: the peer has everything.
package tcp

import (
	"context"
	"fmt"
	"time"

	"dormouse/agent/criu"
	"dormouse/agent/network"
	"dormouse/agent/plugins"
	"dormouse/api"
)

// drain is how long a frozen task's segments get to arrive and be acknowledged,
// which the kernel does without the task.
const drain = 20 * time.Millisecond

// Plugin implements plugins.Plugin.
type Plugin struct{}

// Look names connections that leave a job whose policy is to refuse them.
func (Plugin) Look(_ context.Context, t plugins.Task) ([]criu.Refusal, error) {
	if !refuses(t.Spec) {
		return nil, nil
	}
	s, err := survey(t)
	if err != nil {
		return nil, err
	}
	defer s.close()
	return refusals(t.PIDs, s.leaving()), nil
}

// Quiesce applies the policy, gives segments the time to arrive and cuts the
// task off its network.
func (Plugin) Quiesce(ctx context.Context, t plugins.Task) error {
	arrived := time.After(drain)
	s, err := survey(t)
	if err != nil {
		return err
	}
	defer s.close()
	if c, found := s.find(connection.waits); found {
		return fmt.Errorf("%w: the one from %v waits to be accepted", plugins.ErrUnsettled, c)
	}
	if err := s.treatLeaving(t); err != nil {
		return err
	}
	if len(s.connections) > 0 || t.Spec.Tasks > 1 {
		select {
		case <-arrived:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if _, found := s.find(connection.unsettled); found {
		if err := settled(t); err != nil {
			return err
		}
	}
	return network.Cut(t.NetNS)
}

// Restored mends connections; see mend.
func (Plugin) Restored(_ context.Context, t plugins.Task) error {
	shared := map[string]bool{}
	for _, pid := range t.PIDs {
		if err := criu.EachTCPSocket(pid, shared, mend); err != nil && !gone(err) {
			return fmt.Errorf("mend the TCP connections of process %d: %w", pid, err)
		}
	}
	return nil
}

// Resume opens the task's network.
func (Plugin) Resume(_ context.Context, t plugins.Task) error { return network.Open(t.NetNS) }

// refuses reports whether connections that leave the job are a reason to refuse
// a checkpoint.
func refuses(spec *api.JobSpec) bool {
	return spec.Connections != api.ConnectionsClose && spec.Connections != api.ConnectionsKeep
}

// treatLeaving applies the job's policy to what leaves the job.
func (s *seen) treatLeaving(t plugins.Task) error {
	leaving := s.leaving()
	switch {
	case len(leaving) == 0 || t.Spec.Connections == api.ConnectionsKeep:
		return nil
	case t.Spec.Connections == api.ConnectionsClose:
		return end(leaving)
	}
	list := refusals(t.PIDs, leaving)
	if len(list) == 0 {
		return fmt.Errorf("%w: the one from %v is being handed from one process to another", plugins.ErrUnsettled, leaving[0])
	}
	return &plugins.RefusedError{Refusals: list}
}

// settled looks once more, after the time to arrive.
func settled(t plugins.Task) error {
	s, err := survey(t)
	if err != nil {
		return err
	}
	defer s.close()
	if c, found := s.find(connection.unsettled); found {
		return fmt.Errorf("%w: the one from %v is being established, or was closed and has data under way", plugins.ErrUnsettled, c)
	}
	return nil
}
