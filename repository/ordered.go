package repository

import (
	"context"
	"iter"

	"golang.org/x/sync/errgroup"
)

// ordered calls do for every item of in, in several goroutines, and hands the
// results to out in the order of the items. Each goroutine passes its own
// scratch to do. At most 2 × workers items are on their way.
func ordered[T, R, S any](ctx context.Context, workers int, in iter.Seq2[T, error], scratch func() S, do func(context.Context, S, T) (R, error), out func(T, R) error) error {
	type task struct {
		item   T
		result R
		done   chan struct{}
	}
	g, ctx := errgroup.WithContext(ctx)
	todo, queue := make(chan *task), make(chan *task, 2*workers)
	g.Go(func() error {
		defer close(todo)
		defer close(queue)
		for item, err := range in {
			if err != nil {
				return err
			}
			t := &task{item: item, done: make(chan struct{})}
			for _, c := range []chan *task{queue, todo} {
				select {
				case c <- t:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	for range workers {
		g.Go(func() error {
			s := scratch()
			for t := range todo {
				var err error
				if t.result, err = do(ctx, s, t.item); err != nil {
					return err
				}
				close(t.done)
			}
			return nil
		})
	}
	g.Go(func() error {
		for t := range queue {
			select {
			case <-t.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if err := out(t.item, t.result); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}
