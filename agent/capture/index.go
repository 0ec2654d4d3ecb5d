package capture

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"

	"dormouse/repository"
)

// ErrLost says that the content of a file is neither in the spool nor, any
// more, in the repository.
var ErrLost = errors.New("the captured content is lost")

// Item is one captured entry of a tree.
type Item struct {
	repository.Entry
	// Key is the identity of the original; zero when it proves nothing.
	Key repository.FileKey
	// Copy names the file in the spool that holds the content; "" when the
	// repository holds it under Key, or when From names it.
	Copy string
	// From is the file itself, for files that are not changed by the task.
	From string
}

// Index is a captured tree: its entries, and where the contents are.
type Index struct {
	Items []Item
	spool string
}

// Save writes the index to a file of the spool directory, from which OpenIndex
// reads it, also after a restart of the agent.
func (x *Index) Save(spool, name string) error {
	f, err := os.OpenFile(filepath.Join(spool, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	encoder := gob.NewEncoder(w)
	for i := range x.Items {
		if err := encoder.Encode(&x.Items[i]); err != nil {
			f.Close()
			return err
		}
	}
	return errors.Join(w.Flush(), f.Close())
}

// OpenIndex reads an index that Save wrote.
func OpenIndex(spool, name string) (*Index, error) {
	f, err := os.Open(filepath.Join(spool, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	x := &Index{spool: spool}
	decoder := gob.NewDecoder(bufio.NewReader(f))
	for {
		var item Item
		err := decoder.Decode(&item)
		if errors.Is(err, io.EOF) {
			return x, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		x.Items = append(x.Items, item)
	}
}

// Size is the logical size of the captured files.
func (x *Index) Size() int64 {
	var total int64
	for i := range x.Items {
		total += x.Items[i].Size
	}
	return total
}

// Entries gives the captured tree to the repository.
func (x *Index) Entries() iter.Seq2[repository.TreeEntry, error] {
	return func(yield func(repository.TreeEntry, error) bool) {
		for i := range x.Items {
			item := &x.Items[i]
			entry := repository.TreeEntry{Entry: item.Entry, Key: item.Key}
			if item.Type == repository.TypeFile {
				entry.Open = func() (*os.File, error) { return x.open(item) }
			}
			if !yield(entry, nil) {
				return
			}
		}
	}
}

func (x *Index) open(item *Item) (*os.File, error) {
	if item.Copy != "" {
		return os.Open(filepath.Join(x.spool, item.Copy))
	}
	if item.From == "" {
		return nil, fmt.Errorf("/%s: %w", item.Path, ErrLost)
	}
	f, err := os.Open(item.From)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && repository.FileKeyOf(info) != item.Key {
		err = fmt.Errorf("%s was changed on the node after the capture: %w", item.From, ErrLost)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
