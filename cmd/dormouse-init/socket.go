package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"
)

// Sockets by bare system calls and os.File: package net would double this
// program.

// listenUnix listens at path, replacing what is there.
func listenUnix(path string, mode os.FileMode) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot replace the socket %s: %w", path, err)
	}
	return listenAt(&syscall.SockaddrUnix{Name: path}, syscall.AF_UNIX, path, func(int) error { return os.Chmod(path, mode) })
}

// listenTCP listens on one address.
func listenTCP(at netip.AddrPort) (*os.File, error) {
	address, family := socketAddress(at)
	return listenAt(address, family, at.String(), nil)
}

func listenAt(address syscall.Sockaddr, family int, name string, bound func(fd int) error) (*os.File, error) {
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make the socket %s: %w", name, err)
	}
	socket := os.NewFile(uintptr(fd), name)
	err = syscall.Bind(fd, address)
	if err == nil && bound != nil {
		err = bound(fd)
	}
	if err == nil {
		err = syscall.Listen(fd, 128)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot listen on %s: %w", name, err), socket.Close())
	}
	return socket, nil
}

func socketAddress(a netip.AddrPort) (syscall.Sockaddr, int) {
	if a.Addr().Is4() {
		return &syscall.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}, syscall.AF_INET
	}
	return &syscall.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}, syscall.AF_INET6
}

// acceptAll hands over every connection, for the life of the process. take must
// not wait.
func acceptAll(socket *os.File, take func(*conn)) {
	raw, err := socket.SyscallConn()
	for err == nil {
		var fd int
		var failed error
		err = raw.Read(func(listener uintptr) bool {
			fd, _, failed = syscall.Accept4(int(listener), syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK)
			return failed != syscall.EAGAIN
		})
		switch {
		case err != nil:
		case failed == nil:
			take(&conn{file: os.NewFile(uintptr(fd), "connection"), limit: pid1.MaxFrame})
		case failed != syscall.EINTR && failed != syscall.ECONNABORTED:
			// accept(2), EMFILE, ENOBUFS: it stays so until others let go.
			time.Sleep(50 * time.Millisecond)
		}
	}
	fmt.Fprintf(os.Stderr, "the socket %s failed: %v\n", socket.Name(), err)
}

// conn is one connection; several goroutines may send.
type conn struct {
	file  *os.File
	limit uint32 // of a frame that comes in
	mu    sync.Mutex
}

func (c *conn) read() (pid1.FrameType, []byte, error) { return pid1.ReadFrameMax(c.file, c.limit) }

// want reads a frame that has to be of the kind.
func (c *conn) want(kind pid1.FrameType) ([]byte, error) {
	got, payload, err := c.read()
	if err == nil && got != kind {
		err = fmt.Errorf("frame %d came where %d was expected", got, kind)
	}
	return payload, err
}

func (c *conn) send(kind pid1.FrameType, payload []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return pid1.WriteFrame(c.file, kind, payload)
}

func (c *conn) sendJSON(kind pid1.FrameType, value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return c.send(kind, content)
}

// noDelay sends small frames at once: a session's bytes wait for each other.
func (c *conn) noDelay() {
	if raw, err := c.file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1) })
	}
}
