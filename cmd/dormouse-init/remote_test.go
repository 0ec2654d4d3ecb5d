package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/agent/sandbox/pid1"
)

var secret = []byte("the secret of this very job")

// newRemote is a server without a socket, whose processes would be root's.
func newRemote() *remote {
	return &remote{family: newFamily(), run: &pid1.Run{User: "root", WorkDir: "/"}, secret: secret}
}

// dial connects to a server as by TCP.
func dial(t testing.TB, r *remote) *conn {
	t.Helper()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	near := &conn{file: os.NewFile(uintptr(pair[0]), "near"), limit: pid1.MaxFrame}
	far := &conn{file: os.NewFile(uintptr(pair[1]), "far"), limit: pid1.MaxFrame}
	if err := near.file.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.file.Close() })
	if !r.admit(&r.strangers, maxStrangers) {
		t.Fatal("not admitted")
	}
	go r.answer(far)
	return near
}

// rest is all that the server sends after its challenge, as frames.
func rest(t testing.TB, link *conn) (kinds []pid1.FrameType) {
	t.Helper()
	for {
		kind, _, err := link.read()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("the server does not hang up: %v", err)
			}
			return kinds
		}
		kinds = append(kinds, kind)
	}
}

func frame(kind pid1.FrameType, payload []byte) []byte {
	var wire bytes.Buffer
	_ = pid1.WriteFrame(&wire, kind, payload)
	return wire.Bytes()
}

func TestAStrangerGetsNothing(t *testing.T) {
	request, _ := json.Marshal(pid1.RemoteRequest{Command: []byte("echo broken in")})
	for name, wire := range map[string][]byte{
		"nothing":                      nil,
		"garbage":                      []byte("GET / HTTP/1.1\r\n\r\n"),
		"a huge frame":                 {byte(pid1.FrameProof), 0xff, 0xff, 0xff, 0xff},
		"a request without a proof":    frame(pid1.FrameRequest, request),
		"an empty proof":               append(frame(pid1.FrameProof, nil), frame(pid1.FrameRequest, request)...),
		"a proof of another challenge": append(frame(pid1.FrameProof, pid1.Proof(secret, make([]byte, pid1.ChallengeSize))), frame(pid1.FrameRequest, request)...),
		"half a proof":                 append(frame(pid1.FrameProof, make([]byte, 16)), frame(pid1.FrameRequest, request)...),
	} {
		r := newRemote()
		link := dial(t, r)
		if _, err := link.want(pid1.FrameChallenge); err != nil {
			t.Fatal(err)
		}
		if _, err := link.file.Write(wire); err != nil {
			t.Fatal(err)
		}
		raw, err := link.file.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
		for _, kind := range rest(t, link) {
			if kind != pid1.FrameFailure {
				t.Errorf("%s was answered with frame %d", name, kind)
			}
		}
		if len(r.family.waiting) != 0 {
			t.Errorf("%s started a process", name)
		}
	}
}

func TestChallengesAreFresh(t *testing.T) {
	r := newRemote()
	first, err := dial(t, r).want(pid1.FrameChallenge)
	if err != nil {
		t.Fatal(err)
	}
	second, err := dial(t, r).want(pid1.FrameChallenge)
	if err != nil || bytes.Equal(first, second) || len(first) != pid1.ChallengeSize {
		t.Errorf("two challenges: %x %x %v", first, second, err)
	}
}

func TestStrangersAreLimitedAndLeaveRoomWhenTheyGo(t *testing.T) {
	r := newRemote()
	link := dial(t, r)
	for r.admit(&r.strangers, maxStrangers) {
	}
	if _, err := link.want(pid1.FrameChallenge); err != nil {
		t.Fatal(err)
	}
	link.file.Close()
	for deadline := time.Now().Add(10 * time.Second); !r.admit(&r.strangers, maxStrangers); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a stranger that left is still counted")
		}
	}
}

