package repository

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"dormouse/repository/backend"
)

// A lease keeps garbage collection from deleting what an upload refers to. It
// is a lock object that is replaced by a newer one every third of its time to
// live: "lease-<id>-<n>". A lease is alive while its newest object is younger
// than that time, by the backend's clock. The object before the newest stays,
// so that a List that runs beside a renewal sees one of the two.
//
// Its "knows" are the condemned lists (see gc.go) its holder has read and will
// not refer to. A list is only carried out when every living lease knows it.
type lease struct {
	repo   *Repository
	prefix string // of the object's name
	record leaseRecord
	// avoid are the packs and parts that the known lists condemn.
	avoid map[ID]bool

	stop context.CancelFunc
	done chan struct{}
	// writing holds a token while nobody writes a lease object.
	writing chan struct{}

	mu      sync.Mutex // of what follows and of record; never held while writing
	n       int        // of the last object that was tried
	written []int      // objects that exist, oldest first
	renewed time.Time  // before the last successful write began
	lost    bool
}

// leaseRecord is the content of a lease object.
type leaseRecord struct {
	Format  int       `json:"dormouse_lease"`
	ID      string    `json:"id"`
	Holder  string    `json:"holder"`
	Created time.Time `json:"created"`
	TTL     int64     `json:"ttl_ms"`
	Knows   []string  `json:"knows"`
}

const (
	maxLeaseTTL     = time.Hour
	leasePrefix     = "lease-"
	condemnedPrefix = "condemned-"
	collectorPrefix = "gc-"
	releasedPrefix  = "released-"
	lockLimit       = 256 << 20
)

// acquire takes a lease, reads the condemned lists, and then brings the index
// up to date: in this order, so that what it does not avoid stays.
func (r *Repository) acquire(ctx context.Context, holder string) (*lease, error) {
	l, err := r.newLease(ctx, leasePrefix, holder)
	if err != nil {
		return nil, err
	}
	if err := l.learn(ctx); err != nil {
		l.release()
		return nil, err
	}
	if err := r.sync(ctx); err != nil {
		l.release()
		return nil, err
	}
	return l, nil
}

// newLease writes a lease and keeps it until release.
func (r *Repository) newLease(ctx context.Context, prefix, holder string) (*lease, error) {
	l := &lease{
		repo:    r,
		prefix:  prefix,
		record:  leaseRecord{Format: 1, ID: rand.Text(), Holder: holder, Created: time.Now().UTC(), TTL: r.ttl.Milliseconds()},
		avoid:   make(map[ID]bool),
		done:    make(chan struct{}),
		writing: make(chan struct{}, 1),
	}
	l.writing <- struct{}{}
	if err := l.renew(ctx); err != nil {
		return nil, fmt.Errorf("take a lease on the repository in %s: %w", r.be.Location(), err)
	}
	renewing, stop := context.WithCancel(context.WithoutCancel(ctx))
	l.stop = stop
	go l.keep(renewing)
	return l, nil
}

// learn reads the condemned lists and says so in the lease.
func (l *lease) learn(ctx context.Context) error {
	known, err := l.readCondemned(ctx)
	if err != nil || len(known) == 0 {
		return err
	}
	l.mu.Lock()
	l.record.Knows = known
	l.mu.Unlock()
	return l.renew(ctx)
}

// readCondemned fills avoid and returns the names of the lists.
func (l *lease) readCondemned(ctx context.Context) (names []string, err error) {
	lists, err := l.repo.condemned(ctx)
	for _, c := range lists {
		names = append(names, c.name)
		for _, id := range append(c.Packs, c.Parts...) {
			l.avoid[id] = true
		}
	}
	return names, err
}

