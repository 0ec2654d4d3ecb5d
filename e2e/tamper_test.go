package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dormouse/api"
)

// TestDamagedCheckpointIsRefusedByName damages what only one checkpoint needs,
// in every way a disk or a person can, and then puts it right again.
func TestDamagedCheckpointIsRefusedByName(t *testing.T) {
	p := onOwn(t, built.bin, nil, "--cloud", "east=1", "--cpus", "8", "--mem", "8G")
	repository := filepath.Join(stateOf(p), "repository")
	job := p.submit("--mem", "256M", "--", program("memory"), "32", "1", "1000000", "10")
	p.waitLines(job, 2)
	sound := p.checkpoint(job)
	before := files(t, repository)
	other := p.submit("--mem", "256M", "--", program("memory"), "48", "3", "1000000", "10")
	p.waitLines(other, 2)
	hurt := p.checkpoint(other)

	var own []string // files that came with the second checkpoint
	for _, path := range files(t, repository) {
		if !slices.Contains(before, path) {
			own = append(own, path)
		}
	}
	pack, manifest := biggest(t, own), named(t, own, hurt.ID)
	for _, test := range []struct {
		name   string
		path   string
		damage func(content []byte) []byte // nil: the file is gone
		whole  bool                        // every chunk is: it may be restored
	}{
		{"a flipped bit", pack, func(content []byte) []byte { return flip(content, len(content)/2) }, false},
		{"a flipped bit at the end", pack, func(content []byte) []byte { return flip(content, len(content)-1) }, true},
		{"a truncated pack", pack, func(content []byte) []byte { return content[:len(content)/2] }, false},
		{"a missing pack", pack, nil, false},
		{"a changed manifest", manifest, func(content []byte) []byte { return flip(content, len(content)/2) }, false},
		{"a truncated manifest", manifest, func(content []byte) []byte { return content[:len(content)/2] }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := &platform{t: t, c: p.c}
			content, err := os.ReadFile(test.path)
			if err != nil {
				t.Fatal(err)
			}
			replace(t, test.path, test.damage, content)
			defer replace(t, test.path, func(content []byte) []byte { return content }, content)

			got := p.try("verify", hurt.ID)
			if got.status != failed || !strings.Contains(got.stdout+got.stderr, hurt.ID) {
				t.Errorf("verify of the damaged checkpoint: exit status %d, expected %d and its name: %s%s", got.status, failed, got.stdout, got.stderr)
			}
			if test.whole {
				p.run("restart", other, "--from", hurt.ID)
				p.moves(other)
				return
			}
			restart := p.try("restart", other, "--from", hurt.ID)
			if restart.status != failed && restart.status != refused {
				t.Errorf("restart from the damaged checkpoint: exit status %d, expected %d or %d: %s", restart.status, failed, refused, restart.stderr)
			}
			if !strings.Contains(restart.stderr, hurt.ID) {
				t.Errorf("the refusal does not name the checkpoint %s: %s", hurt.ID, restart.stderr)
			}
			p.run("verify", sound.ID)
			p.run("restart", job, "--from", sound.ID)
			p.moves(job)
		})
	}
	p.run("verify")
	p.run("restart", other, "--from", hurt.ID)
	p.moves(other)
	if got := decode[[]api.VerifyReport](p, "verify", hurt.ID); len(got) != 1 || !got[0].OK || got[0].Bytes < 24<<20 {
		t.Errorf("verify of the repaired checkpoint reports %+v", got)
	}
}

func stateOf(p *platform) string { return p.c.State() }

func files(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func biggest(t *testing.T, paths []string) string {
	t.Helper()
	var best string
	var size int64
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && info.Size() > size {
			best, size = path, info.Size()
		}
	}
	if best == "" {
		t.Fatal("the second checkpoint has added nothing to the repository")
	}
	return best
}

func named(t *testing.T, paths []string, id string) string {
	t.Helper()
	for _, path := range paths {
		if strings.Contains(filepath.Base(path), id) {
			return path
		}
	}
	t.Fatalf("no file of the repository is named after %s: %v", id, paths)
	return ""
}

func flip(content []byte, at int) []byte {
	changed := slices.Clone(content)
	changed[at] ^= 0x10
	return changed
}

// replace writes the file anew, keeping its mode.
func replace(t *testing.T, path string, damage func([]byte) []byte, content []byte) {
	t.Helper()
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if damage == nil {
		return
	}
	if err := os.WriteFile(path, damage(content), 0o400); err != nil {
		t.Fatal(err)
	}
}
