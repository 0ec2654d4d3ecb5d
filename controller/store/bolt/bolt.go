// Package bolt is the embedded store: one bbolt file.
//
// bbolt checks its two meta pages but none of the pages with records, so each
// value carries a CRC-32C of its key and itself. Open reads every record once:
// a damaged file is refused as a whole, before the controller acts on half of
// it. What bbolt answers to damage with a panic, or the kernel with a fault in
// the mapped file, becomes the same error. Updates that come at the same time
// share a commit: combine.go.
package bolt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"dormouse/controller/store"
)

const (
	metaBucket = "dormouse"
	schemaKey  = "schema"
	// lockWait is how long Open waits for another process to let go of the file.
	lockWait = time.Second
	// mapped is address space, not memory: a file that outgrows its mapping
	// makes writers wait for all readers.
	mapped = 256 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Store is a store.Store in one file.
type Store struct {
	db      *bbolt.DB
	history *history

	mu        sync.Mutex
	revision  uint64
	changed   chan struct{} // closed at the next commit
	closed    chan struct{}
	queue     []*change // wait for the next commit
	combining bool      // a goroutine commits them
}

var _ store.Store = (*Store)(nil)

// Open opens the store in file, and makes it when it is not there. The error
// names the file and what to do. A store of an older schema is copied to
// FILE.schema-N, and then brought to the present one.
func Open(file string) (*Store, error) { return open(file, store.Upgrades()) }

func open(file string, plan store.Plan) (*Store, error) {
	db, err := openChecked(file, plan)
	if err != nil {
		return nil, err
	}
	return &Store{db: db, history: newHistory(), revision: 1, changed: make(chan struct{}), closed: make(chan struct{})}, nil
}

// openChecked opens file, brings it to the present schema and reads all of it.
func openChecked(file string, plan store.Plan) (db *bbolt.DB, err error) {
	var handle *os.File
	// A mapped page beyond the end of a truncated file faults.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if broken := recover(); broken != nil {
			err = &store.DamagedError{Where: file, What: fmt.Sprint(broken)}
		}
		if err != nil && handle != nil {
			// A panic leaves the mapping, and through it the lock, behind.
			unix.Flock(int(handle.Fd()), unix.LOCK_UN)
			handle.Close()
		}
	}()
	db, err = bbolt.Open(file, 0o600, &bbolt.Options{
		InitialMmapSize: mapped,
		Timeout:         lockWait,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			var err error
			handle, err = os.OpenFile(name, flag, mode)
			return handle, err
		},
	})
	if err != nil {
		return nil, openError(file, err)
	}
	if err := prepare(db, file, plan); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func openError(file string, err error) error {
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("the store %s is in use by another process: stop that controller first", file)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return &store.DamagedError{Where: file, What: err.Error()}
	}
	var path *os.PathError
	if errors.As(err, &path) {
		return fmt.Errorf("open the store: %w", err)
	}
	return &store.DamagedError{Where: file, What: err.Error()}
}

// prepare checks the file's length, schema and records, makes the tables of a new
// file and upgrades an old one.
func prepare(db *bbolt.DB, file string, plan store.Plan) error {
	info, err := os.Stat(file)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	schema := 0 // of a new file
	err = db.View(func(tx *bbolt.Tx) error {
		if info.Size() < tx.Size() {
			return &store.DamagedError{Where: file, What: fmt.Sprintf("it has %d bytes and should have %d", info.Size(), tx.Size())}
		}
		meta := tx.Bucket([]byte(metaBucket))
		if meta == nil {
			return checkForeign(tx, file)
		}
		if schema, err = readSchema(meta, file, plan); err != nil {
			return err
		}
		return checkRecords(tx, file, plan.Tables(schema))
	})
	switch {
	case err != nil:
		return err
	case schema == plan.Schema():
		return nil
	case schema > 0:
		if err := keepCopy(db, fmt.Sprintf("%s.schema-%d", file, schema)); err != nil {
			return err
		}
	}
	return db.Update(func(tx *bbolt.Tx) error { return upgrade(tx, schema, plan) })
}

// checkForeign refuses a bbolt file that belongs to another program.
func checkForeign(tx *bbolt.Tx, file string) error {
	if name, _ := tx.Cursor().First(); name != nil {
		return &store.DamagedError{Where: file, What: fmt.Sprintf("it holds %q, which is not Dormouse's", name)}
	}
	return nil
}

