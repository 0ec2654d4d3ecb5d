package progress

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// world is the files of a task.
type world struct {
	t         *testing.T
	file, log string
	reader    *Reader
}

func newWorld(t *testing.T, pattern string) *world {
	dir := t.TempDir()
	w := &world{t: t, file: filepath.Join(dir, "progress"), log: filepath.Join(dir, "stdout")}
	w.start(pattern)
	return w
}

// start is also what a new agent does.
func (w *world) start(pattern string) {
	var p *regexp.Regexp
	if pattern != "" {
		p = regexp.MustCompile(pattern)
	}
	open := func(name string) func() (*os.File, error) { return func() (*os.File, error) { return os.Open(name) } }
	w.reader = New(open(w.file), p, open(w.log))
}

func (w *world) write(name, text string, flags int) {
	w.t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|flags, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		f.Close()
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) append(text string) { w.t.Helper(); w.write(w.log, text, os.O_APPEND) }

// reads checks what is read next; a negative value is none.
func (w *world) reads(want float64) {
	w.t.Helper()
	got, err := w.reader.Read()
	if err != nil {
		w.t.Fatal(err)
	}
	switch {
	case got == nil && want >= 0:
		w.t.Errorf("no progress is read, want %v", want)
	case got != nil && *got != want:
		w.t.Errorf("%v is read, want %v", *got, want)
	}
}

func TestTheLastLineOfTheProgressFileCounts(t *testing.T) {
	w := newWorld(t, "")
	w.reads(-1)
	w.write(w.file, "", 0)
	w.reads(-1)
	w.write(w.file, "12\n", os.O_TRUNC)
	w.reads(12)
	w.write(w.file, "13.5\n", os.O_APPEND)
	w.reads(13.5)
	for _, nonsense := range []string{"", "nan", "inf", "1e999", "twelve\n", "\n\n"} {
		w.write(w.file, nonsense, os.O_TRUNC)
		w.reads(13.5)
	}
	w.write(w.file, strings.Repeat("1\n", 10000)+"14", os.O_TRUNC)
	w.reads(14)
}

func TestANumberInTheOutputIsProgress(t *testing.T) {
	w := newWorld(t, `^step (\d+)`)
	w.reads(-1)
	w.append("starting\nstep 1\nstep 2\nste")
	w.reads(2)
	w.append("p 3")
	w.reads(2)
	w.append("\nnot a step 9\n")
	w.reads(3)
	w.append("step 4\rstep 5\r")
	w.reads(5)
	w.write(w.log, "step 1\n", os.O_TRUNC)
	w.reads(1)
}

func TestEachMatchIsAStep(t *testing.T) {
	w := newWorld(t, `done$`)
	w.append("a done\nb\nc done\n")
	w.reads(2)
	w.append("d done\n")
	w.reads(3)
}

func TestTheFileGoesBeforeTheOutput(t *testing.T) {
	w := newWorld(t, `(\d+)`)
	w.append("1\n")
	w.reads(1)
	w.write(w.file, "7", 0)
	w.append("2\n")
	w.reads(7)
}

func TestANewAgentFindsTheProgressOfEarlier(t *testing.T) {
	w := newWorld(t, `^step (\d+)`)
	w.append(strings.Repeat("x", maxFirst) + "\nstep 8\n" + strings.Repeat("noise\n", 100))
	w.start(`^step (\d+)`)
	w.reads(8)
	w.append("step 9\n")
	w.reads(9)
}

func TestALongLineIsLookedAtInItsBeginning(t *testing.T) {
	w := newWorld(t, `(\d+)`)
	w.reads(-1)
	w.append("41 " + strings.Repeat("x", 3*maxLine) + " 42\n")
	w.reads(41)
	w.append(strings.Repeat("x", 3*maxLine))
	w.reads(41)
	w.append("43\n44\n")
	w.reads(44)
}

// However much a task writes, a look is bounded, and the rate of steps is as if
// all had been looked at.
func TestMuchOutputIsEstimated(t *testing.T) {
	w := newWorld(t, `tick`)
	w.append("tick\n")
	w.reads(1)
	const lines = 4 * maxAdded / 8
	w.append(strings.Repeat("tick...\n", lines))
	got, err := w.reader.Read()
	if err != nil || *got < lines-10 || *got > lines+10 {
		t.Errorf("%v steps are read, %v; want about %d", *got, err, lines)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("step 1\nstep 2"), []byte("3"), 4)
	f.Fuzz(func(t *testing.T, log, file []byte, cut int) {
		w := newWorld(t, `(\d+)`)
		cut = min(max(cut, 0), len(log))
		for _, text := range [][]byte{log[:cut], log[cut:]} {
			w.append(string(text))
			if _, err := w.reader.Read(); err != nil {
				t.Fatal(err)
			}
		}
		// What is read in two pieces is what is read in one.
		two := fmt.Sprint(w.reader.value, w.reader.known)
		if len(log) < maxFirst {
			w.start(`(\d+)`)
			w.look()
			if one := fmt.Sprint(w.reader.value, w.reader.known); one != two {
				t.Errorf("%s in two pieces, %s in one", two, one)
			}
		}
		w.write(w.file, string(file), os.O_TRUNC)
		w.look()
	})
}

// look reads whatever there is.
func (w *world) look() {
	w.t.Helper()
	if _, err := w.reader.Read(); err != nil {
		w.t.Fatal(err)
	}
}

func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	name := filepath.Join(dir, "stdout")
	f, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	open := func() (*os.File, error) { return os.Open(name) }
	r := New(func() (*os.File, error) { return os.Open(filepath.Join(dir, "none")) }, regexp.MustCompile(`step (\d+)`), open, open)
	for i := range b.N {
		fmt.Fprintf(f, "2026-11-21 12:00:00 INFO step %d loss 0.123\n", i)
		if _, err := r.Read(); err != nil {
			b.Fatal(err)
		}
	}
}
