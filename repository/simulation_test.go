package repository

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"dormouse/repository/backend"
	"dormouse/repository/backend/backendtest"
)

// memBackend is a backend in memory. Its clock is the simulation's.
type memBackend struct {
	mu      sync.Mutex
	objects map[backend.Handle]memObject
}

type memObject struct {
	data     []byte
	modified time.Time
}

func newMemBackend() *memBackend {
	return &memBackend{objects: make(map[backend.Handle]memObject)}
}

func TestMemBackendConforms(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return newMemBackend() })
}

func (b *memBackend) Location() string { return "memory" }

func (b *memBackend) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return err
	}
	data, err := io.ReadAll(rd)
	if err := errors.Join(err, ctx.Err()); err != nil {
		return err
	}
	if int64(len(data)) != size {
		return errors.New("wrong size")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.objects[h]; ok {
		return backend.ErrExist
	}
	b.objects[h] = memObject{data, time.Now()}
	return nil
}

func (b *memBackend) get(ctx context.Context, h backend.Handle) (memObject, error) {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return memObject{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	o, ok := b.objects[h]
	if !ok {
		return o, fmt.Errorf("%s: %w", h, backend.ErrNotExist)
	}
	return o, nil
}

func (b *memBackend) ReadAt(ctx context.Context, h backend.Handle, p []byte, off int64) (int, error) {
	o, err := b.get(ctx, h)
	if err != nil {
		return 0, err
	}
	n, err := bytes.NewReader(o.data).ReadAt(p, off)
	if n == len(p) {
		err = nil
	}
	return n, err
}

func (b *memBackend) Stat(ctx context.Context, h backend.Handle) (backend.Info, error) {
	o, err := b.get(ctx, h)
	return backend.Info{Name: h.Name, Size: int64(len(o.data)), Modified: o.modified}, err
}

func (b *memBackend) List(ctx context.Context, kind backend.Kind, fn func(backend.Info) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var all []backend.Info
	b.mu.Lock()
	for h, o := range b.objects {
		if h.Kind == kind {
			all = append(all, backend.Info{Name: h.Name, Size: int64(len(o.data)), Modified: o.modified})
		}
	}
	b.mu.Unlock()
	for _, info := range all {
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

func (b *memBackend) Remove(ctx context.Context, h backend.Handle) error {
	if err := errors.Join(h.Valid(), ctx.Err()); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.objects, h)
	return nil
}

func (b *memBackend) RemoveIncomplete(context.Context, time.Duration) error { return nil }

// scheduler decides which call to the backend goes next.
type scheduler struct {
	mu      sync.Mutex
	waiting []*call
}

type call struct {
	actor *actor
	what  string
	go_   chan bool // false: the actor has crashed
}

// actor is a machine: its calls wait for the scheduler, and after a crash have
// no effect.
type actor struct {
	backend.Backend
	s       *scheduler
	name    string
	mu      sync.Mutex
	crashed bool
}

var errCrashed = errors.New("this machine has crashed")

func (a *actor) wait(ctx context.Context, what string, h any) error {
	c := &call{actor: a, what: fmt.Sprint(what, " ", h), go_: make(chan bool, 1)}
	a.s.mu.Lock()
	a.s.waiting = append(a.s.waiting, c)
	a.s.mu.Unlock()
	select {
	case ok := <-c.go_:
		if !ok {
			return errCrashed
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *actor) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	if err := a.wait(ctx, "save", h); err != nil {
		return err
	}
	return a.Backend.Save(ctx, h, rd, size)
}

func (a *actor) ReadAt(ctx context.Context, h backend.Handle, p []byte, off int64) (int, error) {
	if err := a.wait(ctx, "read", h); err != nil {
		return 0, err
	}
	return a.Backend.ReadAt(ctx, h, p, off)
}

func (a *actor) Stat(ctx context.Context, h backend.Handle) (backend.Info, error) {
	if err := a.wait(ctx, "stat", h); err != nil {
		return backend.Info{}, err
	}
	return a.Backend.Stat(ctx, h)
}

func (a *actor) List(ctx context.Context, kind backend.Kind, fn func(backend.Info) error) error {
	if err := a.wait(ctx, "list", kind); err != nil {
		return err
	}
	return a.Backend.List(ctx, kind, fn)
}

func (a *actor) Remove(ctx context.Context, h backend.Handle) error {
	if err := a.wait(ctx, "remove", h); err != nil {
		return err
	}
	return a.Backend.Remove(ctx, h)
}

// run lets calls go one at a time, in an order that the seed decides, until
// nobody calls any more. Now and then a machine crashes, or time passes.
func (s *scheduler) run(rnd *rand.Rand, finished func() bool) (trace []string) {
	for {
		synctest.Wait()
		s.mu.Lock()
		n := len(s.waiting)
		s.mu.Unlock()
		if n == 0 && finished() {
			return trace
		}
		if n == 0 || rnd.IntN(60) == 0 {
			d := time.Duration(rnd.Int64N(int64(time.Minute)))
			if rnd.IntN(5) == 0 {
				d *= 12 // longer than a lease
			}
			trace = append(trace, fmt.Sprint("sleep ", d))
			time.Sleep(d)
			continue
		}
		s.mu.Lock()
		i := rnd.IntN(n)
		c := s.waiting[i]
		s.waiting = append(s.waiting[:i], s.waiting[i+1:]...)
		s.mu.Unlock()
		c.actor.mu.Lock()
		if rnd.IntN(3000) == 0 {
			c.actor.crashed = true
		}
		ok := !c.actor.crashed
		c.actor.mu.Unlock()
		trace = append(trace, fmt.Sprint(c.actor.name, " ", c.what, " ", ok))
		c.go_ <- ok
	}
}

// world is one simulated history.
type world struct {
	t      *testing.T
	seed   uint64
	mem    *memBackend
	sched  *scheduler
	signer Signer
	keys   *Verifier
	dirs   []string

	mu      sync.Mutex
	durable map[string]string // checkpoints that must be restorable → images
	count   map[string]int
	faults  []string
}

func (w *world) note(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count[what]++
}

func (w *world) fault(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, fmt.Sprintf(format, args...))
}

func (w *world) open(name string) *Repository {
	a := &actor{Backend: w.mem, s: w.sched, name: name}
	repo, err := Open(context.Background(), a, Options{CacheDir: filepath.Join(w.t.TempDir(), name), Workers: 1})
	if err != nil && !errors.Is(err, errCrashed) {
		w.fault("open: %v", err)
	}
	return repo
}

// agent takes checkpoints, and removes some.
func (w *world) agent(name string, rnd *rand.Rand) {
	agent, controller := w.open(name), w.open(name+"-controller")
	for _, repo := range []*Repository{agent, controller} {
		if repo == nil {
			return
		}
		defer repo.Close()
	}
	for i := range 5 {
		id := fmt.Sprintf("c-%s-%d", name, i)
		err := w.checkpoint(agent, controller, id, w.dirs[rnd.IntN(len(w.dirs))], rnd.IntN(3) == 0)
		switch {
		case errors.Is(err, errCrashed):
			w.note("crash")
			return
		case errors.Is(err, ErrLeaseLost):
			w.note("lease lost")
		case errors.Is(err, ErrPartExpired), errors.Is(err, ErrDamaged):
			w.note("expired")
		case err != nil:
			w.fault("checkpoint %s: %v", id, err)
		default:
			w.note("checkpoint")
			if rnd.IntN(5) > 0 {
				w.remove(controller, id)
			}
		}
	}
}

func (w *world) checkpoint(agent, controller *Repository, id, dir string, closeEarly bool) error {
	ctx := context.Background()
	p, err := agent.NewPart(ctx, PartOptions{Holder: id})
	if err != nil {
		return err
	}
	defer p.Close()
	if err := p.AddImages(ctx, dir); err != nil {
		return err
	}
	res, err := p.Commit(ctx)
	if err != nil {
		return err
	}
	if closeEarly {
		p.Close()
	}
	err = controller.PutManifest(ctx, &Manifest{Checkpoint: id, Job: "j", Tasks: []TaskManifest{{Part: res.ID}}}, w.signer)
	if err == nil {
		w.mu.Lock()
		w.durable[id] = dir
		w.mu.Unlock()
	}
	lost := p.lease.check() != nil
	if (errors.Is(err, ErrPartExpired) || errors.Is(err, ErrDamaged)) && !closeEarly && !lost {
		w.fault("checkpoint %s was refused though its lease was alive: %v", id, err)
	}
	return err
}

func (w *world) remove(controller *Repository, id string) {
	w.mu.Lock()
	delete(w.durable, id)
	w.mu.Unlock()
	if err := controller.RemoveManifest(context.Background(), id); err == nil {
		w.note("remove")
	}
}

func (w *world) collector(name string) {
	repo := w.open(name)
	if repo == nil {
		return
	}
	defer repo.Close()
	for range 20 {
		s, err := repo.GC(context.Background(), GCOptions{Verifier: w.keys, Grace: -1})
		w.mu.Lock()
		w.count["removed packs"] += s.RemovedPacks
		w.mu.Unlock()
		switch {
		case err == nil:
			w.note("collection")
		case errors.Is(err, ErrBusy):
			w.note("busy")
			time.Sleep(10 * time.Minute)
		case errors.Is(err, ErrLeaseLost):
			w.note("collector's lease lost")
		case errors.Is(err, errCrashed):
			w.note("crash")
			return
		default:
			w.fault("collection: %v", err)
		}
	}
}

// check restores every checkpoint that must be restorable.
func (w *world) check() {
	repo, err := Open(context.Background(), w.mem, Options{CacheDir: filepath.Join(w.t.TempDir(), "check"), Workers: 1})
	if err != nil {
		w.fault("open: %v", err)
		return
	}
	defer repo.Close()
	for id, images := range w.durable {
		m, err := repo.LoadManifest(context.Background(), id, w.keys)
		if err != nil {
			w.fault("%s: %v", id, err)
			continue
		}
		p, err := repo.OpenPart(context.Background(), m.Tasks[0].Part)
		if err != nil {
			w.fault("%s: %v", id, err)
			continue
		}
		dir := filepath.Join(w.t.TempDir(), "images")
		if err := p.RestoreImages(context.Background(), dir, RestoreOptions{}); err != nil {
			w.fault("%s: %v", id, err)
			continue
		}
		wantSameFiles(w.t, images, dir)
	}
}

// Uploads, manifests, removals and collections of several machines, one call
// to the backend at a time in any order, with crashes and with time that
// passes: every checkpoint that was ever reported durable, and not removed,
// can be restored, and none is refused whose upload's lease is alive. A seed
// that fails replays the same history as far as the scheduler decides it.
func TestSimulatedHistories(t *testing.T) {
	base := newTestRepo(t)
	var dirs []string
	for i := range 2 {
		dir := filepath.Join(t.TempDir(), fmt.Sprint(i))
		m := contiguous(0x10000, 20, 1) // which both share
		for n, p := range contiguous(0x9000_0000+uint64(i)<<24, 5, uint64(i)+100) {
			m[n] = p
		}
		m.writeImages(t, dir)
		dirs = append(dirs, dir)
	}
	runs := uint64(50)
	if n, err := strconv.ParseUint(os.Getenv("DORMOUSE_HISTORIES"), 10, 64); err == nil {
		runs = n // for a night
	}
	total := make(map[string]int)
	missing := func() string {
		for _, what := range []string{"checkpoint", "remove", "collection", "removed packs", "crash", "lease lost", "expired"} {
			if total[what] == 0 {
				return what
			}
		}
		return ""
	}
	for seed := uint64(0); seed < runs || missing() != "" && seed < 10*runs; seed++ {
		synctest.Test(t, func(t *testing.T) {
			w := &world{
				t: t, seed: seed, mem: newMemBackend(), sched: &scheduler{}, signer: base.signer, keys: base.keys, dirs: dirs,
				durable: make(map[string]string), count: make(map[string]int),
			}
			must(t, Init(t.Context(), w.mem))
			trace := w.simulate()
			w.check()
			for _, f := range w.faults {
				t.Errorf("seed %d: %s", seed, f)
			}
			if t.Failed() {
				file := filepath.Join(os.TempDir(), fmt.Sprintf("dormouse-history-%d.txt", seed))
				os.WriteFile(file, []byte(joinLines(trace)), 0o600)
				t.Logf("seed %d: %v; the history is in %s", seed, w.count, file)
			}
			for what, n := range w.count {
				total[what] += n
			}
		})
	}
	t.Logf("%d histories at least: %v", runs, total)
	if what := missing(); what != "" {
		t.Errorf("in no history there was a %q: the simulation proves little", what)
	}
}

func joinLines(lines []string) string {
	var b bytes.Buffer
	for _, l := range lines {
		fmt.Fprintln(&b, l)
	}
	return b.String()
}

func (w *world) simulate() []string {
	var wg sync.WaitGroup
	var mu sync.Mutex
	left := 0
	start := func(f func()) {
		mu.Lock()
		left++
		mu.Unlock()
		wg.Go(func() {
			f()
			mu.Lock()
			left--
			mu.Unlock()
		})
	}
	for i := range 3 {
		start(func() { w.agent(fmt.Sprint("agent", i), rand.New(rand.NewPCG(w.seed, uint64(i)))) })
	}
	for i := range 2 {
		start(func() { w.collector(fmt.Sprint("collector", i)) })
	}
	trace := w.sched.run(rand.New(rand.NewPCG(w.seed, 99)), func() bool {
		mu.Lock()
		defer mu.Unlock()
		return left == 0
	})
	wg.Wait()
	return trace
}