// renew writes the next lease object and removes the last but one.
func (l *lease) renew(ctx context.Context) error {
	select {
	case <-l.writing:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { l.writing <- struct{}{} }()
	n, p, err := l.next()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := l.repo.be.Save(ctx, l.handle(n), bytes.NewReader(p), int64(len(p))); err != nil {
		return err
	}
	for _, old := range l.wrote(n, begin) {
		if err := l.repo.be.Remove(ctx, l.handle(old)); err != nil {
			return err
		}
	}
	return nil
}

// next is the number and the content of the next lease object. No number is
// used twice: a Save that failed may have written it all the same.
func (l *lease) next() (int, []byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.expired() {
		return 0, nil, ErrLeaseLost
	}
	l.n++
	p, err := json.Marshal(l.record)
	return l.n, p, err
}

// wrote notes a new object and returns those to remove.
func (l *lease) wrote(n int, begin time.Time) (old []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.renewed = begin
	l.written = append(l.written, n)
	old = l.written[:max(0, len(l.written)-2)]
	l.written = l.written[len(old):]
	return old
}

func (l *lease) handle(n int) backend.Handle {
	return backend.Handle{Kind: backend.Lock, Name: fmt.Sprintf("%s%s-%d", l.prefix, l.record.ID, n)}
}

// expired reports whether the lease may have run out by anyone's count. Once
// lost it stays lost. A machine that slept shows it by its wall clock.
func (l *lease) expired() bool {
	now := time.Now()
	age := max(now.Sub(l.renewed), now.Round(0).Sub(l.renewed.Round(0)))
	if !l.renewed.IsZero() && age > l.repo.ttl {
		l.lost = true
	}
	return l.lost
}

// backendTime is the backend's time when the lease was last renewed.
func (l *lease) backendTime(ctx context.Context) (time.Time, error) {
	l.mu.Lock()
	newest := l.handle(l.written[len(l.written)-1])
	l.mu.Unlock()
	info, err := l.repo.be.Stat(ctx, newest)
	if errors.Is(err, backend.ErrNotExist) { // somebody found that it had run out
		err = ErrLeaseLost
	}
	return info.Modified, err
}

// check returns ErrLeaseLost when the lease has run out.
func (l *lease) check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.expired() {
		return ErrLeaseLost
	}
	return nil
}

// keep renews the lease until it is released or lost. A failed renewal is
// tried again sooner.
func (l *lease) keep(ctx context.Context) {
	defer close(l.done)
	wait := l.repo.ttl / 3
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait = l.repo.ttl / 3
		if err := l.renew(ctx); errors.Is(err, ErrLeaseLost) {
			return
		} else if err != nil {
			wait = l.repo.ttl / 12
		}
	}
}

// release ends the lease. A lease object that cannot be removed runs out.
func (l *lease) release() {
	l.stop()
	<-l.done
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l.mu.Lock()
	l.lost = true
	left := append(l.written, l.n) // the last try may have written something
	l.mu.Unlock()
	for _, n := range left {
		l.repo.be.Remove(ctx, l.handle(n))
	}
}

// leases returns the living leases of a prefix and removes the objects of dead
// ones. now is the backend's time.
func (r *Repository) leases(ctx context.Context, prefix string, now time.Time) (map[string]leaseRecord, error) {
	living, newest := make(map[string]leaseRecord), make(map[string]int)
	err := r.be.List(ctx, backend.Lock, func(info backend.Info) error {
		id, n, ok := parseLeaseName(prefix, info.Name)
		if !ok {
			return nil
		}
		l, ttl, err := r.readLease(ctx, info.Name)
		if err != nil {
			return err
		}
		if now.Sub(info.Modified) > ttl+leaseSlack {
			return r.be.Remove(ctx, backend.Handle{Kind: backend.Lock, Name: info.Name})
		}
		if n > newest[id] {
			living[id], newest[id] = l, n
		}
		return nil
	})
	return living, err
}

// readLease reads a lease object. One that is gone or cannot be read counts as
// the lease of someone who knows nothing.
func (r *Repository) readLease(ctx context.Context, name string) (l leaseRecord, ttl time.Duration, err error) {
	p, err := backend.ReadAll(ctx, r.be, backend.Handle{Kind: backend.Lock, Name: name}, lockLimit)
	if err != nil && !errors.Is(err, backend.ErrNotExist) {
		return l, 0, err
	}
	if json.Unmarshal(p, &l) != nil || l.TTL <= 0 {
		return leaseRecord{}, maxLeaseTTL, nil
	}
	return l, min(maxLeaseTTL, time.Duration(l.TTL)*time.Millisecond), nil
}

func parseLeaseName(prefix, name string) (id string, n int, ok bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	id, number, found := strings.Cut(rest, "-")
	n, err := strconv.Atoi(number)
	return id, n, ok && found && err == nil
}

// leaseSlack is for clocks of one second's resolution.
const leaseSlack = 2 * time.Second
