//go:build failpoint

package failpoint

import (
	"os"
	"strings"
	"syscall"
	"time"
)

// Hit acts as DORMOUSE_FAILPOINT says for name.
func Hit(name string) {
	for _, point := range strings.Split(os.Getenv("DORMOUSE_FAILPOINT"), ",") {
		at, action, _ := strings.Cut(point, "=")
		if at != name {
			continue
		}
		if action == "kill" {
			killOnce()
			continue
		}
		if file, ok := strings.CutPrefix(action, "pause:"); ok {
			pause(file)
		}
	}
}

func killOnce() {
	if once := os.Getenv("DORMOUSE_FAILPOINT_ONCE"); once != "" {
		f, err := os.OpenFile(once, os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return
		}
		f.Close()
	}
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // SIGKILL is on its way
}

func pause(file string) {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return
	}
	for {
		if _, err := os.Stat(file); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}
