package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// session is a process that was exec'ed into the sandbox, with its pipes or its
// terminal. Connections come and go; what the process writes while there is
// none waits in its pipe.
type session struct {
	id       uint64
	attached bool // guarded by control.mu

	family *family
	pid    int
	exited <-chan syscall.WaitStatus
	input  *os.File // the terminal, too
	output []stream
	tty    bool
	whole  bool // nothing that the process started may stay

	queued chan struct{} // holds a token while there is pending input
	gone   chan struct{} // closed by hangUp
	fed    sync.WaitGroup

	mu       sync.Mutex
	pending  [][]byte // input on its way to the process; an empty one is its end
	waiting  int      // bytes in pending
	consumed uint64   // bytes given to the process
	link     *conn    // told about consumed
}

// stream is one output of the process.
type stream struct {
	kind pid1.FrameType
	file *os.File
}

// startSession starts the process of an exec request.
func startSession(f *family, run *pid1.Run, r *pid1.Request) (*session, error) {
	env := append(append([]string{}, run.Env...), r.Env...)
	if _, ok := lookupEnv(env, "TERM"); !ok && r.TTY {
		env = append(env, "TERM=xterm")
	}
	like := *run
	like.Env = env
	file, err := lookupCommand(&like, r.Command[0])
	if err != nil {
		return nil, err
	}
	s := &session{family: f, tty: r.TTY, whole: r.Whole, queued: make(chan struct{}, 1), gone: make(chan struct{})}
	childs, err := s.open(r, run)
	if err == nil {
		s.pid, s.exited, err = f.start(run, file, r.Command, unique(env), childs, r.TTY)
	}
	for i, fd := range childs {
		if i == 0 || fd != childs[0] {
			_ = syscall.Close(int(fd))
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.fed.Go(s.feed)
	return s, nil
}

// unique keeps the last of several values of one variable.
func unique(env []string) []string {
	last := map[string]int{}
	for i, entry := range env {
		key, _, _ := strings.Cut(entry, "=")
		last[key] = i
	}
	var kept []string
	for i, entry := range env {
		if key, _, _ := strings.Cut(entry, "="); last[key] == i {
			kept = append(kept, entry)
		}
	}
	return kept
}

// open makes the session's ends of the pipes or terminal and returns the
// process's ends as its first three descriptors.
func (s *session) open(r *pid1.Request, run *pid1.Run) ([]uintptr, error) {
	if r.TTY {
		return s.openTerminal(r, run)
	}
	var childs []uintptr
	for i := range 3 {
		var pair [2]int
		if err := syscall.Pipe2(pair[:], syscall.O_CLOEXEC); err != nil {
			return childs, fmt.Errorf("cannot make a pipe: %w", err)
		}
		ours, theirs := pair[0], pair[1]
		if i == 0 {
			ours, theirs = pair[1], pair[0]
		}
		childs = append(childs, uintptr(theirs))
		file, err := pollable(ours, "pipe")
		if err != nil {
			return childs, err
		}
		switch i {
		case 0:
			s.input = file
		case 1:
			s.output = append(s.output, stream{pid1.FrameStdout, file})
		case 2:
			s.output = append(s.output, stream{pid1.FrameStderr, file})
		}
	}
	return childs, nil
}

// openTerminal allocates a terminal of the sandbox's own devpts.
func (s *session) openTerminal(r *pid1.Request, run *pid1.Run) ([]uintptr, error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open a terminal: %w", err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	var terminal int
	if err == nil {
		name := fmt.Sprintf("/dev/pts/%d", number)
		terminal, err = unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = os.Chown(name, int(run.UID), -1)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot set up a terminal: %w", err), unix.Close(fd))
	}
	childs := []uintptr{uintptr(terminal), uintptr(terminal), uintptr(terminal)}
	file, err := pollable(fd, "terminal")
	if err != nil {
		return childs, err
	}
	s.input, s.output = file, []stream{{pid1.FrameStdout, file}}
	return childs, s.resize(r.Rows, r.Cols)
}

// pollable makes reads of fd interruptible by deadlines.
func pollable(fd int, name string) (*os.File, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, syscall.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (s *session) resize(rows, cols uint16) error {
	if !s.tty || rows == 0 || cols == 0 {
		return nil
	}
	raw, err := s.input.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) {
		// A size that cannot be set is no reason to end a session.
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

// Why a conversation stopped.
type stop int

const (
	stopLost stop = iota // the agent is gone
	stopQuiesce
)

// converse serves the session over link until the process has ended, the
// connection is lost, or the agent wants it closed; only then the session goes
// on, and converse returns true.
func (s *session) converse(link *conn) (detached bool) {
	s.setLink(link)
	defer s.setLink(nil)
	s.deadline(time.Time{})
	stopped := make(chan stop, 1)
	// It ends at the latest when our caller closes the connection.
	go func() { stopped <- s.listen(link) }()
	var pumps sync.WaitGroup
	for _, out := range s.output {
		pumps.Go(func() { out.pump(link) })
	}
	var status syscall.WaitStatus
	why, ended := stopLost, false
	select {
	case status = <-s.exited:
		ended = true
	case why = <-stopped:
	}
	s.deadline(time.Unix(1, 0)) // the pumps return
	pumps.Wait()
	switch {
	case ended:
		s.killRest()
		for _, out := range s.output {
			out.drain(link)
		}
		_ = link.sendJSON(pid1.FrameExit, pid1.ExitOf(status))
	case why == stopQuiesce:
		detached = true
	}
	return detached
}

func (s *session) setLink(link *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.link = link
	if link != nil {
		s.acknowledge()
	}
}

// acknowledge tells the agent how much input the process has got. s.mu is held.
func (s *session) acknowledge() {
	if s.link != nil {
		// A lost connection is noticed by its reader.
		_ = s.link.send(pid1.FrameAck, binary.BigEndian.AppendUint64(nil, s.consumed))
	}
}

// listen takes what the agent sends.
func (s *session) listen(link *conn) stop {
	for {
		kind, payload, err := link.read()
		if err != nil {
			return stopLost
		}
		switch kind {
		case pid1.FrameStdin:
			if !s.enqueue(payload) {
				return stopLost // beyond the window: not our agent
			}
		case pid1.FrameResize:
			if len(payload) == 4 {
				_ = s.resize(binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:]))
			}
		case pid1.FrameSignal:
			if len(payload) == 1 {
				s.family.signalGroup(s.pid, syscall.Signal(payload[0]))
			}
		case pid1.FrameKill:
			s.killRest()
		case pid1.FrameQuiesce:
			return stopQuiesce
		}
	}
}

// killRest kills all processes of a whole session. The kernel does not give the
// session's number to another process while one of them is left, setsid(2).
func (s *session) killRest() {
	if !s.whole {
		return
	}
	killed := map[int]bool{}
	for before := -1; before < len(killed); { // what they started meanwhile
		before = len(killed)
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return // nothing can be found, as before the first process
		}
		for _, entry := range entries {
			if pid, err := strconv.Atoi(entry.Name()); err == nil && sessionOf(pid) == s.pid {
				killed[pid] = true
				_ = syscall.Kill(pid, syscall.SIGKILL) // it may have just ended
			}
		}
	}
}

// sessionOf reads the session of a live process, field 6 of proc_pid_stat(5); 0
// if it has ended.
func sessionOf(pid int) int {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(content[bytes.LastIndexByte(content, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 4 || fields[0] == "Z" || fields[0] == "X" {
		return 0
	}
	session, _ := strconv.Atoi(fields[3])
	return session
}

// enqueue hands input to feed, unless that is more than may wait.
func (s *session) enqueue(data []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting += len(data); s.waiting > pid1.Window {
		return false
	}
	s.pending = append(s.pending, data)
	select {
	case s.queued <- struct{}{}:
	default:
	}
	return true
}

// feed gives pending input to the process, for the life of the session.
func (s *session) feed() {
	open := true
	for {
		select {
		case <-s.queued:
		case <-s.gone:
			return
		}
		s.mu.Lock()
		batch := s.pending
		s.pending = nil
		s.mu.Unlock()
		for _, data := range batch {
			open = s.give(data, open)
		}
	}
}

// give writes one piece of input to the process, as long as its input is open.
func (s *session) give(data []byte, open bool) bool {
	switch {
	case len(data) > 0 && open:
		_, err := s.input.Write(data)
		open = err == nil
	case len(data) == 0 && s.tty:
		_, _ = s.input.Write([]byte{4}) // ^D
	case len(data) == 0 && open:
		_ = s.input.Close()
		open = false
	}
	// Input that the process does not want is consumed, too.
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting -= len(data)
	s.consumed += uint64(len(data))
	s.acknowledge()
	return open
}

// pump relays output until the file's end or deadline. What was read is always
// sent, so a conversation can stop between any two bytes.
func (o stream) pump(link *conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := o.file.Read(buffer)
		if n > 0 && link.send(o.kind, buffer[:n]) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// drain relays what the process left in the pipe. It does not wait for the end
// of the file: a child of the process may hold the pipe forever.
func (o stream) drain(link *conn) {
	raw, err := o.file.SyscallConn()
	if err != nil {
		return
	}
	buffer := make([]byte, 32<<10)
	for {
		n := 0
		_ = raw.Control(func(fd uintptr) { n, _ = syscall.Read(int(fd), buffer) })
		if n <= 0 || link.send(o.kind, buffer[:n]) != nil {
			return
		}
	}
}

func (s *session) deadline(t time.Time) {
	for _, out := range s.output {
		_ = out.file.SetReadDeadline(t)
	}
}

// hangUp ends the session: what is left of the process is told as by a
// terminal that went away.
func (s *session) hangUp() {
	close(s.gone)
	_ = s.close()
	s.fed.Wait()
	s.killRest()
	s.family.signalGroup(s.pid, syscall.SIGHUP)
	s.family.signalGroup(s.pid, syscall.SIGCONT)
}

func (s *session) close() error {
	var errs []error
	if s.input != nil {
		errs = append(errs, s.input.Close())
	}
	for _, out := range s.output {
		errs = append(errs, out.file.Close())
	}
	return errors.Join(errs...)
}
