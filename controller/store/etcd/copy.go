package etcd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"dormouse/controller/store"
)

// batch is how many bytes of a copy are written at once, well below what etcd
// accepts (1.5 MiB).
const batch = 512 << 10

// Copy implements store.Copier.
func (s *Store) Copy(ctx context.Context, fn func(store.Item) error) (int, error) {
	if err := s.fresh(ctx); err != nil {
		return 0, err
	}
	return s.copy(fn)
}

func (s *Store) copy(fn func(store.Item) error) (int, error) {
	s.mu.Lock()
	image, err := s.image, s.broken
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	for _, name := range slices.Sorted(maps.Keys(image.tables)) {
		t := image.tables[name]
		if t.sequence > 0 {
			if err := fn(store.Item{Table: name, Sequence: t.sequence}); err != nil {
				return 0, err
			}
		}
		err := scan(t, "", func(key string, value []byte) error {
			return fn(store.Item{Table: name, Key: key, Value: value})
		})
		if err != nil {
			return 0, err
		}
	}
	return image.schema, nil
}

// Restore makes the items of a copy, with the schema that they have, the contents
// of the store; the next leader upgrades them. What the store had is lost, which
// needs force unless that is nothing. It is refused while a controller is there.
// When it is interrupted the store can only be restored again.
func Restore(ctx context.Context, options Options, force bool, schema int, items iter.Seq2[store.Item, error]) error {
	s, err := connect(options, store.Upgrades())
	if err != nil {
		return err
	}
	defer s.client.Close()
	defer s.end()
	r := &restoring{s: s, ctx: ctx, mark: unfinished + s.name}
	if err := r.begin(force); err != nil {
		return err
	}
	for item, err := range items {
		if err != nil {
			return fmt.Errorf("%w; the store %s is incomplete and must be restored again", err, s.where())
		}
		if err := r.add(item); err != nil {
			return err
		}
	}
	return r.end(schema)
}

// restoring writes a copy into etcd, piece by piece.
type restoring struct {
	s      *Store
	ctx    context.Context
	mark   string // the schema meanwhile
	pieces []clientv3.Op
	size   int
}

// begin empties the store. From here on it cannot be used by anyone else.
func (r *restoring) begin(force bool) error {
	s := r.s
	nobody := s.nobody()
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	conditions := []clientv3.Cmp{nobody.condition}
	if !force {
		for _, part := range []string{keyRecord, keyShared} {
			conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(s.prefix+part), "=", 0).WithPrefix())
		}
	}
	response, err := s.client.Txn(ctx).If(conditions...).
		Then(clientv3.OpDelete(s.prefix+keyRecord, clientv3.WithPrefix()), clientv3.OpDelete(s.prefix+keySequence, clientv3.WithPrefix()),
			clientv3.OpDelete(s.prefix+keyShared), clientv3.OpPut(s.prefix+keySchema, r.mark), clientv3.OpPut(s.prefix+keyCommit, r.mark)).
		Else(nobody.key).
		Commit()
	if err != nil {
		return s.explain(err)
	}
	if response.Succeeded {
		return nil
	}
	if err := nobody.broken((*clientv3.GetResponse)(response.Responses[0].GetResponseRange())); err != nil {
		return err
	}
	return &store.NotEmptyError{Where: s.where()}
}

func (r *restoring) add(item store.Item) error {
	key, value := recordKey(item.Table, item.Key), []byte(nil)
	if item.Key == "" {
		key, value = keySequence+string(item.Table), fmt.Append(nil, item.Sequence)
	} else {
		value = seal(item.Key, item.Value)
	}
	if size := len(key) + len(value); r.size+size > batch || len(r.pieces) == widest*widest {
		if err := r.write(); err != nil {
			return err
		}
	}
	r.pieces = append(r.pieces, clientv3.OpPut(r.s.prefix+key, string(value)))
	r.size += len(key) + len(value)
	return nil
}

var errDisturbed = errors.New("something else changed the store while it was restored: restore it again when it is alone")

// write sends the pieces that were gathered.
func (r *restoring) write(more ...clientv3.Op) error {
	ctx, cancel := context.WithTimeout(r.ctx, 2*patience)
	defer cancel()
	response, err := r.s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.Value(r.s.prefix+keySchema), "=", r.mark)).
		Then(append(nest(r.pieces), more...)...).
		Commit()
	if err != nil {
		return fmt.Errorf("%w; the store is incomplete and must be restored again", r.s.explain(err))
	}
	if !response.Succeeded {
		return errDisturbed
	}
	r.pieces, r.size = nil, 0
	return nil
}

// end makes the store usable.
func (r *restoring) end(schema int) error {
	return r.write(clientv3.OpPut(r.s.prefix+keySchema, fmt.Sprint(schema)), clientv3.OpPut(r.s.prefix+keyCommit, r.s.name))
}
