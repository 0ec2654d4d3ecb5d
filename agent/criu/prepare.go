package criu

import (
	"context"
	"errors"
)

// PendingDump is a dump whose CRIU has started and waits at EventPreDump, with
// the tree still untouched. One of Dump and Abort must be called.
type PendingDump struct {
	proceed chan struct{} // closed to let CRIU go on
	ended   chan struct{} // closed when the dump has ended, either way
	cancel  context.CancelCauseFunc

	result *DumpResult // valid after ended
	err    error
}

var errAborted = errors.New("given up before it began")

// PrepareDump starts a dump up to EventPreDump. CRIU takes 20 to 40 ms to look
// at the kernel before it gets there: a caller that freezes the tree after
// PrepareDump keeps them out of the pause. Cancelling ctx ends the dump at any
// time.
func (e *Engine) PrepareDump(ctx context.Context, r DumpRequest) (*PendingDump, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	p := &PendingDump{proceed: make(chan struct{}), ended: make(chan struct{}), cancel: cancel}
	ready := make(chan struct{})
	notify := r.Notify
	r.Notify = func(ctx context.Context, event Event, pid int) error {
		if event == EventPreDump {
			close(ready)
			select {
			case <-p.proceed:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if notify == nil {
			return nil
		}
		return notify(ctx, event, pid)
	}
	go func() {
		defer close(p.ended)
		p.result, p.err = e.Dump(ctx, r)
	}()
	select {
	case <-ready:
		return p, nil
	case <-p.ended:
		cancel(nil)
		return nil, p.err
	}
}

// Dump lets CRIU go on and waits for its end; see Engine.Dump for the result.
// Cancelling either this ctx or PrepareDump's undoes the dump.
func (p *PendingDump) Dump(ctx context.Context) (*DumpResult, error) {
	defer p.cancel(nil)
	stop := context.AfterFunc(ctx, func() { p.cancel(context.Cause(ctx)) })
	defer stop()
	close(p.proceed)
	<-p.ended
	return p.result, p.err
}

// Abort ends the dump without having touched the tree. After Dump it does
// nothing.
func (p *PendingDump) Abort() {
	p.cancel(errAborted)
	<-p.ended
}
