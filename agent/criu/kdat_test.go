package criu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// loaded reports whether a CRIU has used what an earlier one had found out.
func loaded(t *testing.T, log string) bool {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), "Loaded kdat cache")
}

func TestCRIUAsksTheKernelOnlyOnce(t *testing.T) {
	e := newEngine(t)
	before, beforeErr := os.Stat(filepath.Join(runDir, kdatFile))
	s := startSandbox(t, e, job(t), "counter")
	s.moreLines(2)
	const info = 4
	dump := func() (DumpRequest, bool) {
		r := s.request()
		r.LeaveRunning, r.LogLevel = true, info
		mustDump(t, s, r)
		return r, loaded(t, filepath.Join(r.ImagesDir, dumpLog))
	}
	if _, known := dump(); known {
		t.Error("the first CRIU found something in a new /run")
	}
	if _, known := dump(); !known {
		t.Error("the second CRIU did not use what the first had found out")
	}
	e.kernel.data = e.kernel.data[:len(e.kernel.data)-1]
	if _, known := dump(); known {
		t.Error("CRIU used a file that is cut off")
	}
	r, known := dump()
	if !known {
		t.Error("what CRIU wrote in the place of a bad file was not kept")
	}
	s.kill()
	restored := s.restore(r.ImagesDir)
	restored.moreLines(2)
	after, afterErr := os.Stat(filepath.Join(runDir, kdatFile))
	if (beforeErr == nil) != (afterErr == nil) || beforeErr == nil && !before.ModTime().Equal(after.ModTime()) {
		t.Error("the machine's own /run has changed")
	}
}

func TestCRIUSeesTheMachinesRunWhenItNeedsIt(t *testing.T) {
	e := newEngine(t)
	dir, err := os.MkdirTemp(runDir, "dormouse-criu-test-")
	if err != nil {
		missing(t, "this test makes a directory in /run: "+err.Error())
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "name"), []byte("below /run"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(runDir, link); err != nil {
		t.Fatal(err)
	}
	s := startStage(t, e, unix.CLONE_NEWNET, stage{Program: objects(t), Args: []string{"files"}, Volume: dir})
	s.moreLines(2)
	r := s.request()
	r.ExternalMounts = []DumpMount{{Key: "data", Mountpoint: "/mnt"}}
	mustDump(t, s, r)
	for _, source := range []string{dir, filepath.Join(link, filepath.Base(dir))} {
		restored := s.restore(r.ImagesDir, RestoreMount{Key: "data", Source: source})
		lines := restored.moreLines(3)
		if last := lines[len(lines)-1]; last != "n below /run" {
			t.Errorf("with the source %s the program reads %q, expected what is below /run", source, last)
		}
		restored.kill()
	}
}

func TestSourcesThatContainRun(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "all")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]bool{"/": true, link: true, dir: true, dir + "/run": true, "/usr": false, dir + "/ru": false} {
		if got := contain([]string{"/usr", file}, filepath.Join(dir, "run")); got != want {
			t.Errorf("%s contains %s/run: %v, expected %v", file, dir, got, want)
		}
	}
}
