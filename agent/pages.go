package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"dormouse/agent/pagefs"
	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// isPages reports whether an image holds the content of memory, as opposed to
// descriptions of it.
func isPages(name string) bool { return strings.HasPrefix(name, "pages-") }

// memorySource gives the content of memory to CRIU during a restore. As a rule
// CRIU finds, in the place of pages images, links into a file system of ours, and
// what it reads there is fetched and verified while it reads: nothing is held
// as a whole, and fetching, verifying and restoring go on at once. Where the
// kernel has no FUSE, all is fetched into the spool before CRIU looks at it.
type memorySource struct {
	images string // directory of the images
	aside  string // where the mount is, or what is fetched
	reader *repository.MemoryReader
	server *pagefs.Server // nil: without FUSE
	stopMu sync.Once

	fetched chan struct{} // without FUSE: closed when all is there
	err     error         // valid after fetched
}

// memoryDir is where the content of memory is, beside the images.
func memoryDir(images string) string { return images + ".pages" }

// openMemory begins to fetch the content of memory for the images in a
// directory of the spool. stop and close must be called.
func openMemory(ctx context.Context, part *repository.PartReader, spool, images string, fuse bool) (*memorySource, error) {
	reader, err := part.OpenMemory(ctx, spool, func(e repository.Entry) bool { return isPages(e.Path) })
	if err != nil {
		return nil, err
	}
	s := &memorySource{images: images, aside: memoryDir(images), reader: reader, fetched: make(chan struct{})}
	if err := os.Mkdir(s.aside, 0o700); err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	if fuse {
		close(s.fetched)
		s.server, err = pagefs.Mount(s.aside, reader.Sizes(), reader)
		if err != nil {
			return nil, errors.Join(err, reader.Close())
		}
		return s, nil
	}
	go func() {
		defer close(s.fetched)
		s.err = s.fetchAll()
	}()
	return s, nil
}

// attach puts the pages images among the others, if there is anything to put
// there yet.
func (s *memorySource) attach() error {
	if s.server == nil {
		return nil
	}
	for name := range s.reader.Sizes() {
		if err := os.Symlink(filepath.Join("..", filepath.Base(s.aside), name), filepath.Join(s.images, name)); err != nil {
			return err
		}
	}
	return nil
}

// fetchAll fetches all images into the spool.
func (s *memorySource) fetchAll() error {
	for name, size := range s.reader.Sizes() {
		if err := s.fetchOne(name, size); err != nil {
			return err
		}
	}
	failpoint.Hit("agent.restore.images")
	return nil
}

func (s *memorySource) fetchOne(name string, size int64) error {
	f, err := os.OpenFile(filepath.Join(s.aside, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	const step = 1 << 20
	for at := int64(0); at < size && err == nil; at += step {
		err = s.reader.Read(name, at, step, func(parts [][]byte) error {
			for _, p := range parts {
				if _, err := f.Write(p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return errors.Join(err, f.Close())
}

// wait returns when CRIU may look at the content of memory.
func (s *memorySource) wait(ctx context.Context) error {
	select {
	case <-s.fetched:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.err != nil || s.server != nil {
		return s.err
	}
	for name := range s.reader.Sizes() {
		if err := os.Rename(filepath.Join(s.aside, name), filepath.Join(s.images, name)); err != nil {
			return err
		}
	}
	return nil
}

// imageMagics is the size of an image that describes nothing.
const imageMagics = 8

// neededFirst reports whether CRIU reads memory while it builds the namespaces:
// the content of System V segments, which belong to the IPC namespace. It takes
// pages that are not there yet for empty ones.
func (s *memorySource) neededFirst() (bool, error) {
	if s.server != nil {
		return false, nil
	}
	segments, err := filepath.Glob(filepath.Join(s.images, "ipcns-shm-*.img"))
	if err != nil {
		return false, err
	}
	for _, path := range segments {
		info, err := os.Stat(path)
		if err != nil {
			return false, err
		}
		if info.Size() > imageMagics {
			return true, nil
		}
	}
	return false, nil
}

// failure is why the content of memory could not be given to CRIU, if so.
func (s *memorySource) failure() error {
	if s.server != nil {
		return s.server.Err()
	}
	select {
	case <-s.fetched:
		return s.err
	default:
		return nil
	}
}

// stop ends all reading. CRIU must have ended, or fails.
func (s *memorySource) stop() (err error) {
	s.stopMu.Do(func() {
		s.reader.Stop()
		<-s.fetched
		if s.server != nil {
			err = s.server.Close()
		}
	})
	return err
}

// remember lets the next checkpoint store only what changed since this one.
func (s *memorySource) remember(ctx context.Context, cache string) error {
	if err := s.reader.SavePageCache(ctx, s.images, cache); err != nil {
		return fmt.Errorf("keep the table of pages: %w", err)
	}
	return nil
}

// close frees everything but the images.
func (s *memorySource) close() error { return errors.Join(s.stop(), s.reader.Close()) }
