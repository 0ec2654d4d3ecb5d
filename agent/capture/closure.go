package capture

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"dormouse/repository"
)

// Closure captures those of the paths that a task sees from the lower layer.
// Nothing is copied: the task cannot change them, and the index refuses a file
// that somebody else changed before it was stored.
func Closure(ctx context.Context, lower, upper string, paths []string) (*Index, error) {
	var below []string
	for _, p := range paths {
		if inLower(lower, upper, p) {
			below = append(below, p)
		}
	}
	x := &Index{}
	for entry, err := range repository.Pick(lower, below) {
		if err = skippable(ctx, err); err != nil {
			return nil, err
		}
		item := Item{Entry: entry.Entry, Key: entry.Key}
		if entry.Type == repository.TypeFile {
			item.From = filepath.Join(lower, entry.Path)
		}
		x.Items = append(x.Items, item)
	}
	return x, nil
}

// inLower reports whether an overlay of upper over lower shows lower's file at
// path p.
func inLower(lower, upper, p string) bool {
	if _, err := os.Lstat(filepath.Join(lower, p)); err != nil {
		return false
	}
	for at := p; at != "."; at = filepath.Dir(at) {
		info, err := os.Lstat(filepath.Join(upper, at))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		// A directory is merged with lower's unless it is opaque; of anything
		// else the upper one hides the lower one.
		return err == nil && info.IsDir() && at != p && !opaque(filepath.Join(upper, at))
	}
	return true
}

// opaque reports whether an upper directory hides the lower one of its name:
// the kernel's Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
// directories".
func opaque(dir string) bool {
	var value [1]byte
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", value[:])
	return err == nil && n == 1 && value[0] == 'y'
}
