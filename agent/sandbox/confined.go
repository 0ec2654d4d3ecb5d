package sandbox

import (
	"errors"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkPath refuses a path on the node, of a job of a user, that could lead to
// another place than the admin who allowed it meant: the agent is root and goes
// where the user cannot. No part of it may be a link, and nobody but root may
// replace a part of it: then what was checked is what is mounted, at the start
// and at every restore. The last part may be anybody's; what is in it is the
// user's to reach by its own permissions.
func checkPath(what, path string) error {
	// openat2(2): one look that no part of the path is a link.
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ELOOP) {
		return refuse("the %s %s of a user's job leads over a symbolic link: name where it leads", what, path)
	}
	if err != nil {
		return refuse("the %s %s cannot be used on this node: %v", what, path, err)
	}
	defer unix.Close(fd)
	for dir := filepath.Dir(filepath.Clean(path)); ; dir = filepath.Dir(dir) {
		var stat unix.Stat_t
		if err := unix.Lstat(dir, &stat); err != nil {
			return refuse("the %s %s cannot be used on this node: %v", what, path, err)
		}
		// A sticky directory is no better: its users can move what is theirs.
		if stat.Uid != 0 || stat.Mode&0o022 != 0 {
			return refuse("the %s %s of a user's job is in %s, which others than root can change: name a directory above it", what, path, dir)
		}
		if dir == "/" {
			return nil
		}
	}
}
