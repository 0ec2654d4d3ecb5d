package main

import "golang.org/x/sys/unix"

// hold keeps the namespaces it was started in alive until it is killed. It
// touches nothing, so that it can serve as the anchor of any namespace.
func hold() {
	for {
		// pause(2) returns after a caught signal only; the runtime catches some.
		_ = unix.Pause()
	}
}
