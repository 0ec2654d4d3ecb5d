package cgroup

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Root in a sandbox has CAP_MKNOD, as in every container, and so could make a
// node for any of the machine's disks. Making them is allowed, opening them is
// not, except for these character devices. With cgroup v1 that is a list in
// files, with v2 a BPF program (bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE).

// anyMinor stands for every minor number.
const anyMinor = -1

var openDevices = []struct{ major, minor int32 }{
	{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, // null zero full random urandom
	{5, 0}, {5, 2}, {136, anyMinor}, // tty ptmx pts
	{10, 200}, // net/tun
}

// limitDevices sets Devices if it could be done. Where it cannot, the sandbox
// goes without CAP_MKNOD.
func (g *Group) limitDevices(h *Hierarchies, path string) error {
	if _, ok := h.V1["devices"]; !ok {
		g.Devices = g.attachDeviceFilter() == nil
		return nil
	}
	dir, err := g.addV1(h, "devices", path)
	if err != nil {
		return err
	}
	if err := write(dir, "devices.deny", "a"); err != nil {
		return err
	}
	rules := []string{"c *:* m", "b *:* m"}
	for _, d := range openDevices {
		minor := fmt.Sprint(d.minor)
		if d.minor == anyMinor {
			minor = "*"
		}
		rules = append(rules, fmt.Sprintf("c %d:%s rwm", d.major, minor))
	}
	for _, rule := range rules {
		if err := write(dir, "devices.allow", rule); err != nil {
			return err
		}
	}
	g.Devices = true
	return nil
}

// instruction is one of BPF's, linux/bpf.h struct bpf_insn.
type instruction struct {
	code      uint8
	registers uint8 // source in the high half, destination in the low
	offset    int16
	value     int32
}

// deviceFilter is the program. It gets struct bpf_cgroup_dev_ctx in register 1:
// access_type (access in the high half, type in the low), major, minor.
func deviceFilter() []instruction {
	const (
		load, and, shift, set         = 0x61, 0x57, 0x77, 0xb7
		jumpIfEqual, jumpIfNot, leave = 0x15, 0x55, 0x95
		access, kind, major, minor    = 2, 3, 4, 5 // registers
		fromContext                   = 1 << 4
		result                        = 0
	)
	program := []instruction{
		{load, fromContext | access, 0, 0},
		{load, fromContext | kind, 0, 0},
		{load, fromContext | major, 4, 0},
		{load, fromContext | minor, 8, 0},
		{shift, access, 0, 16},
		{and, kind, 0, 0xffff},
		// Making a node, and nothing else.
		{set, result, 0, 1},
		{jumpIfNot, access, 1, unix.BPF_DEVCG_ACC_MKNOD},
		{leave, 0, 0, 0},
		// No block device.
		{set, result, 0, 0},
		{jumpIfEqual, kind, 1, unix.BPF_DEVCG_DEV_CHAR},
		{leave, 0, 0, 0},
		{set, result, 0, 1},
	}
	for _, d := range openDevices {
		if d.minor == anyMinor {
			program = append(program, instruction{jumpIfNot, major, 1, d.major})
		} else {
			program = append(program, instruction{jumpIfNot, major, 2, d.major}, instruction{jumpIfNot, minor, 1, d.minor})
		}
		program = append(program, instruction{leave, 0, 0, 0})
	}
	return append(program, instruction{set, result, 0, 0}, instruction{leave, 0, 0, 0})
}

// attachDeviceFilter puts the program on the v2 directory, with which it goes.
func (g *Group) attachDeviceFilter() error {
	program, license := deviceFilter(), []byte("GPL\x00")
	load := struct {
		kind, count    uint32
		code, license  uint64
		level, logSize uint32
		log            uint64
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(program)),
		code: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if errno != 0 {
		return fmt.Errorf("cannot load the device filter: %w", errno)
	}
	defer unix.Close(int(fd))
	dir, err := os.Open(g.Unified)
	if err != nil {
		return fmt.Errorf("cannot open the cgroup: %w", err)
	}
	defer dir.Close()
	attach := struct{ target, program, kind, flags uint32 }{
		target: uint32(dir.Fd()), program: uint32(fd), kind: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_MULTI,
	}
	_, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach))
	if errno != 0 {
		return fmt.Errorf("cannot attach the device filter: %w", errno)
	}
	return nil
}