func readSchema(meta *bbolt.Bucket, file string, plan store.Plan) (int, error) {
	raw := meta.Get([]byte(schemaKey))
	if len(raw) != 8 {
		return 0, &store.DamagedError{Where: file, What: "it names no schema"}
	}
	switch schema := binary.BigEndian.Uint64(raw); {
	case schema == 0:
		return 0, &store.DamagedError{Where: file, What: "it names no schema"}
	case schema > uint64(plan.Schema()):
		return 0, &store.NewerSchemaError{Where: file, Schema: int(schema), Known: plan.Schema()}
	default:
		return int(schema), nil
	}
}

func checkRecords(tx *bbolt.Tx, file string, tables []store.Table) error {
	for _, table := range tables {
		bucket := tx.Bucket([]byte(table))
		if bucket == nil {
			return &store.DamagedError{Where: file, What: fmt.Sprintf("table %s is missing", table)}
		}
		err := bucket.ForEach(func(key, sealed []byte) error {
			_, err := unseal(table, key, sealed)
			return err
		})
		if err != nil {
			return &store.DamagedError{Where: file, What: err.Error()}
		}
	}
	return nil
}

// keepCopy leaves a copy of the whole file beside it, for the way back.
func keepCopy(db *bbolt.DB, to string) (err error) {
	temporary, err := os.CreateTemp(filepath.Dir(to), ".copy-*") // mode 0600
	if err == nil {
		defer os.Remove(temporary.Name())
		err = db.View(func(tx *bbolt.Tx) error {
			_, err := tx.WriteTo(temporary)
			return err
		})
		err = errors.Join(err, temporary.Sync(), temporary.Close())
	}
	if err == nil {
		err = os.Rename(temporary.Name(), to)
	}
	if err != nil {
		return fmt.Errorf("keep a copy of the store before its upgrade: %w", err)
	}
	return nil
}

// upgrade makes all tables and takes every step from schema, 0 being that of an
// empty file, to the plan's.
func upgrade(tx *bbolt.Tx, schema int, plan store.Plan) error {
	for _, table := range plan.Tables(plan.Schema()) {
		if _, err := tx.CreateBucketIfNotExists([]byte(table)); err != nil {
			return fmt.Errorf("make table %s: %w", table, err)
		}
	}
	if schema > 0 {
		if err := plan.Run(&transaction{tx: tx}, schema); err != nil {
			return err
		}
	}
	meta, err := tx.CreateBucketIfNotExists([]byte(metaBucket))
	if err != nil {
		return fmt.Errorf("write the store's schema: %w", err)
	}
	return meta.Put([]byte(schemaKey), binary.BigEndian.AppendUint64(nil, uint64(plan.Schema())))
}

// seal puts the check sum of key and value before value.
func seal(key string, value []byte) []byte {
	sum := crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, value)
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(value)), sum), value...)
}

func unseal(table store.Table, key, sealed []byte) ([]byte, error) {
	if len(sealed) < 4 {
		return nil, fmt.Errorf("record %s of table %s is cut short", key, table)
	}
	value := sealed[4:]
	if crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value) != binary.BigEndian.Uint32(sealed) {
		return nil, fmt.Errorf("record %s of table %s has a wrong check sum", key, table)
	}
	return value, nil
}

// View implements store.Store.
func (s *Store) View(ctx context.Context, fn func(store.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return closedError(s.db.View(func(tx *bbolt.Tx) error { return fn(&transaction{tx: tx, history: s.history}) }))
}

func closedError(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return store.ErrClosed
	}
	return err
}

// advance wakes everyone in Wait.
func (s *Store) advance() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	close(s.changed)
	s.changed = make(chan struct{})
}

// Revision implements store.Store.
func (s *Store) Revision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

// Wait implements store.Store.
func (s *Store) Wait(ctx context.Context, after uint64) (uint64, error) {
	for {
		s.mu.Lock()
		revision, changed := s.revision, s.changed
		s.mu.Unlock()
		if revision > after {
			return revision, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return revision, ctx.Err()
		case <-s.closed:
			return revision, store.ErrClosed
		}
	}
}

// Close implements store.Store.
func (s *Store) Close() error {
	s.mu.Lock()
	select {
	case <-s.closed:
		s.mu.Unlock()
		return nil
	default:
		close(s.closed)
	}
	s.mu.Unlock()
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close the store: %w", err)
	}
	return nil
}

