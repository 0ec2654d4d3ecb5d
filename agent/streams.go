package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pageStreams takes the content of memory from CRIU while it dumps into a spool
// in memory. CRIU finds named pipes where it would create its pages images
// (pages-1.img, pages-2.img, ...: one per process, then those of shared memory,
// as criu/pagemap.c and criu/page-xfer.c number them). What it splices into
// them goes on, inside the kernel, into files whose memory was allocated before
// the task was frozen. So the pause has neither the allocation of as much memory
// as the task has, nor, in a virtual machine, the hypervisor's finding of it:
// measured, 1 GiB takes 0.25 s instead of 0.5 s, or of 2.7 s where the
// hypervisor has to back the memory first.
//
// The pages in the pipes are the task's own until they are copied: finish must
// return before the task may go on.
type pageStreams struct {
	images  string
	streams []*pageStream
	waker   int // an eventfd: CRIU has closed all it has opened
	done    chan struct{}
	err     error // the first; valid after done
}

// pageStream is one pages image on its way.
type pageStream struct {
	name  string
	pipe  int // read end; -1 when all was taken
	file  *os.File
	bytes int64
	begun bool // CRIU has opened it
}

const (
	// streamsMost bounds the named pipes; the images of further processes are
	// written by CRIU as usual.
	streamsMost = 64
	// streamsSpare are for shared memory, and for processes that start meanwhile.
	streamsSpare = 8
	streamStep   = 1 << 20 // and size of a pipe, where the kernel allows it
)

// newPageStreams makes the pipes in the directory images, and beside it files
// for what comes through them. expected says how many bytes the first images
// will have; memory for them is made ready now.
func newPageStreams(ctx context.Context, images string, expected []int64) (_ *pageStreams, err error) {
	waker, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	p := &pageStreams{images: images, waker: waker, done: make(chan struct{})}
	for i := range min(len(expected)+streamsSpare, streamsMost) {
		var size int64
		if i < len(expected) {
			size = expected[i]
		}
		if err := p.add(ctx, fmt.Sprintf("pages-%d.img", i+1), size); err != nil {
			close(p.done)
			p.free()
			return nil, err
		}
	}
	go p.run()
	return p, nil
}

func (p *pageStreams) add(ctx context.Context, name string, size int64) error {
	path := filepath.Join(p.images, name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	s := &pageStream{name: name, pipe: -1}
	p.streams = append(p.streams, s)
	var err error
	if s.pipe, err = unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	if s.file, err = os.OpenFile(p.aside(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	allocate(ctx, s.file, size)
	return nil
}

// aside is where the content of an image goes until all of it is there.
func (p *pageStreams) aside(name string) string { return p.images + "." + name }

// run takes what comes until the waker says that nothing more will.
func (p *pageStreams) run() {
	defer close(p.done)
	fds := make([]unix.PollFd, len(p.streams)+1)
	for {
		fds[0] = unix.PollFd{Fd: int32(p.waker), Events: unix.POLLIN}
		for i, s := range p.streams {
			fds[i+1] = unix.PollFd{Fd: int32(s.pipe), Events: unix.POLLIN} // of -1, poll(2) takes no notice
		}
		n, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			p.fail(os.NewSyscallError("poll", err))
			for _, s := range p.streams { // CRIU must not wait for us
				s.closePipe()
			}
			return
		}
		if n == 1 && fds[0].Revents != 0 {
			return
		}
		for i, s := range p.streams {
			if fds[i+1].Revents != 0 {
				p.take(s)
			}
		}
	}
}

// take moves what a pipe has to its file. It never stops before CRIU does: a
// CRIU that cannot write would end, or wait, with the task stopped.
func (p *pageStreams) take(s *pageStream) {
	if !s.begun {
		s.begun = true
		// A larger pipe means fewer switches between CRIU and us, no more.
		_, _ = unix.FcntlInt(uintptr(s.pipe), unix.F_SETPIPE_SZ, streamStep)
	}
	for {
		n, err := unix.Splice(s.pipe, nil, int(s.file.Fd()), nil, streamStep, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return
		case err != nil:
			if p.err != nil { // not even into nothing
				s.closePipe()
				return
			}
			p.fail(fmt.Errorf("write %s: %w", s.name, err))
		case n == 0:
			s.closePipe()
			return
		default:
			s.bytes += n
		}
	}
}

// fail has the rest thrown away.
func (p *pageStreams) fail(err error) {
	p.err = err
	for _, s := range p.streams {
		s.file.Close()
		if s.file, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			s.closePipe()
		}
	}
}

// finish returns how many bytes came, once all of them are in the images. CRIU
// must have closed what it has opened.
func (p *pageStreams) finish() (bytes int64, err error) {
	p.wake()
	<-p.done
	defer p.free()
	if p.err != nil {
		return 0, p.err
	}
	for _, s := range p.streams {
		path := filepath.Join(p.images, s.name)
		if !s.begun {
			if err := errors.Join(removeFIFO(path), os.Remove(p.aside(s.name))); err != nil {
				return 0, err
			}
			continue
		}
		if s.pipe >= 0 {
			return 0, fmt.Errorf("CRIU did not complete %s", s.name)
		}
		if err := s.file.Truncate(s.bytes); err != nil {
			return 0, err
		}
		if err := os.Rename(p.aside(s.name), path); err != nil {
			return 0, err
		}
		bytes += s.bytes
	}
	return bytes, nil
}

// removeFIFO removes a pipe that was not used.
func removeFIFO(path string) error {
	err := os.Remove(path)
	if notExist(err) {
		return nil
	}
	return err
}

func (p *pageStreams) wake() {
	var one [8]byte
	one[0] = 1
	_, _ = unix.Write(p.waker, one[:]) // fails when it is awake
}

// close frees what finish leaves; the files are the spool's. CRIU must have
// ended or be past its dump.
func (p *pageStreams) close() {
	p.wake()
	<-p.done
	p.free()
}

func (p *pageStreams) free() {
	for _, s := range p.streams {
		s.closePipe()
		if s.file != nil {
			s.file.Close()
		}
	}
	if p.waker >= 0 {
		unix.Close(p.waker)
	}
	p.waker = -1
}

func (s *pageStream) closePipe() {
	if s.pipe >= 0 {
		unix.Close(s.pipe)
	}
	s.pipe = -1
}

// privateMemory returns how much memory CRIU will find in each process of the
// tree below init, in the order in which it dumps them: a process before its
// children, these in the kernel's order. A wrong answer costs time only.
func privateMemory(init int) []int64 {
	var sizes []int64
	var visit func(pid string)
	visit = func(pid string) {
		if len(sizes) >= streamsMost {
			return
		}
		sizes = append(sizes, anonymousBytes(pid))
		lists, _ := filepath.Glob(filepath.Join("/proc", pid, "task", "*", "children"))
		for _, list := range lists {
			children, _ := os.ReadFile(list)
			for _, child := range strings.Fields(string(children)) {
				visit(child)
			}
		}
	}
	visit(strconv.Itoa(init))
	return sizes
}

// anonymousBytes reads RssAnon, proc(5).
func anonymousBytes(pid string) int64 {
	status, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kib << 10
		}
	}
	return 0
}
