package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"dormouse/repository"
	"dormouse/repository/backend/local"
)

// repositoryConfig is Welcome.repository.
type repositoryConfig struct {
	Backend string `json:"backend"`
	Path    string `json:"path"` // of backend local
}

// openRepository opens the repository that the controller names. It stays open
// as long as the name does not change.
func (a *Agent) openRepository(ctx context.Context, config, manifestKey []byte) error {
	if len(manifestKey) != ed25519.PublicKeySize {
		return fmt.Errorf("the controller's manifest key has %d bytes instead of %d", len(manifestKey), ed25519.PublicKeySize)
	}
	a.repoMu.Lock()
	defer a.repoMu.Unlock()
	a.manifest = bytes.Clone(manifestKey)
	if a.repo != nil {
		if a.repoConfig != string(config) {
			return errors.New("the controller names another repository than before: the agent must be restarted")
		}
		return nil
	}
	var c repositoryConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return fmt.Errorf("the repository's configuration: %w", err)
	}
	if c.Backend != "local" {
		return fmt.Errorf("this agent does not know the repository backend %q", c.Backend)
	}
	backend, err := local.Open(c.Path)
	if err != nil {
		return err
	}
	repo, err := repository.Open(ctx, throttled{backend, a.bandwidth}, repository.Options{CacheDir: filepath.Join(a.config.State, "repository-cache")})
	if err != nil {
		return fmt.Errorf("open the repository %s: %w", c.Path, err)
	}
	a.repo, a.repoConfig = repo, string(config)
	return nil
}

func (a *Agent) repository() (*repository.Repository, error) {
	a.repoMu.Lock()
	defer a.repoMu.Unlock()
	if a.repo == nil {
		return nil, errors.New("the controller has not named a repository yet")
	}
	return a.repo, nil
}

func (a *Agent) verifier() *repository.Verifier {
	a.repoMu.Lock()
	defer a.repoMu.Unlock()
	return repository.NewVerifier(a.manifest)
}
