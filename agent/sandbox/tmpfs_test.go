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
	cfg := b.config("echo x > /tmp/small; head -c 2M /dev/zero > /dev/shm/large; echo ready; sleep 60")
	s := b.start(cfg)
	b.logs(s, "ready")
	if got, want := small(s), []string{"/dev", "/tmp"}; !slices.Equal(got, want) {
		t.Errorf("small are %q, want %q", got, want)
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
