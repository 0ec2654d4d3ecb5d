package bolt

import (
	"cmp"
	"slices"
	"sync"

	"dormouse/controller/store"
)

// remembered is how many of the newest changes of a table are known at least.
const remembered = 1 << 14

// history is what was changed lately. A version is the number of the transaction
// of bbolt that changed it. What a failed commit was to change may be in it, too.
type history struct {
	mu     sync.Mutex
	tables map[store.Table]*changes
}

type changes struct {
	all       []written // by rising version
	forgotten uint64    // newest version of which something is not in all
}

type written struct {
	version uint64
	key     string
}

func newHistory() *history { return &history{tables: make(map[store.Table]*changes)} }

// add notes, before the commit, what it changes.
func (h *history) add(version uint64, keys map[store.Table][]string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for table, keys := range keys {
		c := h.tables[table]
		if c == nil {
			c = &changes{}
			h.tables[table] = c
		}
		for _, key := range keys {
			c.all = append(c.all, written{version, key})
		}
		if surplus := len(c.all) - 2*remembered; surplus > 0 {
			c.forgotten = c.all[surplus+remembered-1].version
			c.all = slices.Clone(c.all[surplus+remembered:])
		}
	}
}

// between returns the keys that were changed after the version since, up to the
// version to; false when since is too long ago, or after to.
func (h *history) between(table store.Table, since, to uint64) ([]string, bool) {
	if since > to {
		return nil, false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.tables[table]
	if c == nil {
		return nil, true
	}
	if since < c.forgotten {
		return nil, false
	}
	first, _ := slices.BinarySearchFunc(c.all, since+1, func(w written, v uint64) int { return cmp.Compare(w.version, v) })
	var keys []string
	for _, w := range c.all[first:] {
		if w.version > to {
			break
		}
		keys = append(keys, w.key)
	}
	return keys, true
}

// Version implements store.Recent.
func (t *transaction) Version() uint64 {
	if t.tx.Writable() {
		return 0
	}
	return uint64(t.tx.ID())
}

// Changed implements store.Recent.
func (t *transaction) Changed(table store.Table, since uint64) ([]string, bool) {
	if t.history == nil {
		return nil, false
	}
	seen := uint64(t.tx.ID())
	if t.tx.Writable() {
		seen-- // its number is that of the commit it is to become
	}
	keys, known := t.history.between(table, since, seen)
	return append(keys, t.keys[table]...), known
}
