package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"dormouse/repository"
)

// granularity is more than the coarsest time stamps of files: kernels stamp
// with the time of the last timer tick, which is at most 10 ms old.
const granularity = 25 * time.Millisecond

// copies is the directory of the spool that holds copies of files.
const copies = "files"

// Upper captures an upper layer.
type Upper struct {
	dir   string
	spool string
	// known tells whether the repository holds the content of an identity.
	known func(repository.FileKey) bool
	keep  func(xattr string) bool
	early map[repository.FileKey]string // copies that are good while the identity stays
	next  int                           // number of the next copy
	bytes int64                         // copied so far
}

// NewUpper returns the capture of the upper layer in dir, with copies below the
// directory spool. known tells whether the repository holds the content of an
// identity already, keep which extended attributes belong to the task.
func NewUpper(dir, spool string, known func(repository.FileKey) bool, keep func(xattr string) bool) (*Upper, error) {
	if err := os.MkdirAll(filepath.Join(spool, copies), 0o700); err != nil {
		return nil, err
	}
	return &Upper{dir: dir, spool: spool, known: known, keep: keep, early: map[repository.FileKey]string{}}, nil
}

// CopiedBytes is how much was copied so far, holes apart.
func (u *Upper) CopiedBytes() int64 { return u.bytes }

// Estimate is how many bytes of the upper layer dir a capture would copy now.
func Estimate(ctx context.Context, dir string, known func(repository.FileKey) bool, mapped Inodes) (int64, error) {
	var total int64
	for entry, err := range repository.Walk(dir) {
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err = skippable(ctx, err); err != nil {
			return total, err
		}
		if entry.Type == repository.TypeFile && (mapped.Has(entry.Key) || !known(entry.Key)) {
			total += entry.Size
		}
	}
	return total, nil
}

// PreCopy copies what can be copied while the task runs. mapped are the files
// that are mapped shared and writable now.
func (u *Upper) PreCopy(ctx context.Context, mapped Inodes) error {
	for entry, err := range repository.Walk(u.dir) {
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed by the task meanwhile
		}
		if err = skippable(ctx, err); err != nil {
			return err
		}
		if entry.Type != repository.TypeFile || mapped.Has(entry.Key) || u.known(entry.Key) || fresh(entry.Key, time.Now()) {
			continue
		}
		if _, done := u.early[entry.Key]; done {
			continue
		}
		name, err := u.copy(ctx, entry)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		u.early[entry.Key] = name
	}
	return nil
}

// Finish captures the layer of a task that stands still. mapped are the files
// that are mapped shared and writable.
func (u *Upper) Finish(ctx context.Context, mapped Inodes) (*Index, error) {
	index := &Index{spool: u.spool}
	used := map[string]bool{}
	for entry, err := range repository.Walk(u.dir) {
		if err = skippable(ctx, err); err != nil {
			return nil, err
		}
		item := Item{Entry: entry.Entry}
		maps.DeleteFunc(item.Xattrs, func(name string, _ []byte) bool { return !u.keep(name) })
		if entry.Type == repository.TypeFile {
			unsure := mapped.Has(entry.Key)
			if !unsure {
				item.Key = entry.Key // may be remembered for later checkpoints
			}
			if item.Copy, err = u.content(ctx, entry, unsure); err != nil {
				return nil, err
			}
			used[item.Copy] = true
		}
		index.Items = append(index.Items, item)
	}
	for _, name := range u.early {
		if !used[name] {
			os.Remove(filepath.Join(u.spool, name)) // only frees space early
		}
	}
	return index, nil
}

// content returns the copy of a file of a task that stands still, or "" when
// the repository holds its content.
func (u *Upper) content(ctx context.Context, entry repository.TreeEntry, unsure bool) (string, error) {
	if !unsure {
		if name, ok := u.early[entry.Key]; ok {
			return name, nil
		}
		if u.known(entry.Key) {
			return "", nil
		}
	}
	return u.copy(ctx, entry)
}

func (u *Upper) copy(ctx context.Context, entry repository.TreeEntry) (string, error) {
	name := filepath.Join(copies, strconv.Itoa(u.next))
	u.next++
	n, err := copyFile(ctx, filepath.Join(u.dir, entry.Path), filepath.Join(u.spool, name))
	u.bytes += n
	if err != nil {
		os.Remove(filepath.Join(u.spool, name))
		return "", fmt.Errorf("capture /%s: %w", entry.Path, err)
	}
	return name, nil
}

// fresh reports whether a file was changed so shortly before now that a change
// after now could leave the identity as it is.
func fresh(key repository.FileKey, now time.Time) bool {
	limit := now.Add(-granularity).UnixNano()
	return key.Ctime > limit || key.Mtime > limit
}

func skippable(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	return ctx.Err()
}
