package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// isPages reports whether an image holds the content of memory, as opposed to
// descriptions of it.
func isPages(name string) bool { return strings.HasPrefix(name, "pages-") }

// pagesFetch fetches the content of memory beside everything else of a restore,
// into a directory of its own.
type pagesFetch struct {
	aside  string
	images string
	cancel context.CancelFunc
	done   chan struct{}
	err    error // valid after done
}

// startPages begins to fetch the pages images that belong into the directory
// images. stop must be called.
func startPages(ctx context.Context, part *repository.PartReader, images string) *pagesFetch {
	ctx, cancel := context.WithCancel(ctx)
	p := &pagesFetch{aside: images + ".pages", images: images, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = part.RestoreImages(ctx, p.aside, repository.RestoreOptions{
			Only: func(e repository.Entry) bool { return isPages(e.Path) },
		})
		failpoint.Hit("agent.restore.images")
	}()
	return p
}

// wait returns when all pages are fetched, verified, and among the images.
func (p *pagesFetch) wait(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if p.err != nil {
		return p.err
	}
	names, err := os.ReadDir(p.aside)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(p.aside, name.Name()), filepath.Join(p.images, name.Name())); err != nil {
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
func neededFirst(images string) (bool, error) {
	segments, err := filepath.Glob(filepath.Join(images, "ipcns-shm-*.img"))
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

// failure is why the fetch has failed, if it has.
func (p *pagesFetch) failure() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// stop ends the fetch and waits for its end.
func (p *pagesFetch) stop() {
	p.cancel()
	<-p.done
}
