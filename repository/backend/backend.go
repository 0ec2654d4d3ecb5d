// Package backend says what a place that stores a checkpoint repository must
// do. Anything that keeps named, immutable objects can be one: a directory, an
// S3 bucket, a Swift container. The conformance suite in backendtest turns
// every sentence of the Backend contract into a test.
package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Kind is the class of an object.
type Kind string

// The kinds of objects in a repository.
const (
	Config   Kind = "config"   // exactly one object, named "config"
	Pack     Kind = "pack"     // chunks, gathered
	Index    Kind = "index"    // which chunk lies where in which pack
	Part     Kind = "part"     // one task's share of a checkpoint
	Manifest Kind = "manifest" // a durable checkpoint, signed
	Lock     Kind = "lock"     // leases of uploads, marks of garbage collections
)

// Kinds lists every kind.
func Kinds() []Kind { return []Kind{Config, Pack, Index, Part, Manifest, Lock} }

// Handle names an object. A valid name has 1 to 200 characters out of
// [a-zA-Z0-9._-] and does not begin with a dot.
type Handle struct {
	Kind Kind
	Name string
}

func (h Handle) String() string { return string(h.Kind) + "/" + h.Name }

// Valid reports why h cannot name an object.
func (h Handle) Valid() error {
	if !h.Kind.valid() {
		return fmt.Errorf("object %q has an unknown kind", h)
	}
	if len(h.Name) == 0 || len(h.Name) > 200 || h.Name[0] == '.' {
		return fmt.Errorf("object name %q is empty, too long or begins with a dot", h.Name)
	}
	for _, c := range []byte(h.Name) {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !letter && c != '.' && c != '_' && c != '-' {
			return fmt.Errorf("object name %q has a character outside [a-zA-Z0-9._-]", h.Name)
		}
	}
	return nil
}

func (k Kind) valid() bool {
	for _, known := range Kinds() {
		if k == known {
			return true
		}
	}
	return false
}

// Info describes a stored object.
type Info struct {
	Name string
	Size int64 // bytes
	// Modified is when the object was published, by the clock of the backend
	// and of no one else: two Modified times of one backend may be compared,
	// whichever machines wrote the objects. Resolution: one second or better.
	Modified time.Time
}

// The errors a caller decides on; test with errors.Is. All other errors may
// pass when the call is repeated.
var (
	// ErrNotExist: there is no object of that name. Permanent.
	ErrNotExist = errors.New("object does not exist")
	// ErrExist: the object is already there and was left as it is. Permanent.
	ErrExist = errors.New("object already exists")
	// ErrNoSpace: the backend is full or a quota is used up. Permanent until
	// someone makes room.
	ErrNoSpace = errors.New("no space left")
)

// Backend stores immutable objects. All methods may be called from many
// goroutines and, on the same store, from many machines.
//
// Consistency: what one caller has saved, every caller sees in Stat, ReadAt
// and List as soon as Save has returned, and what one caller has removed no
// caller sees once Remove has returned. Garbage collection relies on it.
type Backend interface {
	// Location names the place for people, without secrets.
	Location() string

	// Save publishes the size bytes of rd under h, all or nothing: readers see
	// no object or the whole object, also when this process, this machine or
	// the connection dies at any moment. When Save returns nil the object
	// survives a power cut.
	//
	// If the object exists, Save leaves it unchanged and returns an error that
	// is ErrExist; of several callers that save one name at once exactly one
	// succeeds. If rd ends before or goes on after size bytes, or fails, or ctx
	// ends, nothing is published. Save does not close rd.
	Save(ctx context.Context, h Handle, rd io.Reader, size int64) error

	// ReadAt fills p from offset off of the object. It returns len(p) and nil,
	// or fewer with an error: io.EOF when the object ends before off+len(p)
	// (what there is has been read), ErrNotExist when there is no object.
	ReadAt(ctx context.Context, h Handle, p []byte, off int64) (int, error)

	// Stat describes one object, or returns an error that is ErrNotExist.
	Stat(ctx context.Context, h Handle) (Info, error)

	// List calls fn for every object of a kind, in no particular order, and
	// stops at the first error of fn, which it returns. Objects that are saved
	// or removed meanwhile may or may not be seen. fn may call other methods.
	List(ctx context.Context, kind Kind, fn func(Info) error) error

	// Remove removes an object; removing what is not there is no error.
	Remove(ctx context.Context, h Handle) error

	// RemoveIncomplete removes what Saves that never ended have left behind
	// and that has not been written to for olderThan.
	RemoveIncomplete(ctx context.Context, olderThan time.Duration) error
}

// ReadAll returns a whole object of at most limit bytes.
func ReadAll(ctx context.Context, be Backend, h Handle, limit int64) ([]byte, error) {
	info, err := be.Stat(ctx, h)
	if err != nil {
		return nil, err
	}
	if info.Size > limit {
		return nil, fmt.Errorf("%s in %s has %d bytes, more than the %d allowed", h, be.Location(), info.Size, limit)
	}
	p := make([]byte, info.Size)
	if len(p) == 0 {
		return p, nil
	}
	if _, err := be.ReadAt(ctx, h, p, 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", h, err)
	}
	return p, nil
}
