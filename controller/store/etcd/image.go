package etcd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/tidwall/btree"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"dormouse/controller/store"
)

// The keys below the prefix.
const (
	keySchema   = "schema"
	keyCommit   = "commit"
	keyShared   = "keys"
	keyLead     = "lead/"
	keyRecord   = "r/"
	keySequence = "s/"
)

// unfinished begins the schema of a store into which a copy is being written.
const (
	unfinished       = "unfinished "
	unfinishedSchema = -1
)

// page is how many keys are read at once.
const page = 2000

// image is one picture of the store. It is never changed: see with.
type image struct {
	schema   int
	revision int64  // of etcd, up to which it is complete
	commit   int64  // mod revision of the newest commit
	commitID string // its value
	tables   map[store.Table]table
}

type table struct {
	records  *btree.Map[string, []byte]
	sequence uint64
}

func newImage() *image { return &image{tables: make(map[store.Table]table)} }

func (i *image) records() (count int) {
	for _, t := range i.tables {
		count += t.records.Len()
	}
	return count
}

// builder makes the next image of one. Tables that change are copied first, on
// write, so that the pictures of transactions under way stay as they are.
type builder struct {
	image
	own map[store.Table]bool
}

// build begins the next image. The caller holds the lock of the Store: copying a
// tree marks the one that is copied.
func (i *image) build() *builder {
	b := &builder{image: *i, own: make(map[store.Table]bool)}
	b.tables = make(map[store.Table]table, len(i.tables))
	for name, t := range i.tables {
		b.tables[name] = t
	}
	return b
}

func (b *builder) table(name store.Table) table {
	t := b.tables[name]
	if !b.own[name] {
		if t.records == nil {
			t.records = &btree.Map[string, []byte]{}
		} else {
			t.records = t.records.Copy()
		}
		b.tables[name], b.own[name] = t, true
	}
	return t
}

// set takes over what is now under a key of etcd, which has no prefix any more;
// value is nil when it was deleted.
func (b *builder) set(key string, value []byte, revision int64) error {
	switch {
	case key == keySchema && strings.HasPrefix(string(value), unfinished):
		b.schema = unfinishedSchema
	case key == keySchema:
		schema, err := strconv.Atoi(string(value))
		if err != nil || schema < 1 {
			return fmt.Errorf("its schema is %q", value)
		}
		b.schema = schema
	case key == keyCommit:
		b.commit, b.commitID = revision, string(value)
	case strings.HasPrefix(key, keyRecord):
		name, record, ok := strings.Cut(key[len(keyRecord):], "/")
		if !ok {
			return fmt.Errorf("the key %q is of no table", key)
		}
		return b.setRecord(store.Table(name), record, value)
	case strings.HasPrefix(key, keySequence):
		return b.setSequence(store.Table(key[len(keySequence):]), value)
	}
	return nil
}

func (b *builder) setRecord(name store.Table, key string, sealed []byte) error {
	t := b.table(name)
	if sealed == nil {
		t.records.Delete(key)
		return nil
	}
	value, err := unseal(key, sealed)
	if err != nil {
		return fmt.Errorf("record %s of table %s %w", key, name, err)
	}
	t.records.Set(key, value)
	return nil
}

func (b *builder) setSequence(name store.Table, value []byte) error {
	t := b.table(name)
	t.sequence = 0
	if value != nil {
		n, err := strconv.ParseUint(string(value), 10, 64)
		if err != nil {
			return fmt.Errorf("the sequence of table %s is %q", name, value)
		}
		t.sequence = n
	}
	b.tables[name] = t
	return nil
}

// load reads everything below the prefix, as of one revision, which it returns.
func (s *Store) load(ctx context.Context) (int64, error) {
	b := newImage().build()
	candidates := make(map[string]candidate)
	from, end := s.prefix, clientv3.GetPrefixRangeEnd(s.prefix)
	for {
		options := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend)}
		if b.revision != 0 {
			options = append(options, clientv3.WithRev(b.revision))
		}
		response, err := s.client.Get(ctx, from, options...)
		if err != nil {
			return 0, s.explain(err)
		}
		if b.revision == 0 {
			b.revision = response.Header.Revision
		}
		for _, kv := range response.Kvs {
			if err := s.take(b, candidates, kv); err != nil {
				return 0, err
			}
			from = string(kv.Key) + "\x00"
		}
		if !response.More {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending.skipped(b.commitID)
	s.publish(&b.image, candidates)
	return b.revision, nil
}

