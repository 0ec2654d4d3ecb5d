package child

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// parent, in the environment, has the test program be the parent of a child.
const parent = "DORMOUSE_TEST_CHILD_PARENT"

func TestMain(m *testing.M) {
	if os.Getenv(parent) == "" {
		os.Exit(m.Run())
	}
	command := exec.Command("sleep", "60")
	if err := Start(command, syscall.SIGKILL); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(command.Process.Pid)
	command.Wait()
}

func TestAChildEndsWithItsParent(t *testing.T) {
	command := exec.Command(os.Args[0])
	command.Env, command.Stderr = append(os.Environ(), parent+"=1"), os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(line, &pid); err != nil {
		t.Fatal(err)
	}
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	command.Wait()
	if !endsWithin(t, pid, 10*time.Second) {
		unix.Kill(pid, unix.SIGKILL)
		t.Error("the child lives on")
	}
}

// endsWithin waits for the end of a process.
func endsWithin(t *testing.T, pid int, limit time.Duration) bool {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	for end := time.Now().Add(limit); ; {
		// pidfd_open(2): readable when the process has ended.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, int(time.Until(end).Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// A child whose maker's thread ended would be killed though the process lives.
func TestAChildOutlivesTheGoroutineThatMadeIt(t *testing.T) {
	command := exec.Command("sleep", "60")
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		made <- Start(command, syscall.SIGKILL)
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if endsWithin(t, command.Process.Pid, 100*time.Millisecond) {
		t.Error("the child has ended with the goroutine")
	}
	command.Process.Kill()
	command.Wait()
}
