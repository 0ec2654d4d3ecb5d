// Package oci turns container images into directories.
//
// An image comes as a path (the archive of `docker save`, an OCI layout as an
// archive or a directory, each archive also gzipped) or as a registry
// reference. Its layers are applied in order into one directory of a cache,
// named by the digest of the image's configuration, which names the content of
// every layer in turn:
//
//	CACHE/sha256-<config digest>/root         the file system
//	CACHE/sha256-<config digest>/config.json  Config; written last, so its
//	                                          presence means "complete"
//
// Nothing in an archive is trusted. Every layer is hashed while it is unpacked
// and must be what the configuration names; every path is resolved within the
// new root by the kernel (openat2(2), RESOLVE_IN_ROOT), so neither ".." nor
// links lead out of it; the number of files, the bytes of all files and the
// room on the disk bound what an archive can unfold to.
package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// ErrBadImage means that an image is damaged, malicious or no image at all.
var ErrBadImage = errors.New("bad image")

// badImage makes a full sentence that errors.Is knows as ErrBadImage.
func badImage(format string, args ...any) error {
	return &imageError{fmt.Errorf(format, args...)}
}

type imageError struct{ reason error }

func (e *imageError) Error() string   { return e.reason.Error() }
func (e *imageError) Unwrap() []error { return []error{ErrBadImage, e.reason} }

// Image is an unpacked image.
type Image struct {
	Root   string // directory
	Digest string // of the configuration
	Config Config
}

// Config is what an image wants by default.
type Config struct {
	Env        []string `json:"env,omitempty"` // KEY=VALUE
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkDir    string   `json:"work_dir,omitempty"`
}

// Cache is a directory of unpacked images, shared by the agent's sandboxes and
// safe to share between processes.
type Cache struct {
	dir    string
	limits limits
}

// NewCache uses dir, which is made when first needed.
func NewCache(dir string) *Cache {
	return &Cache{dir: dir, limits: limits{entries: 5_000_000, bytes: 64 << 30, spare: 256 << 20}}
}

// Get returns the image of a path or reference, unpacking it if it is not in
// the cache. An error is ErrBadImage when the image itself is at fault.
func (c *Cache) Get(ctx context.Context, ref string) (*Image, error) {
	if c.dir == "" {
		return nil, errors.New("this node has no directory for images")
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of images: %w", err)
	}
	source, err := c.open(ctx, ref)
	if err != nil {
		return nil, err
	}
	image, err := c.get(ctx, source.image, ref)
	return image, errors.Join(err, source.close())
}

func (c *Cache) get(ctx context.Context, image v1.Image, ref string) (*Image, error) {
	digest, err := image.ConfigName()
	if err != nil {
		return nil, badImage("the image %s has no readable configuration: %w", ref, err)
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, badImage("the image %s has no readable configuration: %w", ref, err)
	}
	dir := filepath.Join(c.dir, strings.ReplaceAll(digest.String(), ":", "-"))
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	result := &Image{Root: filepath.Join(dir, "root"), Digest: digest.String()}
	if content, err := os.ReadFile(filepath.Join(dir, "config.json")); err == nil {
		return result, json.Unmarshal(content, &result.Config)
	}
	result.Config = Config{
		Env: file.Config.Env, Entrypoint: file.Config.Entrypoint, Cmd: file.Config.Cmd,
		User: file.Config.User, WorkDir: file.Config.WorkingDir,
	}
	// What an interrupted unpacking has left.
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("cannot remove a half-unpacked image: %w", err)
	}
	if err := c.unpack(ctx, image, file, result.Root); err != nil {
		return nil, errors.Join(fmt.Errorf("the image %s cannot be unpacked: %w", ref, err), os.RemoveAll(dir))
	}
	content, err := json.Marshal(result.Config)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), content, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot record the image %s: %w", ref, err), os.RemoveAll(dir))
	}
	return result, nil
}

// unpack applies all layers of image, which must be those file names.
func (c *Cache) unpack(ctx context.Context, image v1.Image, file *v1.ConfigFile, root string) error {
	layers, err := image.Layers()
	if err != nil {
		return badImage("its list of layers cannot be read: %w", err)
	}
	if len(layers) != len(file.RootFS.DiffIDs) {
		return badImage("it has %d layers but its configuration names %d", len(layers), len(file.RootFS.DiffIDs))
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	tree, err := openTree(root, c.limits)
	if err != nil {
		return err
	}
	defer tree.close()
	for i, layer := range layers {
		if err := applyVerified(ctx, tree, layer, file.RootFS.DiffIDs[i]); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return nil
}

// lock takes an exclusive lock on a file, for as long as one image is unpacked.
func lock(ctx context.Context, name string) (func(), error) {
	file, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the directory of images: %w", err)
	}
	locked := make(chan error, 1)
	go func() {
		for {
			err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
			if err != syscall.EINTR {
				locked <- err
				return
			}
		}
	}()
	unlock := func() { _ = file.Close() }
	select {
	case err := <-locked:
		if err != nil {
			unlock()
			return nil, fmt.Errorf("cannot lock the directory of images: %w", err)
		}
		return unlock, nil
	case <-ctx.Done():
		// flock(2) cannot be given up; the lock is let go once it comes.
		go func() {
			<-locked
			unlock()
		}()
		return nil, fmt.Errorf("waiting for another task that unpacks the same image: %w", context.Cause(ctx))
	}
}