func (s *Store) take(b *builder, candidates map[string]candidate, kv *mvccpb.KeyValue) error {
	key := strings.TrimPrefix(string(kv.Key), s.prefix)
	if strings.HasPrefix(key, keyLead) {
		candidates[key] = readCandidate(kv)
		return nil
	}
	if err := b.set(key, kv.Value, kv.ModRevision); err != nil {
		return &store.DamagedError{Where: s.where(), What: err.Error()}
	}
	return nil
}

// publish shows the next picture to everyone. The caller holds the lock.
func (s *Store) publish(next *image, candidates map[string]candidate) {
	s.image, s.candidates = next, candidates
	s.announce()
}

// announce wakes everyone in until. The caller holds the lock.
func (s *Store) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// breakDown makes everything fail from now on.
func (s *Store) breakDown(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil {
		s.broken = err
		s.log.Error("the store cannot be used any more", "error", err)
		s.announce()
	}
}

// follow keeps the copy in memory current, until the Store is closed. The watch
// goes on after the revision that it told of last, not that of the picture:
// commits of this Store's own get there earlier.
func (s *Store) follow(watched int64) {
	for s.life.Err() == nil {
		err := s.watch(&watched)
		if errors.Is(err, rpctypes.ErrCompacted) {
			watched, err = s.reload(watched)
		}
		if err == nil || s.life.Err() != nil {
			continue
		}
		s.log.Warn("lost the watch of etcd", "error", err)
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.life.Done():
		}
	}
}

// reload reads everything anew: the history that was missed exists no more.
func (s *Store) reload(watched int64) (int64, error) {
	ctx, cancel := context.WithTimeout(s.life, 10*patience)
	defer cancel()
	revision, err := s.load(ctx)
	var damaged *store.DamagedError
	if errors.As(err, &damaged) {
		s.breakDown(err)
	}
	if err != nil {
		return watched, err
	}
	return revision, nil
}

// watch applies what etcd tells of changes after watched, until that breaks.
func (s *Store) watch(watched *int64) error {
	ctx, cancel := context.WithCancel(s.life)
	defer cancel()
	// A member that lost the others tells nothing new, and only so does it say that.
	events := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix, clientv3.WithPrefix(), clientv3.WithRev(*watched+1))
	for response := range events {
		if err := response.Err(); err != nil {
			return err
		}
		if len(response.Events) == 0 {
			continue
		}
		if err := s.apply(response.Events); err != nil {
			s.breakDown(err)
			return err
		}
		*watched = response.Events[len(response.Events)-1].Kv.ModRevision
	}
	return errors.New("the watch has ended")
}

// apply takes over the changes of one answer; etcd never splits a transaction
// between two. Commits that are in the picture already are passed over.
func (s *Store) apply(events []*clientv3.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.image.build()
	candidates := maps.Clone(s.candidates)
	for _, e := range events {
		key := strings.TrimPrefix(string(e.Kv.Key), s.prefix)
		switch {
		case strings.HasPrefix(key, keyLead):
			delete(candidates, key)
			if e.Type == clientv3.EventTypePut {
				candidates[key] = readCandidate(e.Kv)
			}
			continue
		case e.Kv.ModRevision <= s.image.revision:
			continue
		case key == keyCommit:
			s.pending.follows(b.commit, string(e.Kv.Value))
		}
		value := e.Kv.Value
		if e.Type == clientv3.EventTypeDelete {
			value = nil
		} else if value == nil {
			value = []byte{} // protobuf knows no difference
		}
		if err := b.set(key, value, e.Kv.ModRevision); err != nil {
			return &store.DamagedError{Where: s.where(), What: err.Error()}
		}
		b.revision = e.Kv.ModRevision
	}
	if b.schema > s.plan.Schema() {
		return &store.NewerSchemaError{Where: s.where(), Schema: b.schema, Known: s.plan.Schema()}
	}
	s.publish(&b.image, candidates)
	return nil
}
