package controller

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"dormouse/controller/store"
)

// image remembers what the records of a table decode to, and in which order they
// are, so that a look at all of them reads only those that have changed: with ten
// thousand jobs almost all of the time would go into reading. A remembered record
// is used only for the very bytes that it was decoded from, and a remembered
// order only where the transaction tells what has changed since; so an image is
// right in every transaction, also of the past, and needs no one to tell it of
// changes.
type image[T any] struct {
	table store.Table
	born  func(*T) (time.Time, string) // when a record was made, and its key

	mu      sync.Mutex
	records map[string]decoded[T]
	last    picture[T] // the newest
}

type decoded[T any] struct {
	raw    []byte
	record *T
}

// picture is the whole table. It is never changed.
type picture[T any] struct {
	version uint64 // as store.Recent's; 0: it is no version's
	records []*T   // in the order of keys
	oldest  []*T   // the oldest first; nil where it was not drawn
}

func newImage[T any](table store.Table, born func(*T) (time.Time, string)) *image[T] {
	return &image[T]{table: table, born: born, records: make(map[string]decoded[T])}
}

// all returns every record of the table, in the order of keys. They and their
// list are shared: who changes one reads it again first.
func (m *image[T]) all(tx store.Tx) ([]*T, error) {
	p, err := m.look(tx)
	return p.records, err
}

// oldest returns every record of the table, the oldest first, shared as those of
// all.
func (m *image[T]) oldest(tx store.Tx) ([]*T, error) {
	p, err := m.look(tx)
	if err == nil && p.oldest == nil {
		p.oldest = slices.SortedFunc(slices.Values(p.records), m.byAge)
	}
	return p.oldest, err
}

func (m *image[T]) byKey(a, b *T) int {
	_, x := m.born(a)
	_, y := m.born(b)
	return cmp.Compare(x, y)
}

func (m *image[T]) byAge(a, b *T) int {
	at, x := m.born(a)
	bt, y := m.born(b)
	return cmp.Or(at.Compare(bt), cmp.Compare(x, y))
}

// look is the table as the transaction sees it.
func (m *image[T]) look(tx store.Tx) (p picture[T], err error) {
	recent, ok := tx.(store.Recent)
	if !ok {
		p.records, err = m.read(tx)
		return p, err
	}
	m.mu.Lock()
	last := m.last
	m.mu.Unlock()
	if keys, known := recent.Changed(m.table, last.version); known && last.version > 0 {
		p, err = m.redraw(tx, last, keys)
	} else if p.records, err = m.read(tx); err == nil {
		p.oldest = slices.SortedFunc(slices.Values(p.records), m.byAge)
	}
	if err != nil {
		return p, err
	}
	p.version = recent.Version()
	m.mu.Lock()
	defer m.mu.Unlock()
	if p.version > m.last.version {
		m.last = p
	}
	return p, nil
}

// read reads the whole table.
func (m *image[T]) read(tx store.Tx) (records []*T, err error) {
	err = tx.Scan(m.table, "", func(key string, value []byte) error {
		record, err := m.decode(key, value)
		records = append(records, record)
		return err
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.records) > 2*len(records)+16 {
		clear(m.records) // most of them are of records that were removed
	}
	return records, err
}

// redraw reads those that have changed since the last picture.
func (m *image[T]) redraw(tx store.Tx, last picture[T], changed []string) (picture[T], error) {
	var gone, come []*T
	slices.Sort(changed)
	for _, key := range slices.Compact(changed) {
		at, found := slices.BinarySearchFunc(last.records, key, func(r *T, key string) int {
			_, own := m.born(r)
			return cmp.Compare(own, key)
		})
		record, err := m.get(tx, key)
		switch {
		case errors.Is(err, store.ErrNotFound):
			m.forget(key)
		case err != nil:
			return last, err
		case found && record == last.records[at]:
			continue
		default:
			come = append(come, record)
		}
		if found {
			gone = append(gone, last.records[at])
		}
	}
	if len(gone) == 0 && len(come) == 0 {
		return last, nil
	}
	next := picture[T]{records: exchange(last.records, gone, come, m.byKey)}
	slices.SortFunc(gone, m.byAge)
	slices.SortFunc(come, m.byAge)
	next.oldest = exchange(last.oldest, gone, come, m.byAge)
	return next, nil
}

// exchange returns the list without those that are gone, all of which it has, and
// with those that come; all are in the given order.
func exchange[T any](list, gone, come []*T, order func(a, b *T) int) []*T {
	next := make([]*T, 0, len(list)-len(gone)+len(come))
	for len(gone) > 0 || len(come) > 0 {
		if len(come) == 0 || len(gone) > 0 && order(gone[0], come[0]) <= 0 {
			at, _ := slices.BinarySearchFunc(list, gone[0], order)
			next, list, gone = append(next, list[:at]...), list[at+1:], gone[1:]
			continue
		}
		at, _ := slices.BinarySearchFunc(list, come[0], order)
		next, list, come = append(append(next, list[:at]...), come[0]), list[at:], come[1:]
	}
	return append(next, list...)
}

// get returns one record, shared as those of all.
func (m *image[T]) get(tx store.Tx, key string) (*T, error) {
	value, err := tx.Get(m.table, key)
	if err != nil {
		return nil, err
	}
	return m.decode(key, value)
}

// decode returns the record of key. Nobody holds the lock for longer than it
// takes to look: who reads one record does not wait for who reads all.
func (m *image[T]) decode(key string, value []byte) (*T, error) {
	m.mu.Lock()
	known, ok := m.records[key]
	m.mu.Unlock()
	if ok && bytes.Equal(known.raw, value) {
		return known.record, nil
	}
	record := new(T)
	if err := json.Unmarshal(value, record); err != nil {
		return nil, fmt.Errorf("read %s %s from the store: %w", m.table, key, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records[key] = decoded[T]{raw: bytes.Clone(value), record: record}
	return record, nil
}

func (m *image[T]) forget(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.records, key)
}

// mentioning decodes the records of a table whose JSON has the string in it
// somewhere: those that the caller looks for are among them. All, if it is empty.
func mentioning[T any](tx store.Tx, table store.Table, text string) ([]T, error) {
	if text == "" {
		return store.All[T](tx, table)
	}
	quoted, err := json.Marshal(text)
	if err != nil {
		return nil, err
	}
	var found []T
	err = tx.Scan(table, "", func(key string, value []byte) error {
		if !bytes.Contains(value, quoted) {
			return nil
		}
		var record T
		if err := json.Unmarshal(value, &record); err != nil {
			return fmt.Errorf("read %s %s from the store: %w", table, key, err)
		}
		found = append(found, record)
		return nil
	})
	return found, err
}

// whereabouts tells which jobs may have tasks on a node, so that a node that
// comes or goes does not make the controller look at all jobs. It may name too
// many, never too few: jobs are added before the transaction that places them
// there commits, and removed only when they are forgotten.
type whereabouts struct {
	mu   sync.Mutex
	jobs map[string]map[string]bool // by node
}

// add notes that the job is going to the nodes.
func (w *whereabouts) add(job string, nodes []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, node := range nodes {
		if w.jobs[node] == nil {
			w.jobs[node] = make(map[string]bool)
		}
		w.jobs[node][job] = true
	}
}

func (w *whereabouts) on(node string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	jobs := make([]string, 0, len(w.jobs[node]))
	for job := range w.jobs[node] {
		jobs = append(jobs, job)
	}
	return jobs
}

func (w *whereabouts) forget(node, job string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.jobs[node], job)
}
