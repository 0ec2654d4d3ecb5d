// Package backendtest is the conformance suite of backend.Backend. A backend's
// own test needs only:
//
//	func TestConformance(t *testing.T) {
//		backendtest.Run(t, func(t *testing.T) backend.Backend {
//			... a new, empty backend that goes away with t ...
//		})
//	}
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"dormouse/repository/backend"
)

// suite has one Test method for each promise of the contract.
type suite struct {
	open func(t *testing.T) backend.Backend
}

// Run checks every promise on new, empty backends made by open.
func Run(t *testing.T, open func(t *testing.T) backend.Backend) {
	s := reflect.ValueOf(suite{open})
	for i := range s.NumMethod() {
		name := s.Type().Method(i).Name
		if !strings.HasPrefix(name, "Test") {
			continue
		}
		t.Run(strings.TrimPrefix(name, "Test"), s.Method(i).Interface().(func(*testing.T)))
	}
}

func handle(kind backend.Kind, name string) backend.Handle {
	return backend.Handle{Kind: kind, Name: name}
}

func save(t *testing.T, be backend.Backend, h backend.Handle, data []byte) {
	t.Helper()
	if err := be.Save(t.Context(), h, bytes.NewReader(data), int64(len(data))); err != nil {
		t.Fatalf("Save(%s, %d bytes) = %v, want no error", h, len(data), err)
	}
}

func load(t *testing.T, be backend.Backend, h backend.Handle) []byte {
	t.Helper()
	p, err := backend.ReadAll(t.Context(), be, h, 1<<30)
	if err != nil {
		t.Fatalf("read of %s = %v, want no error", h, err)
	}
	return p
}

func names(t *testing.T, be backend.Backend, kind backend.Kind) []string {
	t.Helper()
	var got []string
	err := be.List(t.Context(), kind, func(i backend.Info) error {
		got = append(got, i.Name)
		return nil
	})
	if err != nil {
		t.Fatalf("List(%s) = %v, want no error", kind, err)
	}
	sort.Strings(got)
	return got
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s = %v, want an error that is %q", what, err, want)
	}
}

// Saved objects come back, of every kind and size.
func (s suite) TestSaveThenRead(t *testing.T) {
	be := s.open(t)
	for _, kind := range backend.Kinds() {
		for i, size := range []int{0, 1, 4095, 70_000, 3 << 20} {
			if kind == backend.Config && i > 0 {
				break
			}
			h := handle(kind, fmt.Sprintf("Object-%d_%d.x", i, size))
			if kind == backend.Config {
				h.Name = "config"
			}
			data := random(size)
			save(t, be, h, data)
			if got := load(t, be, h); !bytes.Equal(got, data) {
				t.Errorf("%s came back with %d bytes that differ from the %d saved", h, len(got), size)
			}
			info, err := be.Stat(t.Context(), h)
			if err != nil || info.Size != int64(size) || info.Name != h.Name {
				t.Errorf("Stat(%s) = %+v, %v, want its name and %d bytes", h, info, err, size)
			}
		}
	}
}

// Kinds are separate name spaces.
func (s suite) TestKindsDoNotMix(t *testing.T) {
	be := s.open(t)
	save(t, be, handle(backend.Pack, "same"), []byte("pack"))
	save(t, be, handle(backend.Part, "same"), []byte("part"))
	if got := load(t, be, handle(backend.Pack, "same")); string(got) != "pack" {
		t.Errorf("pack/same holds %q", got)
	}
	if got := names(t, be, backend.Manifest); len(got) != 0 {
		t.Errorf("List(manifest) = %q, want nothing", got)
	}
}

// Ranges are exact and the end of an object is io.EOF.
func (s suite) TestReadRanges(t *testing.T) {
	be := s.open(t)
	data, h := random(100_000), handle(backend.Pack, "ranges")
	save(t, be, h, data)
	for _, r := range [][2]int{{0, 1}, {0, 100_000}, {99_999, 1}, {1234, 50_000}, {500, 0}} {
		p := make([]byte, r[1])
		n, err := be.ReadAt(t.Context(), h, p, int64(r[0]))
		if n != r[1] || err != nil || !bytes.Equal(p, data[r[0]:r[0]+r[1]]) {
			t.Errorf("ReadAt(%d bytes at %d) = %d, %v or wrong bytes", r[1], r[0], n, err)
		}
	}
	p := make([]byte, 100)
	n, err := be.ReadAt(t.Context(), h, p, 99_950)
	if n != 50 || err != io.EOF || !bytes.Equal(p[:50], data[99_950:]) {
		t.Errorf("ReadAt over the end = %d, %v, want the last 50 bytes and io.EOF", n, err)
	}
	if n, err := be.ReadAt(t.Context(), h, p, 200_000); n != 0 || err != io.EOF {
		t.Errorf("ReadAt behind the end = %d, %v, want 0, io.EOF", n, err)
	}
}

