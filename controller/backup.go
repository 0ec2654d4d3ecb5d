package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"dormouse/controller/store"
	"dormouse/controller/store/archive"
	"dormouse/controller/store/bolt"
	"dormouse/controller/store/etcd"
)

// A back-up is a copy of the store as of one moment, and of the keys of the state
// directory: without those, agents would have to join anew and no checkpoint
// would be believed. It is as secret as they are.

// Backup writes one to w.
func Backup(ctx context.Context, w io.Writer, s store.Store, state, version string) error {
	copier, ok := s.(store.Copier)
	if !ok {
		return fmt.Errorf("a store of type %T cannot be copied", s)
	}
	files, err := presentKeys(state)
	if err != nil {
		return err
	}
	var items []store.Item
	schema, err := copier.Copy(ctx, func(item store.Item) error {
		item.Value = bytes.Clone(item.Value)
		items = append(items, item)
		return nil
	})
	if err != nil {
		return err
	}
	header := archive.Header{Schema: schema, Created: time.Now().UTC(), Dormouse: version}
	return archive.Write(w, header, files, items)
}

// presentKeys reads the shared files that a state directory has.
func presentKeys(state string) (map[string][]byte, error) {
	files := make(map[string][]byte)
	for _, name := range sharedFiles {
		content, err := os.ReadFile(filepath.Join(state, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read a key: %w", err)
		}
		files[name] = content
	}
	return files, nil
}

// serveBackup streams a back-up. One that breaks off has no last line, and is not
// taken for a whole one.
func (c *Controller) serveBackup(w http.ResponseWriter, r *http.Request) {
	out := &lateHeader{w: w}
	err := Backup(r.Context(), out, c.store, c.parts.State, c.parts.Version)
	switch {
	case err == nil:
	case !out.begun:
		writeProblem(w, asProblem(err))
	default:
		c.log.Warn("a back-up broke off", "error", err)
		panic(http.ErrAbortHandler) // the client must not take it for the end
	}
}

// lateHeader decides with the first byte that the answer is no problem.
type lateHeader struct {
	w     http.ResponseWriter
	begun bool
}

func (l *lateHeader) Write(p []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/octet-stream")
	}
	return l.w.Write(p)
}

// Restore makes a back-up the contents of the store and of the state directory
// that config names. Nothing that is there is lost without force; then old files
// are kept beside the new ones, with the time in their names. No controller may
// run on that store.
func Restore(ctx context.Context, config Config, file string, force bool, log *slog.Logger) (archive.Header, error) {
	header, err := archive.Check(file)
	if err != nil {
		return header, err
	}
	if header.Schema < 1 || header.Schema > store.Schema {
		return header, &store.NewerSchemaError{Where: "in " + file, Schema: header.Schema, Known: store.Schema}
	}
	if err := config.complete(); err != nil {
		return header, err
	}
	if err := os.MkdirAll(config.State, 0o700); err != nil {
		return header, fmt.Errorf("make the state directory: %w", err)
	}
	lock, err := lockFile(filepath.Join(config.State, "lock"), config.State)
	if err != nil {
		return header, err
	}
	defer lock.Close()
	r := restoring{config: config, file: file, force: force, aside: time.Now().UTC().Format(".before-20060102T150405Z")}
	keys, err := r.checkKeys()
	if err != nil {
		return header, err
	}
	if config.Store.Backend == storeEtcd {
		options, err := config.Store.options()
		if err != nil {
			return header, err
		}
		options.Logger = log
		err = etcd.Restore(ctx, options, force, header.Schema, r.items())
		if err != nil {
			return header, err
		}
	} else if err := r.replaceFile(header.Schema); err != nil {
		return header, err
	}
	return header, r.placeKeys(keys)
}

// restoring is one Restore.
type restoring struct {
	config Config
	file   string
	force  bool
	aside  string // ends the names of what is replaced
}

func (r *restoring) path(name string) string { return filepath.Join(r.config.State, name) }

// items are the records of the back-up.
func (r *restoring) items() iter.Seq2[store.Item, error] {
	return func(yield func(store.Item, error) bool) {
		for item, err := range archive.Items(r.file) {
			if item.File != "" {
				continue
			}
			if !yield(item.Item, err) {
				return
			}
		}
	}
}

// checkKeys reads the keys of the back-up, and refuses to replace others.
func (r *restoring) checkKeys() (map[string][]byte, error) {
	keys := make(map[string][]byte)
	for item, err := range archive.Items(r.file) {
		if err != nil {
			return nil, err
		}
		if item.File == "" || !slices.Contains(sharedFiles, item.File) {
			continue
		}
		keys[item.File] = item.Value
		present, err := os.ReadFile(r.path(item.File))
		if err == nil && !bytes.Equal(present, item.Value) && !r.force {
			return nil, fmt.Errorf("%s is not the one in the back-up: restore with --force to replace it", r.path(item.File))
		}
	}
	return keys, nil
}

func (r *restoring) placeKeys(keys map[string][]byte) error {
	for name, content := range keys {
		file := r.path(name)
		present, err := os.ReadFile(file)
		if err == nil && bytes.Equal(present, content) {
			continue
		}
		if err == nil {
			if err := os.Rename(file, file+r.aside); err != nil {
				return fmt.Errorf("keep the key that is replaced: %w", err)
			}
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return fmt.Errorf("restore a key: %w", err)
		}
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return fmt.Errorf("restore a key: %w", err)
		}
	}
	return nil
}

// replaceFile makes the file of the embedded store anew, and puts it in place
// when it is whole.
func (r *restoring) replaceFile(schema int) error {
	file := r.path("controller.db")
	if err := r.checkEmpty(file); err != nil {
		return err
	}
	fresh := file + ".restoring"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore the store: %w", err)
	}
	if err := bolt.Write(fresh, schema, r.items()); err != nil {
		return err
	}
	if _, err := os.Stat(file); err == nil {
		if err := os.Rename(file, file+r.aside); err != nil {
			return fmt.Errorf("keep the store that is replaced: %w", err)
		}
	}
	if err := os.Rename(fresh, file); err != nil {
		return fmt.Errorf("restore the store: %w", err)
	}
	s, err := bolt.Open(file) // reads every record, and upgrades them
	if err != nil {
		return err
	}
	return s.Close()
}

var errNotEmpty = errors.New("not empty")

func (r *restoring) checkEmpty(file string) error {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) || r.force {
		return nil
	}
	s, err := bolt.Open(file)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.Copy(context.Background(), func(store.Item) error { return errNotEmpty })
	if errors.Is(err, errNotEmpty) {
		return &store.NotEmptyError{Where: file}
	}
	return err
}

// BackupOf writes a back-up of the store that config names, while no controller
// uses it, or of an etcd while some do.
func BackupOf(ctx context.Context, w io.Writer, config Config, version string) error {
	if err := config.complete(); err != nil {
		return err
	}
	if config.Store.Backend == storeBolt {
		if _, err := os.Stat(filepath.Join(config.State, "controller.db")); err != nil {
			return fmt.Errorf("there is no store in %s: %w", config.State, err)
		}
	}
	s, err := OpenStore(ctx, config, slog.New(slog.DiscardHandler))
	if err != nil {
		if strings.Contains(err.Error(), "in use") {
			return fmt.Errorf("%w, or leave --config out to have it write the back-up", err)
		}
		return err
	}
	defer s.Close()
	return Backup(ctx, w, s, config.State, version)
}
