package capture

import (
	"path/filepath"
	"testing"

	"dormouse/repository"
	"dormouse/repository/backend/local"
)

func newRepository(t *testing.T) *repository.Repository {
	t.Helper()
	dir := t.TempDir()
	backend, err := local.Open(filepath.Join(dir, "repository"))
	must(t, err)
	must(t, repository.Init(t.Context(), backend))
	repo, err := repository.Open(t.Context(), backend, repository.Options{CacheDir: filepath.Join(dir, "cache")})
	must(t, err)
	t.Cleanup(func() { repo.Close() })
	return repo
}
