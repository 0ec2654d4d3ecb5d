package sandbox

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Others find a process's namespaces by its main thread.
func TestTheMainThreadStaysWhereItIs(t *testing.T) {
	var group sync.WaitGroup
	errs := make(chan error, 1000)
	for range cap(errs) {
		group.Go(func() {
			errs <- onSpareThread(func() error {
				runtime.Gosched()
				if unix.Gettid() == unix.Getpid() {
					return errors.New("it was given to work")
				}
				return nil
			})
		})
	}
	group.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestMakingNetworksLeavesTheProcessInItsOwn(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test makes network namespaces: it needs root")
		}
		t.Skip("this test makes network namespaces: it needs root")
	}
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		file, err := newNetwork("10.99.0.1")
		if err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("the process is in %s (%v), and was in %s", after, err, before)
	}
}
