// Package etcd is the store that several controllers share: a range of keys of
// an etcd cluster, version 3.4 or newer.
//
// # Reading
//
// Every Store keeps a copy of all records in memory, which a watch keeps current,
// so a transaction reads without a round trip, from one picture that never
// changes under it. Before a View or an Update, Store asks etcd for the newest
// commit and waits for its copy to hold it: what any controller was told is
// committed is seen by all. The leader (see Term) needs not ask while its lease
// certainly lasts, because nobody else can have written.
//
// # Writing
//
// A commit is one etcd transaction: all its writes, and the key "commit", which
// every commit writes. It is made on the condition that "commit" has not changed
// since the picture that the transaction read. So nothing at all was committed
// in between, whatever the transaction read, one record or a range of them, and
// whatever appeared in or vanished from such a range. When the condition fails
// the function is called again with a newer picture. That two writers disturb
// each other even where they touch different records costs nothing here: within
// a process they take turns, and of all processes only the leader writes.
//
// Further conditions guard every commit: the schema is the one that this program
// knows, and
//
//   - for a Term: its election key is still the one it was elected with. This
//     fences a leader that was replaced: etcd itself refuses its writes.
//   - for a Store: nobody leads or stands for election. It is the way for tools
//     that need the store for themselves.
//
// When an answer is lost, the same commit is tried again: it cannot happen twice,
// and the value of "commit" tells whether it did happen. Only when etcd stays
// away does Update give up, with an error that says that it does not know.
//
// # Limits
//
// etcd refuses transactions of more than 128 operations (--max-txn-ops) at one
// level; larger ones are sent as nested transactions, which allows 64,000
// records. It refuses requests of more than 1.5 MiB (--max-request-bytes);
// values are compressed, and what is still larger is refused with a sentence
// that names the option. The leader compacts etcd's history as it grows.
//
// # Keys
//
// Below the prefix, which is the whole of what Dormouse touches:
//
//	schema        the number of the schema
//	commit        a name of the newest commit; its mod revision is the store's revision
//	keys          what all controllers must have in common, encrypted by its owner
//	lead/LEASE    a candidate; of all, the one created first leads
//	r/TABLE/KEY   a record: how it is encoded, check sum, value
//	s/TABLE       the last number that Sequence gave
package etcd

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"dormouse/controller/store"
)

const (
	// DefaultPrefix is where the keys are unless told otherwise.
	DefaultPrefix = "/dormouse/"
	// DefaultLease lets a dead leader be replaced well within ten seconds.
	DefaultLease = 5 * time.Second
	// patience is how long a transaction bears with an etcd that does not answer.
	patience = 5 * time.Second
	// maxRequest is what the client is willing to send; the server decides.
	maxRequest = 256 << 20
)

// reconnecting is how an etcd that went away is looked for. By itself gRPC would
// rest for up to two minutes between two attempts.
var reconnecting = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
	MinConnectTimeout: patience,
}

// Options say where etcd is.
type Options struct {
	// Endpoints are the URLs of the members: http://HOST:PORT or https://HOST:PORT.
	Endpoints []string
	// Prefix of all keys; DefaultPrefix when empty. Installations that share an
	// etcd have different ones.
	Prefix string
	// TLS is for https endpoints; nil: the system's authorities, no client certificate.
	TLS *tls.Config
	// User and Password, where etcd asks for them.
	User, Password string
	// Lease is how long etcd holds on to a leader that it does not hear of; a dead
	// one is replaced after this and what etcd needs to notice, up to a second.
	// DefaultLease when zero; etcd has none below two seconds.
	Lease  time.Duration
	Logger *slog.Logger // nil: none
}

// Store is a store.Store in etcd.
type Store struct {
	options Options
	plan    store.Plan // of schemas
	prefix  string
	client  *clientv3.Client
	log     *slog.Logger
	name    string        // of this Store's commits
	commits atomic.Uint64 // numbers them
	writing chan struct{} // holds one value while nobody writes

	mu         sync.Mutex
	image      *image
	candidates map[string]candidate // by key
	pending    *pending             // the commit whose outcome is awaited
	broken     error                // why the contents cannot be trusted any more
	changed    chan struct{}        // closed when anything above changes

	life context.Context // of the Store
	end  context.CancelFunc
	work sync.WaitGroup
}

var _ store.Store = (*Store)(nil)

// Open connects to etcd and reads everything below the prefix; an empty prefix
// becomes a store of the present schema. It fails within seconds when etcd does
// not answer.
func Open(ctx context.Context, options Options) (*Store, error) {
	return open(ctx, options, store.Upgrades())
}

func open(ctx context.Context, options Options, plan store.Plan) (*Store, error) {
	s, err := connect(options, plan)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	revision, err := s.load(ctx)
	if err == nil {
		revision, err = s.prepare(ctx, revision)
	}
	if err != nil {
		err = s.untrusted(err)
		s.end()
		s.client.Close()
		return nil, err
	}
	s.work.Go(func() { s.follow(revision) })
	return s, nil
}

func connect(options Options, plan store.Plan) (*Store, error) {
	if len(options.Endpoints) == 0 {
		return nil, fmt.Errorf("there are no etcd endpoints: name at least one, as in https://10.0.0.1:2379")
	}
	if options.Prefix == "" {
		options.Prefix = DefaultPrefix
	}
	if !strings.HasSuffix(options.Prefix, "/") {
		options.Prefix += "/"
	}
	if options.Lease == 0 {
		options.Lease = DefaultLease
	}
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		options: options, plan: plan, prefix: options.Prefix, log: options.Logger, name: rand.Text(),
		writing: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	s.writing <- struct{}{}
	s.life, s.end = context.WithCancel(context.Background())
	client, err := clientv3.New(clientv3.Config{
		Endpoints: options.Endpoints, TLS: options.TLS, Username: options.User, Password: options.Password,
		Context: s.life, Logger: zap.NewNop(), MaxCallSendMsgSize: maxRequest,
		DialTimeout: patience, DialKeepAliveTime: patience, DialKeepAliveTimeout: patience, PermitWithoutStream: true,
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(reconnecting)},
	})
	if err != nil {
		err = s.untrusted(s.explain(err))
		s.end()
		return nil, err
	}
	s.client = client
	return s, nil
}

