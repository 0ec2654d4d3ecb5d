package sandbox

import (
	"context"
	"errors"
)

// step is one part of building a sandbox, with what takes it back. undo may be
// nil, and must also work when do failed half-way.
type step struct {
	do   func(context.Context) error
	undo func(context.Context) error
}

// take does all steps, or none: after a failure those begun are undone in
// reverse, whether or not ctx has ended meanwhile.
func take(ctx context.Context, steps []step) error {
	for i, s := range steps {
		err := ctx.Err()
		if err == nil {
			err = s.do(ctx)
		}
		if err == nil {
			continue
		}
		errs := []error{err}
		for ; i >= 0; i-- {
			if steps[i].undo != nil {
				errs = append(errs, steps[i].undo(context.WithoutCancel(ctx)))
			}
		}
		return errors.Join(errs...)
	}
	return nil
}
