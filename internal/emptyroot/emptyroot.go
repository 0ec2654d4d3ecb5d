// Package emptyroot lets a process that only holds namespaces let go of every
// mount it inherited.
package emptyroot

import "golang.org/x/sys/unix"

// Enter leaves the caller's mount namespace nothing but an empty root, read-only.
// What remained mounted in it would stay so after everybody else has let go of
// it. The namespace must be the caller's own. pivot_root(2), "pivot_root(".",
// ".")".
func Enter() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("empty", "/proc", "tmpfs", unix.MS_RDONLY, "size=4k"); err != nil {
		return err
	}
	if err := unix.Chdir("/proc"); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}
