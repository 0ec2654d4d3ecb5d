// Package pagefs is a small file system in user space: files of known size that
// can only be read, in one directory, whose content comes from a function. CRIU
// reads memory from it while it restores: what it reads is fetched and verified
// as it is needed, goes straight into the restored process, and is never held as
// a whole. A read that fails makes CRIU fail.
//
// It speaks the kernel's FUSE protocol, version 7.31 (linux/fuse.h, and
// Documentation/filesystems/fuse.rst of the kernel), of which so little is
// needed that it fits here:
//
//	INIT                     versions; reads of up to 1 MiB
//	LOOKUP, GETATTR          names and sizes, which never change
//	OPEN                     "direct I/O": no copy of the content is cached
//	READ                     the content
//	anything else            ENOSYS
package pagefs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Source gives the content of files. Read calls use with n bytes at offset in
// parts, or with what is left of the file. It is called from up to Readers
// goroutines at once.
type Source interface {
	Read(name string, offset int64, n int, use func(parts [][]byte) error) error
}

// Readers is how many reads a Server serves at once.
const Readers = 4

// Server serves one mounted file system.
type Server struct {
	dir     string
	fd      int
	source  Source
	files   []file // node i+2 of the file system
	serving sync.WaitGroup

	mu  sync.Mutex
	err error // the first of the source
}

type file struct {
	name string
	size int64
}

// Mount mounts the files of the given sizes at dir, an empty directory. The mount
// is private to the mount namespace of the caller if that is.
func Mount(dir string, sizes map[string]int64, source Source) (*Server, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", fd, os.Getuid(), os.Getgid())
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY
	if err := unix.Mount("dormouse-pages", dir, "fuse", flags, options); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("mount fuse", err)
	}
	s := &Server{dir: dir, fd: fd, source: source}
	for name, size := range sizes {
		s.files = append(s.files, file{name, size})
	}
	for range Readers {
		s.serving.Go(s.serve)
	}
	return s, nil
}

// Usable reports whether the kernel has FUSE and lets us use it; it tries at dir.
func Usable(dir string) bool {
	s, err := Mount(dir, nil, nil)
	return err == nil && s.Close() == nil
}

// Err is the first error of the source.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close unmounts. Processes that still have a file open get errors.
func (s *Server) Close() error {
	// MNT_FORCE ends the connection, and with it the reads of serve.
	err := unix.Unmount(s.dir, unix.MNT_DETACH|unix.MNT_FORCE)
	unix.Close(s.fd)
	s.serving.Wait()
	if err != nil {
		return &os.PathError{Op: "unmount", Path: s.dir, Err: err}
	}
	return nil
}

// Requests and answers, little endian as all machines of ours; linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	inHeader  = 40 // length, operation u32; unique, node u64; uid, gid, pid u32; padding
	outHeader = 16 // length u32, error i32, unique u64

	version, minor = 7, 31
	initMaxPages   = 1 << 22 // FUSE_MAX_PAGES: the field below counts
	initAsyncRead  = 1 << 0  // FUSE_ASYNC_READ: several reads of a file at once
	maxPages       = 256
	openDirect     = 1 << 0 // FOPEN_DIRECT_IO

	rootNode = 1
	forever  = 1 << 31 // seconds that names and attributes stay valid

	requestBuffer = 64 << 10 // of requests without data, by far
)

// serve answers requests until the file system is closed.
func (s *Server) serve() {
	buf := make([]byte, requestBuffer)
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			// ENOENT: what was asked for is not wanted any more.
		case err != nil: // ENODEV: unmounted
			return
		case n >= inHeader:
			s.answer(buf[:n])
		}
	}
}

func (s *Server) answer(request []byte) {
	le := binary.LittleEndian
	operation, unique, node := le.Uint32(request[4:]), le.Uint64(request[8:]), le.Uint64(request[16:])
	body := request[inHeader:]
	switch operation {
	case opForget, opBatchForget, opInterrupt: // have no answer
	case opInit:
		s.reply(unique, 0, initAnswer(body))
	case opLookup:
		s.lookup(unique, body)
	case opGetattr:
		if attr := s.attr(node); attr != nil {
			s.reply(unique, 0, append(append(le.AppendUint64(nil, forever), make([]byte, 8)...), attr...))
			return
		}
		s.reply(unique, unix.ENOENT)
	case opOpen:
		s.reply(unique, 0, le.AppendUint32(make([]byte, 8), openDirect), make([]byte, 4))
	case opRead:
		s.read(unique, node, body)
	case opRelease, opFlush, opDestroy:
		s.reply(unique, 0)
	default:
		s.reply(unique, unix.ENOSYS)
	}
}