func TestRequestsAreChecked(t *testing.T) {
	run := &pid1.Run{User: "daemon", UID: 1}
	ls := []byte("ls")
	for _, c := range []struct {
		request any
		good    bool
	}{
		{pid1.RemoteRequest{Command: ls}, true},
		{pid1.RemoteRequest{Command: []byte("\xe4\xff")}, true},
		{pid1.RemoteRequest{Command: ls, User: "daemon"}, true},
		{pid1.RemoteRequest{Command: ls, User: "1"}, true},
		{pid1.RemoteRequest{Command: ls, User: "root"}, false},
		{pid1.RemoteRequest{Command: ls, User: "0"}, false},
		{pid1.RemoteRequest{}, false},
		{pid1.RemoteRequest{Command: []byte("a\x00b")}, false},
		{pid1.RemoteRequest{Command: bytes.Repeat([]byte("a"), pid1.MaxRemoteCommand+1)}, false},
		{map[string]int{"command": 7}, false},
		{"nonsense", false},
	} {
		payload, err := json.Marshal(c.request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseRemote(payload, run); (err == nil) != c.good {
			t.Errorf("%.60s: %v", payload, err)
		}
	}
	longest, err := json.Marshal(pid1.RemoteRequest{Command: bytes.Repeat([]byte("<"), pid1.MaxRemoteCommand)})
	if err != nil || len(longest) > pid1.MaxRemoteRequest {
		t.Errorf("the longest command makes a request of %d bytes (%v), and %d are read", len(longest), err, pid1.MaxRemoteRequest)
	}
}

func TestSessionsAreLimited(t *testing.T) {
	r := newRemote()
	for r.admit(&r.sessions, maxRemotes) {
	}
	err := request(dial(t, r), &shellCall{command: "true"}, secret, time.Now().Add(10*time.Second))
	if err == nil || !strings.Contains(err.Error(), "serves 256 remote starts already") {
		t.Errorf("one too many: %v", err)
	}
}

// A stranger's bytes never start anything, and the server always hangs up.
func FuzzStranger(f *testing.F) {
	f.Add([]byte("SSH-2.0-OpenSSH_9.2\r\n"))
	f.Add(frame(pid1.FrameProof, make([]byte, 32)))
	f.Add(append(frame(pid1.FrameProof, make([]byte, 32)), frame(pid1.FrameRequest, []byte(`{"command":"dHJ1ZQ=="}`))...))
	f.Fuzz(func(t *testing.T, wire []byte) {
		r := newRemote()
		link := dial(t, r)
		_, _ = link.file.Write(wire)
		raw, err := link.file.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
		rest(t, link)
		if len(r.family.waiting) != 0 {
			t.Error("a process was started")
		}
		link.file.Close()
	})
}

// Whatever a client that knows the secret asks for, only commands that a shell
// can be given get through.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"command":"bHMgLWw=","user":"1"}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		r, err := parseRemote(payload, &pid1.Run{UID: 1, User: "daemon"})
		if err != nil {
			return
		}
		if len(r.Command) == 0 || len(r.Command) > pid1.MaxRemoteCommand || bytes.Contains(r.Command, []byte{0}) || r.User != "" && r.User != "1" && r.User != "daemon" {
			t.Errorf("%q was understood as %+v", payload, r)
		}
	})
}

// The frames of a session neither break pid 1 nor make it hold more than a
// window of input.
func FuzzSessionFrames(f *testing.F) {
	f.Add(append(frame(pid1.FrameStdin, []byte("hello")), frame(pid1.FrameStdin, nil)...))
	f.Add(append(frame(pid1.FrameResize, []byte{0, 1, 0, 1}), frame(pid1.FrameSignal, []byte{15})...))
	f.Fuzz(func(t *testing.T, wire []byte) {
		s := &session{family: newFamily(), pid: -1, queued: make(chan struct{}, 1)}
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer read.Close()
		go func() {
			_, _ = write.Write(wire)
			_ = write.Close()
		}()
		s.listen(&conn{file: read, limit: pid1.MaxRemoteFrame})
		size := 0
		for _, data := range s.pending {
			size += len(data)
		}
		if size > pid1.Window {
			t.Errorf("%d bytes are held", size)
		}
	})
}

