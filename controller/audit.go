package controller

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/store"
)

// The audit log is a table of the store. What a request changed and the entry
// that says so are written in one transaction wherever the request's answer is
// (see answered). Refusals change nothing: they are gathered and written
// together, so that a flood of them is not a flood of transactions; what is too
// much even for that is counted.

const (
	auditQueue   = 1024 // refusals that wait to be written
	forgottenAtA = 1000 // time are removed, so that no transaction is long
	auditMost    = 10_000
)

func auditEntry(r *http.Request, who access.Identity) api.AuditEntry {
	return api.AuditEntry{
		Token: who.Token, Name: who.Name, Role: who.Role, User: who.User,
		Address: address(r), Method: r.Method, Path: r.URL.Path,
	}
}

// writeAudit adds an entry, in the transaction of what it is about.
func (c *Controller) writeAudit(tx store.Tx, e api.AuditEntry) error {
	n, err := tx.Sequence(store.Audit)
	if err != nil {
		return err
	}
	e.ID = n
	c.newestAudit.Store(n)
	if e.Time.IsZero() {
		e.Time = c.clock.Now().UTC()
	}
	return store.Put(tx, store.Audit, eventKey(n), e)
}

// auditNow writes an entry of what has no transaction of its own.
func (c *Controller) auditNow(ctx context.Context, e api.AuditEntry) {
	err := c.store.Update(context.WithoutCancel(ctx), func(tx store.Tx) error { return c.writeAudit(tx, e) })
	if err != nil {
		c.log.Error("the audit log was not written", "who", e.Name, "method", e.Method, "path", e.Path, "error", err)
	}
}

// auditLater hands a refusal to the writer.
func (c *Controller) auditLater(e api.AuditEntry) {
	e.Time = c.clock.Now().UTC()
	select {
	case c.refusals <- e:
	default:
		c.unaudited.Add(1)
	}
}

// auditRefusals writes refusals down, as many as there are at once.
func (c *Controller) auditRefusals(ctx context.Context) {
	for {
		var batch []api.AuditEntry
		select {
		case e := <-c.refusals:
			batch = append(batch, e)
		case <-ctx.Done():
			return
		}
		for len(batch) < auditQueue && len(c.refusals) > 0 {
			batch = append(batch, <-c.refusals)
		}
		batch[0].Dropped = int(c.unaudited.Swap(0))
		err := c.store.Update(ctx, func(tx store.Tx) error {
			for _, e := range batch {
				if err := c.writeAudit(tx, e); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrDeposed) {
			c.log.Error("the audit log was not written", "refusals", len(batch), "error", err)
		}
	}
}

// listAudit returns the newest entries after since, oldest first.
func (c *Controller) listAudit(ctx context.Context, since time.Time, limit int) ([]api.AuditEntry, error) {
	if limit <= 0 || limit > auditMost {
		limit = auditMost
	}
	list := []api.AuditEntry{}
	err := c.store.View(ctx, func(tx store.Tx) error {
		all, err := store.All[api.AuditEntry](tx, store.Audit)
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(e api.AuditEntry) bool { return e.Time.Before(since) })
		list = append(list, all[max(len(all)-limit, 0):]...)
		return nil
	})
	return list, err
}

// forgetAudit removes the oldest entries beyond those that are kept. A controller
// that has not added any has none to remove.
func (c *Controller) forgetAudit(ctx context.Context) error {
	return c.forgetOldest(ctx, store.Audit, c.newestAudit.Load(), uint64(c.parts.Access.AuditKeep))
}

// keptEvents are the newest ones.
const keptEvents = 100_000

// forgetEvents removes the oldest events, as forgetAudit does entries.
func (c *Controller) forgetEvents(ctx context.Context) error {
	return c.forgetOldest(ctx, store.Events, c.newestEvent.Load(), keptEvents)
}

// forgetOldest removes from a table whose keys are eventKeys, up to that of newest,
// what is older than the newest ones to keep.
func (c *Controller) forgetOldest(ctx context.Context, table store.Table, newest, keep uint64) error {
	if newest <= keep {
		return nil
	}
	last := eventKey(newest - keep)
	for {
		var old []string
		err := c.store.Update(ctx, func(tx store.Tx) error {
			old = old[:0]
			err := tx.Scan(table, "", func(key string, _ []byte) error {
				if key > last || len(old) == forgottenAtA {
					return store.ErrStop
				}
				old = append(old, key)
				return nil
			})
			for _, key := range old {
				err = errors.Join(err, tx.Delete(table, key))
			}
			return err
		})
		if err != nil || len(old) < forgottenAtA {
			return err
		}
	}
}
