package oci

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"dormouse/internal/lazyregexp"
)

// source is an image that can be read until close.
type source struct {
	image v1.Image
	close func() error
}

// IsImage reports whether path looks like an image: a file, or a directory
// with an OCI layout.
func IsImage(path string) bool {
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	if !info.IsDir() {
		return info.Mode().IsRegular()
	}
	_, err = os.Stat(filepath.Join(path, "oci-layout"))
	return err == nil
}

// open finds the image of a path or reference.
func (c *Cache) open(ctx context.Context, ref string) (*source, error) {
	info, err := os.Stat(ref)
	switch {
	case err == nil && info.IsDir():
		image, err := fromLayout(ref, ref)
		return &source{image, func() error { return nil }}, err
	case err == nil && info.Mode().IsRegular():
		return c.fromArchive(ctx, ref)
	case err == nil:
		return nil, badImage("the image %s is neither a file nor a directory", ref)
	case strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, "."):
		return nil, badImage("there is no image at %s on this node", ref)
	}
	return pull(ctx, ref)
}

func pull(ctx context.Context, ref string) (*source, error) {
	reference, err := name.ParseReference(ref)
	if err != nil {
		return nil, badImage("%q is neither a file on this node nor the name of an image: %w", ref, err)
	}
	image, err := remote.Image(reference, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	if err != nil {
		return nil, fmt.Errorf("the image %s cannot be pulled: save it to a file where it is, and give that as oci:PATH: %w", ref, err)
	}
	return &source{image, func() error { return nil }}, nil
}

// fromArchive tells the two kinds of archive apart by what they contain.
func (c *Cache) fromArchive(ctx context.Context, file string) (*source, error) {
	opener := func() (io.ReadCloser, error) { return openMaybeGzip(file) }
	kind, err := archiveKind(ctx, opener)
	if err != nil {
		return nil, badImage("%s is not an image archive: %w", file, err)
	}
	switch kind {
	case "manifest.json":
		image, err := tarball.Image(opener, nil)
		if err != nil {
			return nil, badImage("the image archive %s is damaged: %w", file, err)
		}
		return &source{image, func() error { return nil }}, nil
	case "oci-layout":
		return c.fromLayoutArchive(ctx, file, opener)
	}
	return nil, badImage("%s is not an image archive: it holds neither manifest.json (docker save) nor oci-layout", file)
}

// archiveKind reads the names in an archive; docker save also writes an
// oci-layout, but manifest.json decides which image is meant.
func archiveKind(ctx context.Context, opener func() (io.ReadCloser, error)) (string, error) {
	reader, err := opener()
	if err != nil {
		return "", err
	}
	defer reader.Close()
	kind := ""
	entries := tar.NewReader(reader)
	for ctx.Err() == nil {
		header, err := entries.Next()
		if err == io.EOF {
			return kind, nil
		}
		if err != nil {
			return "", err
		}
		switch path.Clean(header.Name) {
		case "manifest.json":
			return "manifest.json", nil
		case "oci-layout":
			kind = "oci-layout"
		}
	}
	return "", context.Cause(ctx)
}

// openMaybeGzip opens a file, unzipping it when it is gzipped.
func openMaybeGzip(name string) (io.ReadCloser, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	buffered := bufio.NewReaderSize(file, 64<<10)
	if magic, _ := buffered.Peek(2); string(magic) != "\x1f\x8b" {
		return readCloser{buffered, file.Close}, nil
	}
	unzipped, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return readCloser{unzipped, func() error { return errors.Join(unzipped.Close(), file.Close()) }}, nil
}

type readCloser struct {
	io.Reader
	close func() error
}

func (r readCloser) Close() error { return r.close() }

// blobName is the only kind of file, besides the two indexes, that a layout
// needs; nothing else is unpacked from its archive.
var blobName = lazyregexp.New(`^blobs/sha(256|512)/[0-9a-f]{64,128}$`)

// fromLayoutArchive spreads a layout into a temporary directory of the cache.
func (c *Cache) fromLayoutArchive(ctx context.Context, file string, opener func() (io.ReadCloser, error)) (_ *source, err error) {
	dir, err := os.MkdirTemp(c.dir, "layout-*")
	if err != nil {
		return nil, fmt.Errorf("cannot read the image archive %s: %w", file, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	reader, err := opener()
	if err != nil {
		return nil, fmt.Errorf("cannot read the image archive %s: %w", file, err)
	}
	defer reader.Close()
	entries := tar.NewReader(reader)
	left := c.limits.bytes
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		header, err := entries.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, badImage("the image archive %s is damaged: %w", file, err)
		}
		name := path.Clean(header.Name)
		if header.Typeflag != tar.TypeReg || name != "index.json" && name != "oci-layout" && !blobName.MatchString(name) {
			continue
		}
		if left -= header.Size; left < 0 {
			return nil, badImage("the image archive %s unfolds to more than the %d bytes allowed", file, c.limits.bytes)
		}
		if err := writeBlob(filepath.Join(dir, name), &contextReader{ctx, entries}); err != nil {
			return nil, fmt.Errorf("cannot unpack the image archive %s: %w", file, err)
		}
	}
	image, err := fromLayout(dir, file)
	if err != nil {
		return nil, err
	}
	return &source{image, func() error { return os.RemoveAll(dir) }}, nil
}

func writeBlob(name string, content io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	file, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	return errors.Join(err, file.Close())
}

// fromLayout takes the image for this machine out of an OCI layout.
func fromLayout(dir, shown string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, badImage("%s is not an OCI image layout: %w", shown, err)
	}
	image, err := pick(index, 0)
	if err != nil {
		return nil, badImage("the OCI image layout %s cannot be used: %w", shown, err)
	}
	return image, nil
}

// pick finds the one image of an index, or the one for this machine. Indexes
// may hold indexes.
func pick(index v1.ImageIndex, depth int) (v1.Image, error) {
	if depth > 4 {
		return nil, errors.New("its indexes are nested too deep")
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, entry := range manifest.Manifests {
		fits := entry.Platform == nil || entry.Platform.OS == "linux" && entry.Platform.Architecture == runtime.GOARCH
		if !fits {
			continue
		}
		if entry.MediaType.IsIndex() {
			nested, err := index.ImageIndex(entry.Digest)
			if err != nil {
				return nil, err
			}
			return pick(nested, depth+1)
		}
		if entry.MediaType.IsImage() {
			return index.Image(entry.Digest)
		}
	}
	return nil, fmt.Errorf("it holds no image for linux/%s", runtime.GOARCH)
}
