package sample

import (
	"bytes"
	"errors"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reader reads small kernel files into one buffer. What read returns is good
// until the next call.
type reader struct{ buffer []byte }

func (r *reader) read(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if r.buffer == nil {
		r.buffer = make([]byte, 8192)
	}
	for n := 0; ; {
		if n == len(r.buffer) {
			r.buffer = append(r.buffer, make([]byte, len(r.buffer))...)
		}
		got, err := unix.Read(fd, r.buffer[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if got == 0 {
			return r.buffer[:n], nil
		}
		n += got
	}
}

// gone reports whether err means that what was to be read has ended or that the
// kernel does not have it.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) ||
		errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP)
}

// number reads the decimal number at the start of text; 0 when there is none.
func number(text []byte) uint64 {
	var n uint64
	for _, c := range text {
		if c < '0' || c > '9' {
			break
		}
		n = n*10 + uint64(c-'0')
	}
	return n
}

// lines calls do with every line's first word and the rest.
func lines(text []byte, do func(key, rest []byte)) {
	for len(text) > 0 {
		line := text
		if end := bytes.IndexByte(text, '\n'); end >= 0 {
			line, text = text[:end], text[end+1:]
		} else {
			text = nil
		}
		key, rest, _ := bytes.Cut(line, []byte{' '})
		do(key, rest)
	}
}

// pressure reads the format of PSI files: the "total" of each line is in
// microseconds.
func pressure(text []byte) (p Pressure) {
	lines(text, func(key, rest []byte) {
		_, total, ok := bytes.Cut(rest, []byte("total="))
		if !ok {
			return
		}
		switch string(key) {
		case "some":
			p.Some = microseconds(total)
		case "full":
			p.Full = microseconds(total)
		}
	})
	return p
}

func microseconds(text []byte) time.Duration {
	return time.Duration(number(text)) * time.Microsecond
}

// tick is the unit of times in /proc/PID/stat: USER_HZ, which is 100 on every
// architecture Linux still has.
const tick = 10 * time.Millisecond

// processStat is what is used of /proc/PID/stat, proc_pid_stat(5).
type processStat struct {
	state       byte
	majorFaults uint64
	cpu         time.Duration
	blockDelay  time.Duration
}

func parseStat(text []byte) (stat processStat, ok bool) {
	// The command may contain anything, parentheses and spaces included.
	end := bytes.LastIndexByte(text, ')')
	if end < 0 || end+2 >= len(text) {
		return stat, false
	}
	field := 3
	for word := range bytes.SplitSeq(bytes.TrimRight(text[end+2:], "\n"), []byte{' '}) {
		switch field {
		case 3:
			if len(word) != 1 {
				return stat, false
			}
			stat.state = word[0]
		case 12:
			stat.majorFaults = number(word)
		case 14, 15:
			stat.cpu += time.Duration(number(word)) * tick
		case 42:
			stat.blockDelay = time.Duration(number(word)) * tick
		}
		field++
	}
	return stat, field > 15
}

// parseSchedstat reads /proc/TID/schedstat: nanoseconds run, nanoseconds waited,
// times run (kernel Documentation/scheduler/sched-stats.rst).
func parseSchedstat(text []byte) (run, delay, slices uint64, ok bool) {
	words := bytes.Fields(text)
	if len(words) != 3 {
		return 0, 0, 0, false
	}
	return number(words[0]), number(words[1]), number(words[2]), true
}

// parseIOStat sums io.stat of cgroup v2 over all devices.
func parseIOStat(text []byte) (read, written, operations uint64) {
	lines(text, func(_, rest []byte) {
		for word := range bytes.FieldsSeq(rest) {
			key, value, _ := bytes.Cut(word, []byte{'='})
			switch string(key) {
			case "rbytes":
				read += number(value)
			case "wbytes":
				written += number(value)
			case "rios", "wios":
				operations += number(value)
			}
		}
	})
	return read, written, operations
}

// parseBlkio sums a blkio.throttle file of cgroup v1 over all devices.
func parseBlkio(text []byte) (read, write uint64) {
	lines(text, func(_, rest []byte) {
		kind, value, _ := bytes.Cut(rest, []byte{' '})
		switch string(kind) {
		case "Read":
			read += number(value)
		case "Write":
			write += number(value)
		}
	})
	return read, write
}

// parseMax reads cpu.max: "QUOTA PERIOD" or "max PERIOD".
func parseMax(text []byte) float64 {
	quota, period, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	return ratio(quota, period)
}

// ratio of quota to period; 0, no limit, unless both are positive.
func ratio(quota, period string) float64 {
	q, err := strconv.ParseInt(strings.TrimSpace(quota), 10, 64)
	if err != nil || q <= 0 {
		return 0
	}
	p, err := strconv.ParseInt(strings.TrimSpace(period), 10, 64)
	if err != nil || p <= 0 {
		return 0
	}
	return float64(q) / float64(p)
}
