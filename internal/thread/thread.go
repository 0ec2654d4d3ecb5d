// Package thread runs work whose namespaces differ from the rest of the process.
// Namespaces belong to threads (setns(2), unshare(2)), and Go moves goroutines
// between threads as it likes.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Spare runs work on a thread that ends with it, whatever work does to its
// namespaces, and never on the main one: that cannot end, and its namespaces are
// what /proc/PID/ns shows as those of the whole process. A process that work
// starts keeps the namespaces of the thread.
func Spare(work func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- work() // never unlocked: the thread ends with this goroutine
			return
		}
		// As long as this goroutine has the main thread, no other gets it.
		err := Spare(work)
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
