package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"dormouse/agent/criu"
	"dormouse/agent/pagefs"
	"dormouse/agent/pages"
	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// isPages reports whether an image holds the content of memory, as opposed to
// descriptions of it.
func isPages(name string) bool { return strings.HasPrefix(name, "pages-") }

// memorySource gives the content of memory to a restore: it is fetched and verified
// while it is needed, and nothing is held as a whole. Most of it is written into the
// processes when CRIU has built them (agent/pages). For the rest CRIU finds, in the
// place of pages images, links into a file system of ours. Where the kernel has no
// FUSE, the rest is fetched into the spool before CRIU looks at it.
type memorySource struct {
	images string // directory of the images
	aside  string // where the mount is, or what is fetched
	fuse   bool
	reader *repository.MemoryReader
	stopMu sync.Once

	// After attach.
	division *pages.Division
	rest     pages.Source   // what is left to CRIU
	server   *pagefs.Server // nil: without FUSE
	filled   bool           // by fill
	unfilled error          // why fill has failed

	fetched chan struct{} // without FUSE: closed when all is there
	err     error         // valid after fetched
}

// memoryDir is where the content of memory is, beside the images.
func memoryDir(images string) string { return images + ".pages" }

// openMemory finds the content of memory for the images in a directory of the spool;
// reader.Begin begins to fetch it. close must be called.
func openMemory(ctx context.Context, part *repository.PartReader, spool, images string, fuse bool) (*memorySource, error) {
	reader, err := part.OpenMemory(ctx, spool, func(e repository.Entry) bool { return isPages(e.Path) })
	if err != nil {
		return nil, err
	}
	return &memorySource{images: images, aside: memoryDir(images), fuse: fuse, reader: reader, fetched: make(chan struct{})}, nil
}

// attach divides the memory, once the other images are there, and puts pages images
// among them, if there is anything to put there yet.
func (s *memorySource) attach() error {
	tree, err := criu.ReadTree(s.images)
	if err != nil {
		return err
	}
	parents := make(map[int]int)
	for _, p := range tree {
		parents[p.PID] = p.PPID
	}
	if s.division, err = pages.Divide(s.images, s.reader.Sizes(), parents); err != nil {
		return err
	}
	s.rest = s.division.Rest(s.reader)
	if err := os.Mkdir(s.aside, 0o700); err != nil {
		return err
	}
	if !s.fuse {
		go func() {
			defer close(s.fetched)
			s.err = s.fetchAll()
		}()
		return nil
	}
	if s.server, err = pagefs.Mount(s.aside, s.division.Sizes(), s.rest); err != nil {
		return err
	}
	for name := range s.division.Sizes() {
		if err := os.Symlink(filepath.Join("..", filepath.Base(s.aside), name), filepath.Join(s.images, name)); err != nil {
			return err
		}
	}
	return nil
}

// fill writes memory into the processes of the tree whose init is root; all are
// there, and none runs.
func (s *memorySource) fill(ctx context.Context, root int) error {
	pids, err := criu.InnerPIDs(root)
	if err == nil {
		for _, name := range s.division.Taken() {
			s.reader.Rewind(name)
		}
		err = s.division.Fill(ctx, s.reader, pids)
	}
	s.filled, s.unfilled = err == nil, err
	return err
}

// complete fails when processes would run before their memory was filled.
func (s *memorySource) complete() error {
	if !s.filled {
		return errors.New("CRIU did not tell when the processes were there")
	}
	return nil
}

// fetchAll fetches all images into the spool.
func (s *memorySource) fetchAll() error {
	for name, size := range s.division.Sizes() {
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
		err = s.rest.Read(name, at, step, func(parts [][]byte) error {
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

// wait returns when CRIU may look at what is left to it.
func (s *memorySource) wait(ctx context.Context) error {
	if s.fuse {
		return nil
	}
	select {
	case <-s.fetched:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.err != nil {
		return s.err
	}
	for name := range s.division.Sizes() {
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
	if s.fuse {
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

// failure is why the content of memory could not be given to the restore, if so.
// CRIU has ended.
func (s *memorySource) failure() error {
	if s.unfilled != nil {
		return s.unfilled
	}
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
		switch {
		case s.server != nil:
			err = s.server.Close()
		case s.rest != nil && !s.fuse:
			<-s.fetched
		}
	})
	return err
}

// remember lets the next checkpoint store only what changed since this one.
func (s *memorySource) remember(ctx context.Context, cache string) error {
	err := s.division.Restore()
	if err == nil {
		err = s.reader.SavePageCache(ctx, s.images, cache)
	}
	if err != nil {
		return fmt.Errorf("keep the table of pages: %w", err)
	}
	return nil
}

// close frees everything but the images.
func (s *memorySource) close() error { return errors.Join(s.stop(), s.reader.Close()) }
