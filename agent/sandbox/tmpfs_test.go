package sandbox_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"dormouse/agent/sandbox"
)

func TestSmallTmpfsAreFound(t *testing.T) {
	b := newBench(t)
	small := func(s *sandbox.Sandbox) []string {
		t.Helper()
		found, err := s.SmallTmpfs()
		if err != nil {
			t.Fatal(err)
		}
		var places []string
		for _, f := range found {
			places = append(places, f.Mountpoint)
			if _, err := os.Stat(f.Dir); err != nil {
				t.Error(err)
			}
		}
		return places
	}
	for script, want := range map[string][]string{
		"echo x > /tmp/small; head -c 2M /dev/zero > /dev/shm/large":       {"/dev", "/tmp"},
		"cd /tmp; i=0; while [ $i -lt 1100 ]; do i=$((i+1)); : > $i; done": {"/dev", "/dev/shm"},
	} {
		s := b.start(b.config(script + "; echo ready; sleep 60"))
		b.logs(s, "ready")
		if got := small(s); !slices.Equal(got, want) {
			t.Errorf("after %s small are %q, want %q", script, got, want)
		}
	}
}

func TestWhatIsFilledForARestoreVanishes(t *testing.T) {
	b := newBench(t)
	s := b.create(b.config("true"))
	made, err := s.MountTmpfs([]string{"tmp", "dev"})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range made {
		if err := os.WriteFile(filepath.Join(m.Dir, "x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.MountTmpfs([]string{"shm", "other"}); err == nil {
		t.Error("a tmpfs that nobody knows was made")
	}
	if err := s.Destroy(t.Context(), sandbox.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if left := b.mountsBelow(); len(left) > 0 {
		t.Errorf("left mounted: %q", left)
	}
}
