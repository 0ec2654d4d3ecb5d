package criu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
)

// DefaultPath is where `make setup` installs a CRIU when the system's own does
// not pass the probe.
const DefaultPath = "/opt/dormouse/criu/sbin/criu"

// Errors that New returns (wrapped).
var (
	ErrMissing = errors.New("CRIU not found")
	ErrTooOld  = errors.New("CRIU too old")
)

// oldest is the first version that is accepted: older ones lack pidfd based
// restores and fail on most current kernels.
var oldest = Version{Major: 4}

// Options say which CRIU the engine uses.
type Options struct {
	// Path of the criu program. Empty: DefaultPath if it exists, else PATH.
	Path string
	// Shim is the path of libdormouse-criu.so. It is loaded into CRIU only if
	// this process lacks CAP_SYS_RESOURCE, without which CRIU cannot read the
	// resource limits of other users' processes. Empty: no shim.
	Shim string
	// Libexec is a directory that the engine creates and fills with the helper
	// programs CRIU finds first in its PATH. Required.
	Libexec string
	// Logger gets debug lines only. Nil: discarded.
	Logger *slog.Logger `json:"-"`
}

// Engine runs CRIU. Between calls it remembers only what CRIU has found out
// about the kernel. It is safe for concurrent use.
type Engine struct {
	path    string
	shim    string // empty unless it must be preloaded
	libexec string
	version Version
	kernel  *kernelFacts
	log     *slog.Logger
}

// New finds CRIU and reads its version. It probes nothing else; see
// [Engine.Probe]. The error wraps ErrMissing or ErrTooOld where that is the
// reason.
func New(ctx context.Context, o Options) (*Engine, error) {
	path, err := locate(o.Path)
	if err != nil {
		return nil, err
	}
	if o.Libexec == "" {
		return nil, errors.New("criu: no libexec directory given")
	}
	if err := writeHelpers(o.Libexec); err != nil {
		return nil, fmt.Errorf("criu: prepare helper programs in %s: %w", o.Libexec, err)
	}
	e := &Engine{path: path, libexec: o.Libexec, kernel: &kernelFacts{}, log: o.Logger}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if o.Shim != "" && !hasCapability(unix.CAP_SYS_RESOURCE) {
		if e.shim, err = filepath.Abs(o.Shim); err != nil {
			return nil, err
		}
		if _, err := os.Stat(e.shim); err != nil {
			return nil, fmt.Errorf("criu: the preload library is missing (run `make build`): %w", err)
		}
	}
	if e.version, err = e.readVersion(ctx); err != nil {
		return nil, err
	}
	if e.version.Compare(oldest) < 0 {
		return nil, fmt.Errorf("%w: %s is version %s, at least %s is needed; run `make setup` to install one beside it",
			ErrTooOld, e.path, e.version, oldest)
	}
	return e, nil
}

// Path is the criu program in use.
func (e *Engine) Path() string { return e.path }

// Version is the version of the criu program in use.
func (e *Engine) Version() Version { return e.version }

func locate(explicit string) (string, error) {
	if explicit != "" {
		path, err := exec.LookPath(explicit)
		if err != nil {
			return "", fmt.Errorf("%w at %s: %w", ErrMissing, explicit, err)
		}
		return filepath.Abs(path)
	}
	if unix.Access(DefaultPath, unix.X_OK) == nil {
		return DefaultPath, nil
	}
	path, err := exec.LookPath("criu")
	if err != nil {
		return "", fmt.Errorf("%w in %s or PATH; run `make setup`, or name one with DORMOUSE_CRIU", ErrMissing, DefaultPath)
	}
	return filepath.Abs(path)
}

// dumpHelpers is where, in the directory of helpers, those are that only dumps use.
const dumpHelpers = "dump"

// restoreHelpers is the same for restores.
const restoreHelpers = "restore"

// plainTar is the tar of restores. PATH begins with where it is itself.
const plainTar = `#!/bin/sh
for option; do
	shift
	[ "$option" = --gzip ] || set -- "$@" "$option"
done
PATH="${PATH#*:}"
exec tar "$@"
`

// writeHelpers writes a `gzip` that does not compress. CRIU packs the contents
// of tmpfs mounts with `tar --gzip` while the tree stands still; measured, that
// is 37 MB/s with gzip and more than 1 GB/s without; chunks are compressed later.
// Images written so must be restored so: a restore finds a `tar` that is not told
// to decompress, which is three processes less for every tmpfs.
//
// A dump runs it without arguments, so there cat itself will do: it starts 1 ms
// sooner, once for every tmpfs, in the pause.
func writeHelpers(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, dumpHelpers), 0o755); err != nil {
		return err
	}
	if err := writeScript(filepath.Join(dir, "gzip"), "#!/bin/sh\nexec cat\n"); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, restoreHelpers), 0o755); err != nil {
		return err
	}
	if err := writeScript(filepath.Join(dir, restoreHelpers, "tar"), plainTar); err != nil {
		return err
	}
	cat := "/bin/cat"
	if unix.Access(cat, unix.X_OK) != nil {
		cat = "../gzip"
	}
	link := filepath.Join(dir, dumpHelpers, "gzip")
	if have, err := os.Readlink(link); err == nil && have == cat {
		return nil
	}
	tmp := fmt.Sprintf("%s.%d", link, os.Getpid())
	if err := os.Symlink(cat, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}

// writeScript makes a program of a text.
func writeScript(path, text string) error {
	if have, err := os.ReadFile(path); err == nil && string(have) == text {
		return nil
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(tmp, []byte(text), 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func hasCapability(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

func (e *Engine) readVersion(ctx context.Context) (Version, error) {
	s, err := e.start(sessionOptions{})
	if err != nil {
		return Version{}, fmt.Errorf("%w: %s does not start: %w", ErrMissing, e.path, err)
	}
	kind := rpc.CriuReqType_VERSION
	resp, err := s.call(ctx, &rpc.CriuReq{Type: &kind}, nil)
	if err != nil {
		return Version{}, fmt.Errorf("criu: ask %s for its version: %w", e.path, err)
	}
	v := resp.GetVersion()
	return Version{
		Major:    int(v.GetMajorNumber()),
		Minor:    int(v.GetMinorNumber()),
		Sublevel: int(v.GetSublevel()),
	}, nil
}
