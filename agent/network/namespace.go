package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"dormouse/internal/thread"
)

// namespace is a hold on a network namespace and a connection to its rtnetlink.
type namespace struct {
	file  *os.File
	links *netlink.Handle
}

// openNamespace connects to the namespace of file, which stays the caller's.
func openNamespace(file *os.File) (*namespace, error) {
	own, err := duplicate(file)
	if err != nil {
		return nil, fmt.Errorf("take hold of a network namespace: %w", err)
	}
	links, err := netlink.NewHandleAt(netns.NsHandle(own.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open rtnetlink in a network namespace: %w", err), own.Close())
	}
	return &namespace{file: own, links: links}, nil
}

func (n *namespace) close() {
	n.links.Close()
	n.file.Close()
}

func duplicate(file *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// OfProcess opens the network namespace of a process.
func OfProcess(pid int) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
}

// within runs work on a thread in the namespace of file.
func within(file *os.File, work func() error) error {
	return thread.Spare(func() error {
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return work()
	})
}

// setting is a kernel setting below /proc/sys/net.
type setting struct {
	name, value string
	// optional: kernels without the feature lack it, and need it not.
	optional bool
}

// apply sets kernel settings of the namespace.
func (n *namespace) apply(settings ...setting) error {
	return within(n.file, func() error {
		for _, s := range settings {
			err := os.WriteFile(filepath.Join("/proc/sys/net", s.name), []byte(s.value), 0)
			if s.optional && errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("set net/%s to %s: %w", s.name, s.value, err)
			}
		}
		return nil
	})
}

// value reads a kernel setting of the namespace.
func (n *namespace) value(name string) (value string, err error) {
	err = within(n.file, func() error {
		raw, err := os.ReadFile(filepath.Join("/proc/sys/net", name))
		value = string(raw)
		return err
	})
	return value, err
}

// complete lists until nothing changed meanwhile: rtnetlink tells when a list is
// a mixture of before and after (NLM_F_DUMP_INTR, netlink(7)).
func complete[T any](list func() ([]T, error)) (all []T, err error) {
	for range 100 {
		all, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// addresses lists those of all devices.
func (n *namespace) addresses() ([]netlink.Addr, error) {
	return complete(func() ([]netlink.Addr, error) { return n.links.AddrList(nil, unix.AF_UNSPEC) })
}

// deleteLink removes a device; one that is gone already is no error.
func (n *namespace) deleteLink(name string) error {
	link, err := n.links.LinkByName(name)
	if missing(err) {
		return nil
	}
	if err == nil {
		err = n.links.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove the network device %s: %w", name, err)
	}
	return nil
}

// await returns when a device carries packets: the kernel connects one that was
// set up some time later, and until then loses what is sent, for which ARP makes
// up only after a second.
func (n *namespace) await(name string) error {
	if up, err := n.carries(name); up || err != nil {
		return err
	}
	changes, err := nl.SubscribeAt(netns.NsHandle(n.file.Fd()), netns.None(), unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return fmt.Errorf("watch the network device %s: %w", name, err)
	}
	defer changes.Close()
	if err := changes.SetReceiveTimeout(&unix.Timeval{Sec: patience}); err != nil {
		return fmt.Errorf("watch the network device %s: %w", name, err)
	}
	for {
		up, err := n.carries(name)
		if up || err != nil {
			return err
		}
		if _, _, err := changes.Receive(); err != nil {
			return fmt.Errorf("the network device %s did not get ready within %d s: %w", name, patience, err)
		}
	}
}

// patience is how long a device may take to get ready, in seconds; it is a
// matter of milliseconds.
const patience = 5

func (n *namespace) carries(name string) (bool, error) {
	link, err := n.links.LinkByName(name)
	if err != nil {
		return false, fmt.Errorf("find the network device %s: %w", name, err)
	}
	return link.Attrs().OperState == netlink.OperUp, nil
}

func missing(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}

// same reports whether two namespaces are one.
func (n *namespace) same(other *namespace) bool {
	a, errA := n.file.Stat()
	b, errB := other.file.Stat()
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// Dial connects by TCP from within the network namespace of file.
func Dial(ctx context.Context, file *os.File, to netip.AddrPort) (conn net.Conn, err error) {
	err = within(file, func() error {
		// The address is no name, so Go makes the socket on this thread.
		var dialer net.Dialer
		conn, err = dialer.DialContext(ctx, "tcp", to.String())
		return err
	})
	return conn, err
}