// prepare writes the schema into an empty store, and checks that of another.
func (s *Store) prepare(ctx context.Context, revision int64) (int64, error) {
	if s.image.schema != 0 {
		return revision, s.checkSchema(s.image)
	}
	if s.image.records() > 0 {
		return 0, &store.DamagedError{Where: s.where(), What: "it has records and names no schema"}
	}
	key := s.prefix + keySchema
	// Another controller may do the same at the same time.
	response, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, fmt.Sprint(s.plan.Schema()))).
		Commit()
	if err != nil {
		return 0, s.explain(err)
	}
	if !response.Succeeded {
		if revision, err = s.load(ctx); err != nil {
			return 0, err
		}
		return revision, s.checkSchema(s.image)
	}
	s.image.schema = s.plan.Schema()
	return revision, nil
}

// checkSchema refuses what can never be used. An older schema can: see ready.
func (s *Store) checkSchema(image *image) error {
	switch {
	case image.schema > s.plan.Schema():
		return &store.NewerSchemaError{Where: s.where(), Schema: image.schema, Known: s.plan.Schema()}
	case image.schema == unfinishedSchema:
		return fmt.Errorf("a copy was being restored into the store %s and is not complete: restore it again with --force", s.where())
	}
	return nil
}

// ready refuses a picture of an older schema: only the leader upgrades it, when
// it is elected, so that an older dormouse that leads now is not disturbed.
func (s *Store) ready(image *image) error {
	if image.schema == s.plan.Schema() {
		return nil
	}
	return &store.OlderSchemaError{Where: s.where(), Schema: image.schema}
}

// where names the store in errors.
func (s *Store) where() string {
	return s.prefix + " in " + s.members()
}

// members names the etcd in errors.
func (s *Store) members() string { return "etcd at " + strings.Join(s.options.Endpoints, ", ") }

// View implements store.Store.
func (s *Store) View(ctx context.Context, fn func(store.Tx) error) error {
	if err := s.fresh(ctx); err != nil {
		return err
	}
	return s.look(fn)
}

// look calls fn with the picture that is in memory.
func (s *Store) look(fn func(store.Tx) error) error {
	s.mu.Lock()
	image, err := s.image, s.broken
	s.mu.Unlock()
	if err == nil {
		err = s.ready(image)
	}
	if err != nil {
		return err
	}
	return fn(&reader{s, image})
}

// fresh returns when the copy in memory holds every commit that was made before
// the call.
func (s *Store) fresh(ctx context.Context) error {
	if err := s.usable(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	response, err := s.client.Get(ctx, s.prefix+keyCommit)
	if err != nil {
		return s.explain(err)
	}
	if len(response.Kvs) == 0 {
		return nil
	}
	return s.reach(ctx, response.Kvs[0].ModRevision)
}

// reach waits for the copy in memory to hold the commit of that revision.
func (s *Store) reach(ctx context.Context, commit int64) error {
	err := s.until(ctx, func() bool { return s.image.commit >= commit })
	if err != nil && ctx.Err() != nil && s.life.Err() == nil {
		return fmt.Errorf("%s tells of changes too late (%w): look whether it is overloaded", s.members(), err)
	}
	return err
}

// until waits for cond, which is called with the lock held.
func (s *Store) until(ctx context.Context, cond func() bool) error {
	for {
		s.mu.Lock()
		changed, done, broken := s.changed, cond(), s.broken
		s.mu.Unlock()
		switch {
		case s.life.Err() != nil:
			return store.ErrClosed
		case broken != nil:
			return broken
		case done:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.life.Done():
		}
	}
}

// usable fails when the store is closed or ctx has ended.
func (s *Store) usable(ctx context.Context) error {
	if s.life.Err() != nil {
		return store.ErrClosed
	}
	return ctx.Err()
}

// Revision implements store.Store.
func (s *Store) Revision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.image.commit)
}

// Wait implements store.Store.
func (s *Store) Wait(ctx context.Context, after uint64) (uint64, error) {
	err := s.until(ctx, func() bool { return uint64(s.image.commit) > after })
	return s.Revision(), err
}

// Close implements store.Store.
func (s *Store) Close() error {
	if s.life.Err() != nil {
		return nil
	}
	select {
	case <-s.writing: // after the commit under way; its patience is bounded
		defer func() { s.writing <- struct{}{} }()
	case <-s.life.Done():
		return nil
	}
	s.end()
	s.work.Wait()
	s.client.Close() // its error is that its context has ended
	return nil
}

// Shared returns what the controllers keep in common beside the records; when
// there is nothing, offer becomes it, unless that is nil.
func (s *Store) Shared(ctx context.Context, offer []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	key := s.prefix + keyShared
	if offer != nil {
		_, err := s.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, string(offer))).
			Commit()
		if err != nil {
			return nil, s.explain(err)
		}
	}
	response, err := s.client.Get(ctx, key)
	if err != nil {
		return nil, s.explain(err)
	}
	if len(response.Kvs) == 0 {
		return nil, nil
	}
	return response.Kvs[0].Value, nil
}