func TestShellCommandLines(t *testing.T) {
	for line, want := range map[string]shellCall{
		// As Open MPI 4 and 5, and Hydra, call it.
		"task-1 orted -mca ess env":               {host: "task-1", command: "orted -mca ess env"},
		"-x task-1 /usr/bin/hydra_pmi_proxy a":    {host: "task-1", command: "/usr/bin/hydra_pmi_proxy a"},
		"-x -q -l me task-1 a":                    {host: "task-1", user: "me", command: "a"},
		"-n -o StrictHostKeyChecking=no h -x a b": {host: "h", noInput: true, command: "a b"},
		"me@h a -x":               {host: "h", user: "me", command: "a -x"},
		"-lroot me@h a":           {host: "h", user: "root", command: "a"},
		"-xnq -p 22 h -- -a":      {host: "h", noInput: true, command: "-a"},
		"-o ConnectTimeout=3 h a": {host: "h", timeout: 3 * time.Second, command: "a"},
		"-- h a":                  {host: "h", command: "a"},
		"a@b@h a":                 {host: "h", user: "a@b", command: "a"},
	} {
		if want.timeout == 0 {
			want.timeout = patience
		}
		got, err := parseShell(strings.Fields(line))
		if err != nil || *got != want {
			t.Errorf("%s: %+v %v, want %+v", line, got, err, want)
		}
	}
	for _, line := range []string{"", "-x", "h", "-t h a", "-N h", "-l", "-Z h a", "-o ConnectTimeout=never h a", "-L 1:h:2 h a", "--", "-- h"} {
		if got, err := parseShell(strings.Fields(line)); err == nil {
			t.Errorf("%q was understood as %+v", line, got)
		}
	}
}

func FuzzShellCommandLine(f *testing.F) {
	f.Add("-x -l me h a b")
	f.Fuzz(func(t *testing.T, line string) {
		call, err := parseShell(strings.Split(line, " "))
		if err == nil && call.command == "" {
			t.Errorf("%q means %+v", line, call)
		}
	})
}

func TestHostsAreLookedUp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hosts")
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	content := "127.0.0.1 localhost # task-9\n\n10.99.0.2\ttask-1 Other\n::1 localhost\nnonsense task-3\n10.99.0.7 " + own + "\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"task-1": "10.99.0.2", "other": "10.99.0.2", "10.99.0.9": "10.99.0.9", "[fd00::1]": "fd00::1",
		"localhost": "10.99.0.7", "127.0.0.1": "10.99.0.7", "::1": "10.99.0.7",
	} {
		if got, err := lookupHost(host, file); err != nil || got != netip.MustParseAddr(want) {
			t.Errorf("%s: %v %v, want %s", host, got, err, want)
		}
	}
	for _, host := range []string{"task-9", "task-3", "", "nowhere"} {
		if got, err := lookupHost(host, file); err == nil {
			t.Errorf("%q: %v", host, got)
		}
	}
}

func TestCtlCommandLines(t *testing.T) {
	checkpoint := pid1.AppCall{Op: pid1.AppCheckpoint}
	labelled := pid1.AppCall{Op: pid1.AppCheckpoint, Label: "a=b"}
	for line, want := range map[string]ctlCall{
		"checkpoint":                           {AppCall: checkpoint},
		"checkpoint --label a=b --timeout 10m": {AppCall: labelled, timeout: 10 * time.Minute},
		"--label=a=b checkpoint -o json":       {AppCall: labelled, json: true},
		"status -ojson":                        {AppCall: pid1.AppCall{Op: pid1.AppStatus}, json: true},
		"checkpoint --help":                    {AppCall: checkpoint, help: true},
		"progress 1.5e3":                       {progress: "1.5e3"},
	} {
		got, err := parseCtl(strings.Fields(line))
		if err != nil || *got != want {
			t.Errorf("%s: %+v %v, want %+v", line, got, err, want)
		}
	}
	for _, line := range []string{"", "restore", "checkpoint status", "checkpoint --label", "checkpoint --timeout -3s", "checkpoint --timeout soon", "status --label x", "checkpoint -o yaml", "checkpoint=1",
		"progress", "progress x", "progress nan", "progress 1 2", "checkpoint progress 1", "progress=1"} {
		if got, err := parseCtl(strings.Fields(line)); err == nil {
			t.Errorf("%q was understood as %+v", line, got)
		}
	}
}

func TestAProofNeedsTheSecretAndTheChallenge(t *testing.T) {
	challenge := []byte("challenge")
	proof := pid1.Proof(secret, challenge)
	if !pid1.Proves(proof, secret, challenge) {
		t.Error("a proof does not hold")
	}
	if pid1.Proves(proof, secret, []byte("another")) || pid1.Proves(proof, []byte("other"), challenge) || pid1.Proves(pid1.Proof(nil, challenge), nil, challenge) {
		t.Error("a wrong proof holds")
	}
}