// Large objects are as exact as small ones, whatever their size, and wherever
// reads begin and their memory lies: backends may treat what is aligned in a way
// of its own.
func (s suite) TestLargeObjects(t *testing.T) {
	be := s.open(t)
	const block, mib = 4096, 1 << 20
	for i, size := range []int{3 * mib, 5*mib + 3*block, 9*mib + 1, 4*mib + block - 1} {
		data, h := random(size), handle(backend.Pack, fmt.Sprintf("large-%d", i))
		save(t, be, h, data)
		room := make([]byte, size+3*block)
		for _, at := range []int{0, block, 2*mib + block, 1, mib - 1, size - mib/2} {
			for _, shift := range []int{0, 1, block} {
				for _, n := range []int{mib / 2, size - at, size - at + 1, size - at + block} {
					p := room[shift:][:n]
					clear(p)
					got, err := be.ReadAt(t.Context(), h, p, int64(at))
					want, wantErr := data[at:min(at+n, size)], error(nil)
					if at+n > size {
						wantErr = io.EOF
					}
					if got != len(want) || err != wantErr || !bytes.Equal(p[:got], want) {
						t.Errorf("ReadAt(%d bytes at %d of %d) = %d, %v, want %d, %v, or wrong bytes", n, at, size, got, err, len(want), wantErr)
					}
				}
			}
		}
	}
}

// What is not there is ErrNotExist, and may be removed.
func (s suite) TestNotExist(t *testing.T) {
	be, h := s.open(t), handle(backend.Pack, "missing")
	_, err := be.Stat(t.Context(), h)
	wantError(t, "Stat of a missing object", err, backend.ErrNotExist)
	_, err = be.ReadAt(t.Context(), h, make([]byte, 1), 0)
	wantError(t, "ReadAt of a missing object", err, backend.ErrNotExist)
	if err := be.Remove(t.Context(), h); err != nil {
		t.Errorf("Remove of a missing object = %v, want no error", err)
	}
}

// A second Save of a name changes nothing.
func (s suite) TestSaveNeverOverwrites(t *testing.T) {
	be, h := s.open(t), handle(backend.Manifest, "once")
	save(t, be, h, []byte("first"))
	err := be.Save(t.Context(), h, strings.NewReader("second"), 6)
	wantError(t, "Save over an object", err, backend.ErrExist)
	if got := load(t, be, h); string(got) != "first" {
		t.Errorf("after a refused Save the object is %q, want \"first\"", got)
	}
}

// Of many concurrent Saves of one name exactly one wins, whole.
func (s suite) TestConcurrentSavesHaveOneWinner(t *testing.T) {
	be, h := s.open(t), handle(backend.Lock, "race")
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte('a' + i)}, 50_000)
			errs[i] = be.Save(t.Context(), h, bytes.NewReader(data), int64(len(data)))
		})
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		if err == nil && winner >= 0 {
			t.Errorf("two Saves of one name succeeded")
		}
		if err == nil {
			winner = i
			continue
		}
		wantError(t, "losing Save", err, backend.ErrExist)
	}
	if winner < 0 {
		t.Fatal("no Save succeeded")
	}
	if got := load(t, be, h); !bytes.Equal(got, bytes.Repeat([]byte{byte('a' + winner)}, 50_000)) {
		t.Error("the object is not what the winner saved")
	}
}

// A Save that fails publishes nothing, whatever made it fail.
func (s suite) TestFailedSavePublishesNothing(t *testing.T) {
	be := s.open(t)
	broken := errors.New("broken reader")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cases := map[string]struct {
		ctx  context.Context
		rd   io.Reader
		size int64
	}{
		"short":    {t.Context(), strings.NewReader("abc"), 10},
		"long":     {t.Context(), strings.NewReader("abcdefghijkl"), 10},
		"broken":   {t.Context(), io.MultiReader(strings.NewReader("abc"), &failing{broken}), 10},
		"canceled": {ctx, &calling{rd: bytes.NewReader(random(1 << 20)), fn: cancel}, 1 << 20},
	}
	for name, c := range cases {
		h := handle(backend.Pack, name)
		if err := be.Save(c.ctx, h, c.rd, c.size); err == nil {
			t.Errorf("%s: Save succeeded, want an error", name)
		}
		_, err := be.Stat(t.Context(), h)
		wantError(t, name+": Stat after a failed Save", err, backend.ErrNotExist)
	}
	if got := names(t, be, backend.Pack); len(got) != 0 {
		t.Errorf("after failed Saves List = %q, want nothing", got)
	}
	save(t, be, handle(backend.Pack, "short"), []byte("now it works"))
	if err := be.RemoveIncomplete(t.Context(), 0); err != nil {
		t.Errorf("RemoveIncomplete = %v", err)
	}
	if got := load(t, be, handle(backend.Pack, "short")); string(got) != "now it works" {
		t.Error("RemoveIncomplete touched a complete object")
	}
}

