package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// killCRIU ends the CRIU that works in a directory, as nobody should.
func killCRIU(workDir string) { signalCRIU(workDir, unix.SIGKILL) }

func signalCRIU(workDir string, signal unix.Signal) {
	var r running
	data, err := os.ReadFile(filepath.Join(workDir, runningFile))
	if err != nil || json.Unmarshal(data, &r) != nil {
		return // it has ended already
	}
	_ = unix.Kill(r.PID, signal)
}

// TestKilledCRIULeavesTheTreeUsable kills CRIU at steps of dumps of a tree with
// TCP traffic. The program ends at the first error of send or recv.
func TestKilledCRIULeavesTheTreeUsable(t *testing.T) {
	e := newEngine(t)
	const inMemory Event = "dump of memory"
	for _, frozen := range []bool{true, false} {
		s := startSandbox(t, e, job(t), "tcp", "0", "256")
		for _, at := range []Event{EventPreDump, inMemory, EventPostDump} {
			name := fmt.Sprintf("frozen=%v, at %s", frozen, at)
			s.moreLines(2)
			if frozen {
				s.freeze()
			}
			r := s.request()
			r.LeaveRunning = true
			r.Notify = func(_ context.Context, event Event, _ int) error {
				if event == at {
					killCRIU(r.ImagesDir)
				}
				if event == EventPreDump && at == inMemory {
					go func() {
						waitFor(t, "pages to be written", func() bool {
							n, _ := imageBytes(r.ImagesDir)
							return n > 32<<20
						})
						killCRIU(r.ImagesDir)
					}()
				}
				return nil
			}
			if _, err := e.Dump(t.Context(), r); !errors.Is(err, ErrDied) {
				t.Fatalf("%s: got %v, expected a dead CRIU", name, err)
			}
			if frozen != s.frozen() {
				t.Errorf("%s: the cgroup is frozen=%v", name, s.frozen())
			}
			s.thaw()
			s.moreLines(3) // fails on any error of the program
		}
		r := s.request()
		s.freeze()
		mustDump(t, s, r) // it can still be dumped
		s.restore(r.ImagesDir).moreLines(3)
	}
}
