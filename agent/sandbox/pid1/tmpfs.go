package pid1

import (
	"fmt"
	"syscall"
)

// Tmpfs is a file system in memory that every sandbox has, mount(2).
type Tmpfs struct {
	Name    string
	Source  string
	Target  string
	Flags   uintptr
	Options string
}

// TmpfsMounts are those of a sandbox whose /tmp has the given size in bytes; 0 is
// the kernel's default.
func TmpfsMounts(tmpBytes int64) []Tmpfs {
	tmp := "mode=1777"
	if tmpBytes > 0 {
		tmp += fmt.Sprintf(",size=%d", tmpBytes)
	}
	const quiet = syscall.MS_NOSUID | syscall.MS_NODEV
	return []Tmpfs{
		{"dev", "tmpfs", "/dev", syscall.MS_NOSUID | syscall.MS_NOEXEC, "mode=755,size=65536k"},
		{"shm", "shm", "/dev/shm", quiet | syscall.MS_NOEXEC, "mode=1777"},
		{"tmp", "tmpfs", "/tmp", quiet, tmp},
	}
}
