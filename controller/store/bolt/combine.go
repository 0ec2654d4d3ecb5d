package bolt

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"

	"dormouse/controller/store"
)

// Group commit. A commit waits for the disk twice, so Updates that come while one
// is under way are carried out together, one after the other, in the next bbolt
// transaction. Each sees what those before it wrote. One that fails is undone
// by itself, from a log of what was there before; the others stay. None is
// answered before the commit, not even one that failed or wrote nothing: it may
// have decided by what another of the same commit wrote.

// mostTogether bounds how many Updates share a commit, and so how long the
// first of them waits for the others.
const mostTogether = 256

// change is one Update that waits for its commit.
type change struct {
	ctx    context.Context
	fn     func(store.Tx) error
	err    error
	broken any // what fn panicked with
	wrote  bool
	done   chan struct{} // closed when the rest is final
}

// Update implements store.Store.
func (s *Store) Update(ctx context.Context, fn func(store.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c := &change{ctx: ctx, fn: fn, done: make(chan struct{})}
	s.mu.Lock()
	s.queue = append(s.queue, c)
	if !s.combining {
		s.combining = true
		go s.combine() // ends with the queue; everyone in it waits
	}
	s.mu.Unlock()
	<-c.done
	if c.broken != nil {
		panic(c.broken)
	}
	return c.err
}

// combine commits what is in the queue until it is empty.
func (s *Store) combine() {
	for {
		s.mu.Lock()
		if len(s.queue) == 0 {
			s.combining = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		s.commit()
	}
}

// next takes the first of the queue; nil when there is none.
func (s *Store) next() *change {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil
	}
	c := s.queue[0]
	s.queue[0] = nil
	s.queue = s.queue[1:]
	return c
}

// commit carries out what is in the queue, and what comes meanwhile, in one
// transaction of bbolt.
func (s *Store) commit() {
	var together []*change
	err := s.db.Update(func(tx *bbolt.Tx) error {
		wrote, keys := false, make(map[store.Table][]string)
		for len(together) < mostTogether {
			c := s.next()
			if c == nil {
				break
			}
			together = append(together, c)
			if err := c.carryOut(&transaction{tx: tx, history: s.history, keys: keys}); err != nil {
				return err
			}
			wrote = wrote || c.wrote
		}
		if !wrote {
			return errNothingWritten // spares the two disk writes of an empty commit
		}
		s.history.add(uint64(tx.ID()), keys) // before anybody can see it
		return nil
	})
	if err == nil {
		s.advance()
	}
	if len(together) == 0 { // the transaction could not begin
		if c := s.next(); c != nil {
			together = append(together, c)
		}
	}
	for _, c := range together {
		if err != nil && !errors.Is(err, errNothingWritten) {
			c.err = closedError(err)
		}
		close(c.done)
	}
}

var errNothingWritten = errors.New("nothing written")

// carryOut runs fn, and undoes what it wrote if it fails. An error is one of
// undoing: then nothing of the whole transaction may stay.
func (c *change) carryOut(own *transaction) (err error) {
	defer func() {
		if c.broken = recover(); c.broken != nil || c.err != nil {
			err = own.undo()
			return
		}
		c.wrote = own.wrote
	}()
	if c.err = c.ctx.Err(); c.err == nil {
		c.err = c.fn(own)
	}
	return nil
}

// former is what one write of a transaction has replaced.
type former struct {
	bucket   *bbolt.Bucket
	key      []byte // nil: it was a sequence
	value    []byte // nil: there was none
	sequence uint64
}

// remember notes what is under key, before it is written.
func (t *transaction) remember(table store.Table, bucket *bbolt.Bucket, key string) {
	// A copy: bbolt may reuse what a write has replaced.
	f := former{bucket: bucket, key: []byte(key)}
	if value := bucket.Get(f.key); value != nil {
		f.value = append(make([]byte, 0, len(value)), value...)
	}
	t.log = append(t.log, f)
	t.wrote = true
	if t.keys != nil {
		t.keys[table] = append(t.keys[table], key)
	}
}

// undo takes back every write, the last one first.
func (t *transaction) undo() error {
	for i := len(t.log) - 1; i >= 0; i-- {
		f := t.log[i]
		var err error
		switch {
		case f.key == nil:
			err = f.bucket.SetSequence(f.sequence)
		case f.value == nil:
			err = f.bucket.Delete(f.key)
		default:
			err = f.bucket.Put(f.key, f.value)
		}
		if err != nil {
			return fmt.Errorf("undo a failed change: %w", err)
		}
	}
	return nil
}
