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

// store stores a captured tree.
func store(t *testing.T, tree string, index *Index) *repository.PartReader {
	t.Helper()
	repo := newRepository(t)
	part, err := repo.NewPart(t.Context(), repository.PartOptions{})
	must(t, err)
	defer part.Close()
	must(t, part.AddTree(t.Context(), tree, index.Entries()))
	result, err := part.Commit(t.Context())
	must(t, err)
	reader, err := repo.OpenPart(t.Context(), result.ID)
	must(t, err)
	return reader
}
