package controller

import (
	"context"
	"errors"
	"fmt"

	"dormouse/api"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// putCleanup orders a task destroyed. Orders to remove the logs too win.
func putCleanup(tx store.Tx, order cleanup) error {
	before, err := store.Get[cleanup](tx, store.Cleanups, order.key())
	if err == nil && (!before.KeepLogs || order.KeepLogs) {
		return nil
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if order.Number, err = tx.Sequence(store.Cleanups); err != nil {
		return err
	}
	return store.Put(tx, store.Cleanups, order.key(), order)
}

// startCleanups gives every order that has none a goroutine.
func (c *Controller) startCleanups(ctx context.Context) error {
	var due []cleanup
	err := c.store.View(ctx, func(tx store.Tx) error {
		orders, err := store.All[cleanup](tx, store.Cleanups)
		if err != nil {
			return err
		}
		for _, order := range orders {
			gone, err := nodeGone(tx, order.Task.Node)
			if err != nil {
				return err
			}
			if !gone {
				due = append(due, order)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, order := range due {
		name := fmt.Sprintf("cleanup %d", order.Number)
		if c.claim(name) {
			c.work.Go(func() {
				defer c.release(name)
				c.cleanUp(ctx, order)
			})
		}
	}
	return nil
}

// nodeGone reports whether a node is lost, unknown, or has not said Hello since
// it was: nothing of before runs on it.
func nodeGone(tx store.Tx, id string) (bool, error) {
	node, err := store.Get[nodeRecord](tx, store.Nodes, id)
	if errors.Is(err, store.ErrNotFound) {
		return true, nil
	}
	return node.State == api.NodeLost || node.State == api.NodeJoining, err
}

// cleanUp destroys one task, however often it takes, and then forgets the
// order. It gives up when the node is lost, until that comes back.
func (c *Controller) cleanUp(ctx context.Context, order cleanup) {
	for try := 1; ; try++ {
		_, err := c.fleet.call(ctx, order.Task.Node, order.command(try), nil)
		if err == nil {
			c.forgetCleanup(ctx, order)
			return
		}
		if ctx.Err() != nil || isNodeLost(err) {
			return
		}
		c.log.Warn("a task was not destroyed: trying again", "node", order.Task.Node, "job", order.Task.Job, "task", order.Task.Index, "error", err)
		if c.pause(ctx, protocol.Backoff(try)) != nil {
			return
		}
	}
}

func (c *Controller) forgetCleanup(ctx context.Context, order cleanup) {
	err := c.store.Update(ctx, func(tx store.Tx) error {
		now, err := store.Get[cleanup](tx, store.Cleanups, order.key())
		if errors.Is(err, store.ErrNotFound) || (err == nil && now != order) {
			return nil // a stronger order came meanwhile
		}
		if err != nil {
			return err
		}
		return tx.Delete(store.Cleanups, order.key())
	})
	if err != nil && ctx.Err() == nil {
		c.log.Error("a done clean-up was not forgotten", "node", order.Task.Node, "job", order.Task.Job, "error", err)
	}
}

// gone waits until each task was confirmed destroyed, or its node is lost.
func (c *Controller) gone(ctx context.Context, refs []taskRef) error {
	_, err := c.until(ctx, nil, func(tx store.Tx) (bool, error) {
		for _, ref := range refs {
			_, err := tx.Get(store.Cleanups, cleanup{Task: ref}.key())
			if errors.Is(err, store.ErrNotFound) {
				continue
			}
			if err != nil {
				return false, err
			}
			if gone, err := nodeGone(tx, ref.Node); err != nil || !gone {
				return false, err
			}
		}
		return true, nil
	})
	return err
}

// orderDestroyed writes the orders to destroy refs.
func (c *Controller) orderDestroyed(ctx context.Context, refs []taskRef, keepLogs bool) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		for _, ref := range refs {
			if err := putCleanup(tx, cleanup{Task: ref, KeepLogs: keepLogs}); err != nil {
				return err
			}
		}
		return nil
	})
}

// claim reserves a name for one goroutine.
func (c *Controller) claim(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.operating[name] || c.run.Err() != nil {
		return false
	}
	c.operating[name] = true
	return true
}

func (c *Controller) release(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.operating, name)
}
