package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"dormouse/repository"
)

// Snapshot captures all of a small directory whose files nobody changes meanwhile,
// and nothing of what is mounted in it, with copies in the new directory copies of
// the directory spool.
func Snapshot(ctx context.Context, dir, spool, copies string) (*Index, error) {
	if err := os.Mkdir(filepath.Join(spool, copies), 0o700); err != nil {
		return nil, err
	}
	index := &Index{spool: spool}
	for entry, err := range repository.Walk(dir) {
		if err = skippable(ctx, err); err != nil {
			return nil, err
		}
		item := Item{Entry: entry.Entry}
		if entry.Type == repository.TypeFile {
			item.Copy = filepath.Join(copies, strconv.Itoa(len(index.Items)))
			if err := takeCopy(ctx, entry, filepath.Join(spool, item.Copy)); err != nil {
				return nil, fmt.Errorf("capture %s: %w", filepath.Join(dir, entry.Path), err)
			}
		}
		index.Items = append(index.Items, item)
	}
	return index, nil
}

func takeCopy(ctx context.Context, entry repository.TreeEntry, to string) (err error) {
	src, err := entry.Open()
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = copyData(ctx, dst, src, entry.Size)
	return errors.Join(err, dst.Close())
}
