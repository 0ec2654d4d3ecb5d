package repository

import (
	"errors"
	"fmt"
)

// The errors a caller decides on; test with errors.Is. Those of the backend
// (backend.ErrNoSpace, backend.ErrNotExist, backend.ErrExist) pass through.
var (
	// ErrDamaged: stored data is not what was stored. Nothing of it was handed
	// out. The error is a *DamagedError.
	ErrDamaged = errors.New("damaged")
	// ErrSignature: a manifest was not signed by a key that is trusted.
	ErrSignature = errors.New("signature does not match")
	// ErrVersion: written by a version of Dormouse that this one cannot read.
	ErrVersion = errors.New("unknown format version")
	// ErrLeaseLost: an upload could not renew its lease in time, so garbage
	// collection may have removed what it stored. Upload again.
	ErrLeaseLost = errors.New("the upload's lease has run out")
	// ErrPartExpired: a part waited so long for its manifest that garbage
	// collection has marked it for deletion. Take another checkpoint.
	ErrPartExpired = errors.New("part has expired")
	// ErrBusy: another garbage collection is running.
	ErrBusy = errors.New("another garbage collection is running")
	// ErrChanged: a file became shorter while it was read.
	ErrChanged = errors.New("file changed while it was read")
)

// DamagedError names what is damaged. It is ErrDamaged.
type DamagedError struct {
	Object string // such as "pack 1f0c..." or "manifest c-7"
	Chunk  string // id, where one chunk is concerned
	Err    error  // what is wrong
}

func (e *DamagedError) Error() string {
	if e.Chunk != "" {
		return fmt.Sprintf("chunk %s in %s is damaged: %v", e.Chunk, e.Object, e.Err)
	}
	return fmt.Sprintf("%s is damaged: %v", e.Object, e.Err)
}

// Is makes errors.Is(err, ErrDamaged) true.
func (e *DamagedError) Is(target error) bool { return target == ErrDamaged }

func (e *DamagedError) Unwrap() error { return e.Err }
