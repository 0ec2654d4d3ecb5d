// Package store is where the controller keeps everything it may not forget.
//
// A Store is a set of tables of records, each a key and a value, changed in
// transactions: a job, its operation and the event that tells of it change
// together or not at all. What the values mean is the controller's business;
// Get, Put and All read and write them as JSON.
//
// Every committed change moves the store's revision on, and Wait lets readers
// sleep until it does; long polls, event streams and the reconciler hang on it.
//
// Implementations: bolt (one file, embedded) and etcd (shared by several
// controllers). Each passes storetest.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// Table names one kind of record.
type Table string

// ErrNotFound is what Tx.Get answers for a key that is not there.
var ErrNotFound = errors.New("not found")

// ErrClosed is what every method answers after Close.
var ErrClosed = errors.New("the store is closed")

// ErrDeposed is what a shared store answers to a controller that does not lead.
var ErrDeposed = errors.New("this controller does not lead")

// NewerSchemaError refuses a store that a newer dormouse wrote.
type NewerSchemaError struct {
	Where  string // file or address of the store
	Schema int    // that it has
	Known  int    // the newest that this dormouse knows
}

func (e *NewerSchemaError) Error() string {
	return fmt.Sprintf("the store %s has schema %d and this dormouse knows up to %d: use the newer dormouse that wrote it", e.Where, e.Schema, e.Known)
}

// UnreachableError says that a shared store does not answer. Nothing was changed.
type UnreachableError struct {
	Where string // what does not answer, with its addresses
	Err   error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("%s does not answer (%v): start it, or correct store.endpoints in the controller's configuration", e.Where, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// UncertainError says that a shared store stayed away while it was to commit: the
// change may have been made, and may still be. Read again before acting on it.
type UncertainError struct {
	Where string
	Err   error
}

func (e *UncertainError) Error() string {
	return fmt.Sprintf("%s did not answer (%v), so it is not known whether the change was made: look again when it is back", e.Where, e.Err)
}

func (e *UncertainError) Unwrap() error { return e.Err }

// IsAway reports whether err says nothing of what was asked, only that a shared
// store cannot be used by this controller now.
func IsAway(err error) bool {
	var unreachable *UnreachableError
	var uncertain *UncertainError
	var older *OlderSchemaError
	return errors.Is(err, ErrDeposed) || errors.As(err, &older) || errors.As(err, &unreachable) || errors.As(err, &uncertain)
}

// OlderSchemaError says that a shared store waits for its leader to upgrade it.
type OlderSchemaError struct {
	Where  string // address of the store
	Schema int
}

func (e *OlderSchemaError) Error() string {
	return fmt.Sprintf("the store %s still has schema %d, because a controller of an older dormouse leads: stop that one, and the next leader upgrades the store", e.Where, e.Schema)
}

// NotEmptyError refuses to restore a copy over something else.
type NotEmptyError struct{ Where string }

func (e *NotEmptyError) Error() string {
	return fmt.Sprintf("the store %s is not empty: restore with --force to lose what is in it", e.Where)
}

// DamagedError says that a store's contents cannot be trusted.
type DamagedError struct {
	Where string // file or address of the store
	What  string // what is wrong with it
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("the store %s is damaged (%s): put back a copy of it, or move it away to start without its jobs", e.Where, e.What)
}

// Item is one thing in a copy of a whole store: a record, or a table's sequence.
type Item struct {
	Table    Table  `json:"table"`
	Key      string `json:"key,omitempty"` // empty for a sequence
	Value    []byte `json:"value,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"` // the last number that was given
}

// Copier is a Store that can be copied as a whole, while it is used.
type Copier interface {
	// Copy calls fn for everything in the store, as of one moment, and returns the
	// schema of it. fn must not wait for an Update.
	Copy(ctx context.Context, fn func(Item) error) (schema int, err error)
}

// Store keeps tables of records.
//
// Contract: all methods are safe for concurrent use. Transactions are
// serializable: an Update sees every commit before it and nothing of those
// after it. When Update returns nil, the change survives the end of the
// process and of the machine; when it returns an error, nothing was changed,
// unless that is an *UncertainError, as only shared stores have.
type Store interface {
	// View calls fn with a read-only transaction: one consistent picture. The
	// writing methods of its Tx fail. fn must not keep the Tx, and must not wait
	// for an Update, which may itself be waiting for this View to end.
	View(ctx context.Context, fn func(Tx) error) error

	// Update calls fn with a transaction and commits what it wrote, unless fn
	// fails: then nothing happened, and Update returns fn's error. fn may be
	// called more than once when the store is shared, so it must not act on
	// anything but its Tx. A transaction that wrote nothing does not move the
	// revision.
	Update(ctx context.Context, fn func(Tx) error) error

	// Revision is the number of the newest commit. It grows by at least one
	// with each; numbers of different Store values are not comparable.
	Revision() uint64

	// Wait returns the store's revision as soon as it is greater than after.
	// It fails with the context's error or, once closed, with ErrClosed.
	Wait(ctx context.Context, after uint64) (uint64, error)

	// Close releases the store, after the transactions under way. It is
	// idempotent.
	Close() error
}

// Tx is one transaction. It is not safe for concurrent use, and byte slices it
// returns are valid until the transaction ends.
type Tx interface {
	// Get returns the value under key, or ErrNotFound. It sees the writes of
	// this transaction.
	Get(table Table, key string) ([]byte, error)
	// Put writes value under key, which must not be empty.
	Put(table Table, key string, value []byte) error
	// Delete removes key; one that is not there is no error.
	Delete(table Table, key string) error
	// Scan calls fn for each record whose key is at or after from, in the
	// bytes' order of keys, until fn fails, and returns fn's error. ErrStop
	// ends the scan without error. fn must not write to the table.
	Scan(table Table, from string, fn func(key string, value []byte) error) error
	// Sequence returns a number that no other transaction of this table ever
	// got, greater than all before it. A transaction that fails gives its
	// numbers back.
	Sequence(table Table) (uint64, error)
}

// Recent is a Tx that knows what has changed lately, so that who keeps a picture
// of a table need not read all of it again.
type Recent interface {
	// Version numbers what the transaction sees: greater after each commit. It is
	// 0 when the transaction may write, as what it sees may never be committed.
	Version() uint64
	// Changed returns the keys of a table under which this transaction may see
	// something else than one of the version since did, in no order and some of
	// them repeated; false when that is not remembered.
	Changed(table Table, since uint64) ([]string, bool)
}

// ErrStop ends a Scan early and is not returned by it.
var ErrStop = errors.New("stop the scan")

// Get decodes the record under key.
func Get[T any](tx Tx, table Table, key string) (T, error) {
	var record T
	value, err := tx.Get(table, key)
	if err != nil {
		return record, err
	}
	if err := json.Unmarshal(value, &record); err != nil {
		return record, fmt.Errorf("read %s %s from the store: %w", table, key, err)
	}
	return record, nil
}

// Put encodes a record under key.
func Put[T any](tx Tx, table Table, key string, record T) error {
	value, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("write %s %s to the store: %w", table, key, err)
	}
	return tx.Put(table, key, value)
}

// All decodes every record of a table, in the order of keys.
func All[T any](tx Tx, table Table) ([]T, error) {
	var all []T
	err := tx.Scan(table, "", func(key string, value []byte) error {
		var record T
		if err := json.Unmarshal(value, &record); err != nil {
			return fmt.Errorf("read %s %s from the store: %w", table, key, err)
		}
		all = append(all, record)
		return nil
	})
	return all, err
}
