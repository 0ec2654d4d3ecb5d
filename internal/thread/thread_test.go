package thread

import (
	"errors"
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
			errs <- Spare(func() error {
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
