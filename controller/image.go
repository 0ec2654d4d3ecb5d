package controller

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sync"

	"dormouse/controller/store"
)

// image remembers what the records of a table decode to, so that a look at all
// of them decodes only those that have changed: with ten thousand jobs almost all
// of the time would go into decoding. A remembered record is used only for the
// very bytes that it was decoded from, so an image is right in every transaction,
// also of the past, and needs no one to tell it of changes.
type image[T any] struct {
	table store.Table

	mu      sync.Mutex
	records map[string]decoded[T]
}

type decoded[T any] struct {
	raw    []byte
	record *T
}

func newImage[T any](table store.Table) *image[T] {
	return &image[T]{table: table, records: make(map[string]decoded[T])}
}

// all returns every record of the table, in the order of keys. They are shared:
// who changes one reads it again first.
func (m *image[T]) all(tx store.Tx) ([]*T, error) {
	all := make([]*T, 0, m.size())
	err := tx.Scan(m.table, "", func(key string, value []byte) error {
		record, err := m.decode(key, value)
		all = append(all, record)
		return err
	})
	if err == nil && m.size() > 2*len(all)+16 {
		m.mu.Lock()
		defer m.mu.Unlock()
		clear(m.records) // most of them are of records that were removed
	}
	return all, err
}

// get returns one record, shared as those of all.
func (m *image[T]) get(tx store.Tx, key string) (*T, error) {
	value, err := tx.Get(m.table, key)
	if err != nil {
		return nil, err
	}
	return m.decode(key, value)
}

func (m *image[T]) size() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.records)
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
