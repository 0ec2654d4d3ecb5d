package etcd

import (
	"errors"
	"fmt"
	"slices"

	"dormouse/controller/store"
)

// reader is a store.Tx that only reads one picture.
type reader struct {
	s     *Store
	image *image
}

var errReadOnly = errors.New("a view may not be written to")

func (r *reader) Get(name store.Table, key string) ([]byte, error) {
	if err := r.s.known(name); err != nil {
		return nil, err
	}
	return get(r.image.tables[name], key)
}

func get(t table, key string) ([]byte, error) {
	if t.records == nil {
		return nil, store.ErrNotFound
	}
	value, ok := t.records.Get(key)
	if !ok {
		return nil, store.ErrNotFound
	}
	return value, nil
}

func (r *reader) Scan(name store.Table, from string, fn func(string, []byte) error) error {
	if err := r.s.known(name); err != nil {
		return err
	}
	return scan(r.image.tables[name], from, fn)
}

func scan(t table, from string, fn func(string, []byte) error) (err error) {
	if t.records == nil {
		return nil
	}
	t.records.Ascend(from, func(key string, value []byte) bool {
		err = fn(key, value)
		return err == nil
	})
	if errors.Is(err, store.ErrStop) {
		return nil
	}
	return err
}

func (r *reader) Put(store.Table, string, []byte) error { return errReadOnly }
func (r *reader) Delete(store.Table, string) error      { return errReadOnly }
func (r *reader) Sequence(store.Table) (uint64, error)  { return 0, errReadOnly }

// known refuses tables that the schema does not have.
func (s *Store) known(name store.Table) error {
	if slices.Contains(s.plan.Tables(s.plan.Schema()), name) {
		return nil
	}
	return fmt.Errorf("the store has no table %q", name)
}

// writer is a store.Tx that remembers what it wrote. Its reads come from its own
// next picture of the store.
type writer struct {
	s    *Store
	next *builder
	puts map[string][]byte // by key of etcd without prefix; what is nil is deleted
}

func (s *Store) newWriter(from *image) *writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &writer{s: s, next: from.build(), puts: make(map[string][]byte)}
}

func (w *writer) Get(name store.Table, key string) ([]byte, error) {
	if err := w.s.known(name); err != nil {
		return nil, err
	}
	return get(w.next.tables[name], key)
}

func (w *writer) Scan(name store.Table, from string, fn func(string, []byte) error) error {
	if err := w.s.known(name); err != nil {
		return err
	}
	return scan(w.next.tables[name], from, fn)
}

// own returns a table that may be written to. The lock is for the one that it is
// copied from.
func (w *writer) own(name store.Table) table {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.next.table(name)
}

func (w *writer) Put(name store.Table, key string, value []byte) error {
	if err := w.s.known(name); err != nil {
		return err
	}
	if key == "" {
		return fmt.Errorf("write to table %s of the store: the key is empty", name)
	}
	value = append([]byte{}, value...)
	w.own(name).records.Set(key, value)
	w.puts[recordKey(name, key)] = seal(key, value)
	return nil
}

func (w *writer) Delete(name store.Table, key string) error {
	if err := w.s.known(name); err != nil {
		return err
	}
	if _, there := w.own(name).records.Delete(key); there {
		w.puts[recordKey(name, key)] = nil
	}
	return nil
}

func (w *writer) Sequence(name store.Table) (uint64, error) {
	if err := w.s.known(name); err != nil {
		return 0, err
	}
	t := w.own(name)
	t.sequence++
	w.next.tables[name] = t
	w.puts[keySequence+string(name)] = fmt.Append(nil, t.sequence)
	return t.sequence, nil
}

func recordKey(name store.Table, key string) string { return keyRecord + string(name) + "/" + key }
