package controller

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

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

	mu      sync.Mutex
	records map[string]decoded[T]
	last    picture[T] // the newest
}

type decoded[T any] struct {
	raw    []byte
	record *T
}

// picture is the whole table in the order of keys. It is never changed.
type picture[T any] struct {
	version uint64 // as store.Recent's; 0: it is no version's
	keys    []string
	records []*T
}

func newImage[T any](table store.Table) *image[T] {
	return &image[T]{table: table, records: make(map[string]decoded[T])}
}

// all returns every record of the table, in the order of keys. They are shared:
// who changes one reads it again first.
func (m *image[T]) all(tx store.Tx) ([]*T, error) {
	p, err := m.look(tx)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if p.version > m.last.version {
		m.last = p
	}
	if len(m.records) > 2*len(p.records)+16 {
		clear(m.records) // most of them are of records that were removed
	}
	return slices.Clone(p.records), nil
}

func (m *image[T]) look(tx store.Tx) (p picture[T], err error) {
	recent, ok := tx.(store.Recent)
	if !ok {
		return m.read(tx)
	}
	m.mu.Lock()
	last := m.last
	m.mu.Unlock()
	if keys, known := recent.Changed(m.table, last.version); known && last.version > 0 {
		p, err = m.redraw(tx, last, keys)
	} else {
		p, err = m.read(tx)
	}
	p.version = recent.Version()
	return p, err
}

// read reads the whole table.
func (m *image[T]) read(tx store.Tx) (p picture[T], err error) {
	err = tx.Scan(m.table, "", func(key string, value []byte) error {
		record, err := m.decode(key, value)
		p.keys, p.records = append(p.keys, key), append(p.records, record)
		return err
	})
	return p, err
}

// redraw reads those that have changed since the last picture.
func (m *image[T]) redraw(tx store.Tx, last picture[T], changed []string) (picture[T], error) {
	if len(changed) == 0 {
		return last, nil
	}
	slices.Sort(changed)
	next := picture[T]{
		keys:    make([]string, 0, len(last.keys)+len(changed)),
		records: make([]*T, 0, len(last.keys)+len(changed)),
	}
	from := 0
	keep := func(to int) {
		next.keys, next.records = append(next.keys, last.keys[from:to]...), append(next.records, last.records[from:to]...)
		from = to
	}
	for _, key := range slices.Compact(changed) {
		at, found := slices.BinarySearch(last.keys[from:], key)
		keep(from + at)
		if found {
			from++
		}
		record, err := m.get(tx, key)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return next, err
		}
		next.keys, next.records = append(next.keys, key), append(next.records, record)
	}
	keep(len(last.keys))
	return next, nil
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
