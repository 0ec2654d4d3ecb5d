package criu

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const sampleLog = `(00.000012) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.001000) Warn  (criu/kerndat.c:1): something
(00.028532) Error (criu/sk-inet.c:191): inet: In-flight connection (l) for 5d00
pie: 6: Error (criu/pie/parasite.c:12): Can't do it
(00.028533)     57: Error (criu/sk-inet.c:191): inet: In-flight connection (l) for 5d00
(00.028600) Error (criu/cr-dump.c:1): Dump files (pid: 57) failed with -1
(00.030000) Error (criu/cr-dump.c:2098): Dumping FAILED.
`

func TestErrorIsMadeOfTheLogsOwnLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dump.log")
	if err := os.WriteFile(path, []byte(sampleLog), 0o600); err != nil {
		t.Fatal(err)
	}
	err := newError("dump", path, "Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self", nil)
	want := []string{
		"Error (criu/sk-inet.c:191): inet: In-flight connection (l) for 5d00",
		"Error (criu/pie/parasite.c:12): Can't do it",
		"Error (criu/cr-dump.c:1): Dump files (pid: 57) failed with -1",
	}
	if !slices.Equal(err.Lines, want) {
		t.Errorf("lines are\n%s\nexpected\n%s", strings.Join(err.Lines, "\n"), strings.Join(want, "\n"))
	}
	if !errors.Is(err, ErrInFlight) {
		t.Errorf("%v is not ErrInFlight", err)
	}
	if text := err.Error(); !strings.Contains(text, want[0]) || !strings.Contains(text, path) || strings.Contains(text, "\n") {
		t.Errorf("its text is %q", text)
	}
}

func TestErrorWithoutALogUsesTheAnswer(t *testing.T) {
	err := newError("restore", "/nonexistent", "Error (criu/x.c:1): no such image\n", nil)
	if got := err.Error(); got != "criu restore: Error (criu/x.c:1): no such image" {
		t.Errorf("got %q", got)
	}
	if err := newError("restore", "/nonexistent", "", nil); !strings.Contains(err.Error(), "without saying why") {
		t.Errorf("got %q", err)
	}
}

func TestCausesAreRecognised(t *testing.T) {
	for text, want := range map[string]error{
		"Error (criu/image.c:1): Can't write: No space left on device":       ErrNoSpace,
		"Error (criu/seize.c:1): Unable to freeze cgroup /x":                 ErrBusy,
		"Error (criu/util.c:1): Timeout reached. Try to interrupt: 0":        ErrBusy,
		"Error (criu/sk-inet.c:1): inet: In-flight connection (l) for 5d00":  ErrInFlight,
		"Error (criu/sk-netlink.c:77): netlink: The socket has data to read": ErrUnread,
	} {
		if err := newError("dump", "/nonexistent", text, nil); !errors.Is(err, want) {
			t.Errorf("%q: got %v, expected %v", text, err.Err, want)
		}
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]Version{"4.2": {4, 2, 0}, "4.2.1": {4, 2, 1}, "4.10.0": {4, 10, 0}} {
		got, err := ParseVersion(text)
		if err != nil || got != want {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "4", "4.x", "4.2.1.1", "-1.2"} {
		if v, err := ParseVersion(text); err == nil {
			t.Errorf("%q is accepted as %v", text, v)
		}
	}
	e := &Engine{version: Version{4, 2, 0}}
	if err := e.CheckVersion(Version{4, 1, 9}); err != nil {
		t.Errorf("older images are refused: %v", err)
	}
	if err := e.CheckVersion(Version{4, 2, 1}); err == nil || !strings.Contains(err.Error(), "4.2.1") {
		t.Errorf("newer images: got %v", err)
	}
}