// initAnswer is a fuse_init_out.
func initAnswer(body []byte) []byte {
	le := binary.LittleEndian
	var flags uint32 = initAsyncRead | initMaxPages
	if len(body) >= 16 {
		flags &= le.Uint32(body[12:])
	}
	out := le.AppendUint32(nil, version)
	out = le.AppendUint32(out, minor)
	out = le.AppendUint32(out, maxPages*4096) // max_readahead
	out = le.AppendUint32(out, flags)
	out = le.AppendUint16(out, 0)    // max_background: the kernel's default
	out = le.AppendUint16(out, 0)    // congestion_threshold
	out = le.AppendUint32(out, 4096) // max_write
	out = le.AppendUint32(out, 1)    // time_gran
	out = le.AppendUint16(out, maxPages)
	return append(out, make([]byte, 64-len(out))...)
}

// lookup answers with a fuse_entry_out.
func (s *Server) lookup(unique uint64, body []byte) {
	name := string(body)
	if n := len(name); n > 0 && name[n-1] == 0 {
		name = name[:n-1]
	}
	i := slices.IndexFunc(s.files, func(f file) bool { return f.name == name })
	if i < 0 {
		s.reply(unique, unix.ENOENT)
		return
	}
	le := binary.LittleEndian
	node := uint64(i) + rootNode + 1
	out := le.AppendUint64(nil, node)
	out = le.AppendUint64(out, 0)       // generation
	out = le.AppendUint64(out, forever) // entry_valid
	out = le.AppendUint64(out, forever) // attr_valid
	out = le.AppendUint64(out, 0)       // nanoseconds of both
	s.reply(unique, 0, append(out, s.attr(node)...))
}

// attr is a fuse_attr, or nil if there is no such node.
func (s *Server) attr(node uint64) []byte {
	var size int64
	mode, links := uint32(unix.S_IFDIR|0o500), uint32(2)
	if node != rootNode {
		if node-rootNode > uint64(len(s.files)) || node == 0 {
			return nil
		}
		size = s.files[node-rootNode-1].size
		mode, links = unix.S_IFREG|0o400, 1
	}
	le := binary.LittleEndian
	out := le.AppendUint64(nil, node)
	out = le.AppendUint64(out, uint64(size))
	out = le.AppendUint64(out, uint64(size+511)/512)
	out = append(out, make([]byte, 3*8+3*4)...) // times
	out = le.AppendUint32(out, mode)
	out = le.AppendUint32(out, links)
	out = append(out, make([]byte, 3*4)...)               // owner, group, device
	return append(le.AppendUint32(out, 4096), 0, 0, 0, 0) // block size
}

// read answers with content: a fuse_read_in has the handle and the offset as
// u64, then the size as u32.
func (s *Server) read(unique, node uint64, body []byte) {
	if node <= rootNode || node-rootNode > uint64(len(s.files)) || len(body) < 20 {
		s.reply(unique, unix.EINVAL)
		return
	}
	f := s.files[node-rootNode-1]
	offset := int64(binary.LittleEndian.Uint64(body[8:]))
	n := min(int64(binary.LittleEndian.Uint32(body[16:])), f.size-offset)
	if n <= 0 {
		s.reply(unique, 0)
		return
	}
	err := s.source.Read(f.name, offset, int(n), func(parts [][]byte) error {
		s.reply(unique, 0, parts...)
		return nil
	})
	if err != nil {
		s.mu.Lock()
		if s.err == nil {
			s.err = err
		}
		s.mu.Unlock()
		s.reply(unique, unix.EIO)
	}
}

// reply sends an answer. It fails only when nobody waits for it any more.
func (s *Server) reply(unique uint64, status unix.Errno, parts ...[]byte) {
	length := outHeader
	for _, p := range parts {
		length += len(p)
	}
	le := binary.LittleEndian
	head := le.AppendUint32(nil, uint32(length))
	head = le.AppendUint32(head, uint32(-int32(status)))
	head = le.AppendUint64(head, unique)
	for {
		_, err := unix.Writev(s.fd, append([][]byte{head}, parts...))
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
