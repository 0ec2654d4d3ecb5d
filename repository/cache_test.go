package repository

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Whatever happened to the local copy of the index, it is read again.
func TestLocalIndexIsRebuilt(t *testing.T) {
	setMeta := func(key, value string) func(t *testing.T, file string) {
		return func(t *testing.T, file string) {
			db, err := bolt.Open(file, 0o600, nil)
			must(t, err)
			must(t, db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put([]byte(key), []byte(value)) }))
			must(t, db.Close())
		}
	}
	cases := map[string]func(t *testing.T, file string){
		"lost":                    func(t *testing.T, f string) { must(t, os.Remove(f)) },
		"empty":                   func(t *testing.T, f string) { must(t, os.Truncate(f, 0)) },
		"cut off":                 func(t *testing.T, f string) { must(t, os.Truncate(f, 9000)) },
		"not a database":          func(t *testing.T, f string) { must(t, os.WriteFile(f, make([]byte, 50_000), 0o600)) },
		"of another repository":   setMeta("repository", "another"),
		"from before a power cut": setMeta("boot", "another"),
		"untouched":               func(*testing.T, string) {},
	}
	for name, hurt := range cases {
		t.Run(name, func(t *testing.T) {
			r := newTestRepo(t)
			dir, cache := images(t, 50, 1), filepath.Join(t.TempDir(), "cache")
			res := r.checkpoint(t, "c-1", dir, PartOptions{})
			for range 2 {
				repo, err := Open(t.Context(), r.be, Options{CacheDir: cache})
				must(t, err)
				p, err := repo.OpenPart(t.Context(), res.ID)
				must(t, err)
				dest := filepath.Join(t.TempDir(), "dest")
				must(t, p.RestoreImages(t.Context(), dest, RestoreOptions{}))
				wantSameFiles(t, dir, dest)
				must(t, repo.Close())
				hurt(t, filepath.Join(cache, "index.db"))
			}
		})
	}
}

func TestLocalIndexHasOneUser(t *testing.T) {
	r := newTestRepo(t)
	cache := t.TempDir()
	first, err := Open(t.Context(), r.be, Options{CacheDir: cache})
	must(t, err)
	defer first.Close()
	if _, err := Open(t.Context(), r.be, Options{CacheDir: cache}); !errors.Is(err, bolterrors.ErrTimeout) {
		t.Errorf("a second process in one cache = %v, want it refused", err)
	}
}

func TestDamagedFileCacheIsBegunAnew(t *testing.T) {
	file := filepath.Join(t.TempDir(), "files.db")
	must(t, os.WriteFile(file, make([]byte, 50_000), 0o600))
	c, err := OpenFileCache(file)
	must(t, err)
	must(t, c.Prune(0))
	must(t, c.Close())
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	r := newTestRepo(t)
	config := filepath.Join(r.dir, "config")
	cases := map[string]struct {
		content string
		want    error
	}{
		"later format": {`{"dormouse_repository": 2, "id": "x"}`, ErrVersion},
		"not JSON":     {`hello`, ErrDamaged},
		"no id":        {`{"dormouse_repository": 1}`, ErrDamaged},
	}
	for name, c := range cases {
		must(t, os.WriteFile(config, []byte(c.content), 0o600))
		if _, err := Open(t.Context(), r.be, Options{CacheDir: t.TempDir()}); !errors.Is(err, c.want) {
			t.Errorf("%s: Open = %v, want %v", name, err, c.want)
		}
	}
	must(t, os.Remove(config))
	if _, err := Open(t.Context(), r.be, Options{CacheDir: t.TempDir()}); err == nil {
		t.Error("Open of a directory without a repository succeeded")
	}
}
