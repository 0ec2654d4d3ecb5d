package sandbox

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilityNames are the names of capabilities(7) by number.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
	"SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
	"SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
	"MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
	"CHECKPOINT_RESTORE",
}

// defaultCapabilities are those that container engines give.
func defaultCapabilities() []int {
	return []int{
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW,
		unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE,
		unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
	}
}

// capabilityNumbers translates names, with or without the CAP_ prefix.
func capabilityNumbers(names []string) ([]int, error) {
	var numbers []int
	for _, name := range names {
		number := slices.Index(capabilityNames, strings.TrimPrefix(strings.ToUpper(name), "CAP_"))
		if number < 0 {
			return nil, refuse("%q is not a Linux capability", name)
		}
		numbers = append(numbers, number)
	}
	return numbers, nil
}

// capabilities returns the bounding set of a sandbox. Without a device cgroup
// MKNOD would open the node's disks, so it is left out.
func capabilities(added []int, devicesLimited bool) []int {
	set := append(defaultCapabilities(), added...)
	if !devicesLimited {
		set = slices.DeleteFunc(set, func(c int) bool { return c == unix.CAP_MKNOD })
	}
	slices.Sort(set)
	return slices.Compact(set)
}
