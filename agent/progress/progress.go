// Package progress hears how far a task says it has come, for the monitor.
//
// A task says so in two ways. It writes a number into its progress file, itself
// or with `dormouse-ctl progress N`: the last line counts. Or it says so by the way
// in its output, where an expression given with the job finds it: a number, or
// just one more step with each line that matches. The file goes before the
// output.
//
// Both are files of the task, which may write what it likes at any speed. So a
// Reader looks at what was added since it looked last and at no more than a
// megabyte of that; of a line it sees the first 4 KiB. Both travel with every
// checkpoint, so a task that was restored goes on from where it was.
package progress

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"regexp"
	"strconv"
)

// Bounds of one look, in bytes.
const (
	maxLine  = 4 << 10
	maxAdded = 1 << 20
	maxFirst = 64 << 10 // of what was there before the first look
	maxFile  = 256      // of the progress file, from its end
)

// Reader reads one task's progress. It is not safe for concurrent use.
type Reader struct {
	file    func() (*os.File, error)
	logs    []*tail
	pattern *regexp.Regexp // nil: the output says nothing

	value float64
	known bool
}

// New reads the progress file that file opens and, with a pattern, the output
// that logs open. The pattern's first group is the number; without a group each
// match is one step.
func New(file func() (*os.File, error), pattern *regexp.Regexp, logs ...func() (*os.File, error)) *Reader {
	r := &Reader{file: file, pattern: pattern}
	if pattern == nil {
		return r
	}
	for _, open := range logs {
		r.logs = append(r.logs, &tail{open: open})
	}
	return r
}

// Read returns how far the task has come, in units of its own; nil when it has
// not said.
func (r *Reader) Read() (*float64, error) {
	said, err := r.readFile()
	if err != nil {
		return nil, err
	}
	if !said {
		if err := r.readLogs(); err != nil {
			return nil, err
		}
	}
	if !r.known {
		return nil, nil
	}
	value := r.value
	return &value, nil
}

// readFile reports whether the task uses its progress file.
func (r *Reader) readFile() (bool, error) {
	file, err := r.file()
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return false, err
	}
	text := make([]byte, min(info.Size(), maxFile))
	n, err := file.ReadAt(text, info.Size()-int64(len(text)))
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	text = bytes.TrimSpace(text[:n])
	r.take(text[bytes.LastIndexByte(text, '\n')+1:])
	return true, nil
}

// take what may be a number.
func (r *Reader) take(text []byte) {
	value, err := strconv.ParseFloat(string(bytes.TrimSpace(text)), 64)
	if err == nil && !math.IsNaN(value) && !math.IsInf(value, 0) {
		r.value, r.known = value, true
	}
}

func (r *Reader) readLogs() error {
	for _, log := range r.logs {
		steps := 0.0
		share, err := log.read(func(line []byte) {
			switch found := r.pattern.FindSubmatch(line); {
			case len(found) > 1:
				r.take(found[1])
			case found != nil:
				steps++
			}
		})
		if err != nil {
			return err
		}
		if steps > 0 {
			r.value, r.known = r.value+steps/share, true
		}
	}
	return nil
}

// tail is a growing file.
type tail struct {
	open  func() (*os.File, error)
	begun bool
	at    int64
	line  []byte // begun and not ended
	cut   bool   // it is longer than that, or its beginning was not seen
}

// read gives each line that was ended since the last read, and returns which
// share, above 0, of all that was added it has read: the newest.
func (t *tail) read(each func([]byte)) (share float64, err error) {
	file, err := t.open()
	if errors.Is(err, fs.ErrNotExist) {
		return 1, nil
	}
	if err != nil {
		return 1, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return 1, err
	}
	size := info.Size()
	if size < t.at { // it was made shorter
		t.at, t.line, t.cut = 0, nil, false
	}
	share = t.skip(size)
	buffer := make([]byte, min(size-t.at, 64<<10))
	for t.at < size {
		n, err := file.ReadAt(buffer[:min(int64(len(buffer)), size-t.at)], t.at)
		t.at += int64(n)
		t.split(buffer[:n], each)
		if errors.Is(err, io.EOF) || n == 0 {
			break
		}
		if err != nil {
			return share, err
		}
	}
	return share, nil
}

// skip leaves out the oldest of what was added if it is too much.
func (t *tail) skip(size int64) float64 {
	most := int64(maxAdded)
	if !t.begun {
		most = maxFirst
	}
	added := size - t.at
	share := 1.0
	if added > most {
		t.at, t.line, t.cut = size-most, nil, true
		if t.begun {
			share = float64(most) / float64(added)
		}
	}
	t.begun = true
	return share
}

// split text into lines. A carriage return ends one, too, as progress bars use
// it.
func (t *tail) split(text []byte, each func([]byte)) {
	for len(text) > 0 {
		end := bytes.IndexAny(text, "\r\n")
		if end < 0 {
			t.add(text)
			return
		}
		t.add(text[:end])
		// Of a line that is too long the beginning is looked at.
		if len(t.line) > 0 {
			each(t.line)
		}
		t.line, t.cut = t.line[:0], false
		text = text[end+1:]
	}
}

// add to the line, unless it is too long already or began unseen.
func (t *tail) add(text []byte) {
	if t.cut {
		return
	}
	room := maxLine - len(t.line)
	if len(text) > room {
		text, t.cut = text[:room], true
	}
	t.line = append(t.line, text...)
}