// Readers never see a part of an object that is being saved.
func (s suite) TestReadersSeeAllOrNothing(t *testing.T) {
	be, h := s.open(t), handle(backend.Pack, "slow")
	data := random(1 << 20)
	rd := &calling{rd: bytes.NewReader(data), fn: func() {
		_, err := be.Stat(t.Context(), h)
		wantError(t, "Stat during Save", err, backend.ErrNotExist)
		if got := names(t, be, backend.Pack); len(got) != 0 {
			t.Errorf("List during Save = %q, want nothing", got)
		}
	}}
	if err := be.Save(t.Context(), h, rd, int64(len(data))); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(load(t, be, h), data) {
		t.Error("wrong bytes after Save")
	}
}

// List sees everything that is there, and nothing that was removed.
func (s suite) TestListAndRemove(t *testing.T) {
	be := s.open(t)
	var want []string
	for i := range 300 {
		name := fmt.Sprintf("%02x-object", i)
		save(t, be, handle(backend.Pack, name), []byte(name))
		want = append(want, name)
	}
	sort.Strings(want)
	if got := names(t, be, backend.Pack); !reflect.DeepEqual(got, want) {
		t.Fatalf("List gave %d objects, want the %d saved", len(got), len(want))
	}
	for _, name := range want[:250] {
		if err := be.Remove(t.Context(), handle(backend.Pack, name)); err != nil {
			t.Fatalf("Remove(%s) = %v", name, err)
		}
	}
	if got := names(t, be, backend.Pack); !reflect.DeepEqual(got, want[250:]) {
		t.Errorf("after Remove List = %q, want %q", got, want[250:])
	}
	save(t, be, handle(backend.Pack, want[0]), []byte("a removed name is free again"))
}

// The callback may end a List and may use the backend.
func (s suite) TestListCallback(t *testing.T) {
	be := s.open(t)
	for i := range 5 {
		save(t, be, handle(backend.Index, fmt.Sprint("i", i)), []byte("x"))
	}
	stop, calls := errors.New("stop"), 0
	err := be.List(t.Context(), backend.Index, func(i backend.Info) error {
		calls++
		if err := be.Remove(t.Context(), handle(backend.Index, i.Name)); err != nil {
			t.Error(err)
		}
		return stop
	})
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("List = %v after %d calls, want the callback's error after one", err, calls)
	}
	if got := names(t, be, backend.Index); len(got) != 4 {
		t.Errorf("%d objects left, want 4", len(got))
	}
}

// Modified comes from one clock and never runs backwards by more than its resolution.
func (s suite) TestModifiedIsTheBackendsClock(t *testing.T) {
	be := s.open(t)
	var last time.Time
	for i := range 3 {
		h := handle(backend.Lock, fmt.Sprint("tick", i))
		save(t, be, h, []byte("x"))
		info, err := be.Stat(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		if info.Modified.IsZero() || info.Modified.Before(last.Add(-time.Second)) {
			t.Errorf("Modified went from %v to %v", last, info.Modified)
		}
		last = info.Modified
	}
}

// Names that are none are refused by every method.
func (s suite) TestBadNamesAreRefused(t *testing.T) {
	be := s.open(t)
	bad := []backend.Handle{
		{Kind: backend.Pack}, {Kind: backend.Pack, Name: ".."}, {Kind: backend.Pack, Name: "a/b"},
		{Kind: backend.Pack, Name: "../config"}, {Kind: backend.Pack, Name: "a\x00b"},
		{Kind: "other", Name: "a"}, {Kind: backend.Pack, Name: strings.Repeat("a", 201)},
	}
	for _, h := range bad {
		_, statErr := be.Stat(t.Context(), h)
		_, readErr := be.ReadAt(t.Context(), h, make([]byte, 1), 0)
		saveErr := be.Save(t.Context(), h, strings.NewReader("x"), 1)
		removeErr := be.Remove(t.Context(), h)
		if statErr == nil || readErr == nil || saveErr == nil || removeErr == nil {
			t.Errorf("%q was accepted: stat %v, read %v, save %v, remove %v", h, statErr, readErr, saveErr, removeErr)
		}
	}
}

// Nothing happens under a context that has ended.
func (s suite) TestEndedContext(t *testing.T) {
	be, h := s.open(t), handle(backend.Pack, "late")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, "Save", be.Save(ctx, h, strings.NewReader("x"), 1), context.Canceled)
	save(t, be, h, []byte("x"))
	_, err := be.ReadAt(ctx, h, make([]byte, 1), 0)
	wantError(t, "ReadAt", err, context.Canceled)
	wantError(t, "Remove", be.Remove(ctx, h), context.Canceled)
	wantError(t, "List", be.List(ctx, backend.Pack, func(backend.Info) error { return nil }), context.Canceled)
}

func random(size int) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(p)
	return p
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// calling calls fn once, after the first bytes were read.
type calling struct {
	rd   io.Reader
	fn   func()
	done bool
}

func (c *calling) Read(p []byte) (int, error) {
	n, err := c.rd.Read(p[:min(len(p), 1000)])
	if !c.done {
		c.done = true
		c.fn()
	}
	return n, err
}
