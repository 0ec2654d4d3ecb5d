package criu

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"dormouse/internal/lazyregexp"
)

// Reasons on which a caller may decide; an Error from Dump or Restore wraps at
// most one of them.
var (
	// ErrInFlight: a TCP connection was being established or not accepted yet. Thaw the job for
	// some 100 ms and dump again.
	ErrInFlight = errors.New("a TCP connection is being established or waits to be accepted")
	// ErrUnread: a program has not read yet what the kernel told it by a netlink socket or
	// by the watches of inotify or fanotify, which CRIU does not carry. Thaw the job for
	// some 100 ms and dump again.
	ErrUnread = errors.New("CRIU does not carry what was not read yet")
	// ErrBusy: a process could not be stopped in time, mostly because it was
	// inside vfork. Thaw the job for some 100 ms and dump again.
	ErrBusy = errors.New("a process could not be stopped in time")
	// ErrNoSpace: the file system of the images is full.
	ErrNoSpace = errors.New("no space left for the images")
	// ErrDied: CRIU ended without an answer.
	ErrDied = errors.New("CRIU ended without an answer")
	// ErrLeftOut: a process in the job's cgroup is not part of the tree and
	// would have been left out silently.
	ErrLeftOut = errors.New("a process of the job is not in its tree")
)

// Error is a failure of CRIU. Its text is one sentence.
type Error struct {
	Op string // "dump", "restore", ...
	// Lines are the distinct error lines of CRIU's log in their order, without
	// time stamps and without those known to be harmless. The first one is
	// mostly the cause, the rest its consequences.
	Lines   []string
	LogPath string
	Err     error
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("criu ")
	b.WriteString(e.Op)
	if e.Err != nil {
		b.WriteString(": ")
		b.WriteString(e.Err.Error())
	}
	if len(e.Lines) > 0 {
		b.WriteString(": ")
		b.WriteString(e.Lines[0])
	}
	if e.LogPath != "" {
		b.WriteString(" (log: ")
		b.WriteString(e.LogPath)
		b.WriteString(")")
	}
	return b.String()
}

// Unwrap gives the reason.
func (e *Error) Unwrap() error { return e.Err }

// maxErrorLines bounds Error.Lines.
const maxErrorLines = 20

// harmless are error lines that CRIU also writes when all is well, or that only
// say that the whole has failed.
var harmless = []string{
	"Can't setup RLIMIT_NOFILE for self",
	"Dumping FAILED",
	"Restoring FAILED",
	"One of more action scripts failed",
	"RPC client reported script error",
}

// logLine is "(00.012345)    123: Error (criu/files.c:45): text"; the pid and
// the time are optional.
var logLine = lazyregexp.New(`^(?:\(\d+\.\d+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?(Error \([^)]*\): .*)$`)

// errorLines reads CRIU's error lines from a log.
func errorLines(r io.Reader) []string {
	var lines []string
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		m := logLine.FindStringSubmatch(strings.TrimSpace(scanner.Text()))
		if m == nil || isHarmless(m[1]) || slices.Contains(lines, m[1]) {
			continue
		}
		if lines = append(lines, m[1]); len(lines) == maxErrorLines {
			break
		}
	}
	return lines
}

func isHarmless(line string) bool {
	return slices.ContainsFunc(harmless, func(h string) bool { return strings.Contains(line, h) })
}

// causes maps texts of CRIU's error lines to reasons.
var causes = []struct {
	text string
	err  error
}{
	{"In-flight connection", ErrInFlight},
	{"netlink: The socket has data to read", ErrUnread},
	{"No space left on device", ErrNoSpace},
	{"Timeout reached", ErrBusy},
	{"Unable to freeze cgroup", ErrBusy},
	{"zombie found while seizing", ErrBusy},
	{"nested net namespace", ErrBusy}, // made since the dump began
	{"Can't freeze processes", ErrBusy},
}

// newError builds the Error of a failed operation from its log file. reason may
// be nil: then the log is asked for a known one.
func newError(op, logPath, fallback string, reason error) *Error {
	e := &Error{Op: op, Err: reason}
	if f, err := os.Open(logPath); err == nil {
		e.Lines, e.LogPath = errorLines(f), logPath
		f.Close()
	}
	if len(e.Lines) == 0 && fallback != "" && !isHarmless(fallback) {
		e.Lines = []string{strings.TrimSpace(fallback)}
	}
	if errors.Is(e.Err, unix.ENOSPC) {
		e.Err = fmt.Errorf("%w: %w", ErrNoSpace, e.Err)
	}
	if e.Err != nil {
		return e
	}
	for _, c := range causes {
		if slices.ContainsFunc(e.Lines, func(l string) bool { return strings.Contains(l, c.text) }) {
			e.Err = c.err
			return e
		}
	}
	if len(e.Lines) == 0 {
		e.Err = fmt.Errorf("failed without saying why")
	}
	return e
}