// transaction is a store.Tx on a bbolt transaction.
type transaction struct {
	tx      *bbolt.Tx
	history *history
	wrote   bool
	log     []former // of what it wrote; see undo
	// keys are those that this one and the others of its commit have written, those
	// of failed ones among them; nil where nothing may be written.
	keys map[store.Table][]string
}

func (t *transaction) bucket(table store.Table) (*bbolt.Bucket, error) {
	bucket := t.tx.Bucket([]byte(table))
	if bucket == nil {
		return nil, fmt.Errorf("the store has no table %q", table)
	}
	return bucket, nil
}

func (t *transaction) Get(table store.Table, key string) ([]byte, error) {
	bucket, err := t.bucket(table)
	if err != nil {
		return nil, err
	}
	sealed := bucket.Get([]byte(key))
	if sealed == nil {
		return nil, store.ErrNotFound
	}
	return unseal(table, []byte(key), sealed)
}

func (t *transaction) Put(table store.Table, key string, value []byte) error {
	bucket, err := t.bucket(table)
	if err != nil {
		return err
	}
	if t.tx.Writable() && key != "" {
		t.remember(table, bucket, key)
	}
	if err := bucket.Put([]byte(key), seal(key, value)); err != nil {
		return fmt.Errorf("write %s %s to the store: %w", table, key, err)
	}
	return nil
}

func (t *transaction) Delete(table store.Table, key string) error {
	bucket, err := t.bucket(table)
	if err != nil {
		return err
	}
	if t.tx.Writable() && key != "" {
		t.remember(table, bucket, key)
	}
	if err := bucket.Delete([]byte(key)); err != nil {
		return fmt.Errorf("delete %s %s from the store: %w", table, key, err)
	}
	return nil
}

func (t *transaction) Scan(table store.Table, from string, fn func(string, []byte) error) error {
	bucket, err := t.bucket(table)
	if err != nil {
		return err
	}
	cursor := bucket.Cursor()
	for key, sealed := cursor.Seek([]byte(from)); key != nil; key, sealed = cursor.Next() {
		value, err := unseal(table, key, sealed)
		if err != nil {
			return err
		}
		if err := fn(string(key), value); err != nil {
			if errors.Is(err, store.ErrStop) {
				return nil
			}
			return err
		}
	}
	return nil
}

func (t *transaction) Sequence(table store.Table) (uint64, error) {
	bucket, err := t.bucket(table)
	if err != nil {
		return 0, err
	}
	before := bucket.Sequence()
	n, err := bucket.NextSequence()
	if err != nil {
		return 0, fmt.Errorf("number a record of %s: %w", table, err)
	}
	t.log, t.wrote = append(t.log, former{bucket: bucket, sequence: before}), true
	return n, nil
}

// Copy implements store.Copier.
func (s *Store) Copy(ctx context.Context, fn func(store.Item) error) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	err := s.db.View(func(tx *bbolt.Tx) error {
		own := &transaction{tx: tx}
		for _, table := range store.Tables() {
			if n := tx.Bucket([]byte(table)).Sequence(); n > 0 {
				if err := fn(store.Item{Table: table, Sequence: n}); err != nil {
					return err
				}
			}
			err := own.Scan(table, "", func(key string, value []byte) error {
				return fn(store.Item{Table: table, Key: key, Value: value})
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return store.Schema, closedError(err)
}

// Write makes a store of the items of a copy in file, which must not be there:
// with the schema that they have. Open upgrades it.
func Write(file string, schema int, items iter.Seq2[store.Item, error]) (err error) {
	if _, err := os.Stat(file); err == nil {
		return fmt.Errorf("%s is there already", file)
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: lockWait})
	if err != nil {
		return fmt.Errorf("make the store %s: %w", file, err)
	}
	defer func() {
		err = errors.Join(err, db.Close())
		if err != nil {
			os.Remove(file)
		}
	}()
	return db.Update(func(tx *bbolt.Tx) error {
		// The tables of that schema, without its steps: the items have them behind them.
		plan := store.Upgrades()[:schema-1]
		if err := upgrade(tx, 0, plan); err != nil {
			return err
		}
		own := &transaction{tx: tx}
		for item, err := range items {
			if err != nil {
				return err
			}
			bucket, err := own.bucket(item.Table)
			if err != nil {
				return err
			}
			if item.Key == "" {
				err = bucket.SetSequence(item.Sequence)
			} else {
				err = own.Put(item.Table, item.Key, item.Value)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}
