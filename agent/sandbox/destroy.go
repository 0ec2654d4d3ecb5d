package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// DestroyOptions say what may stay.
type DestroyOptions struct {
	// KeepLogs leaves the two log files; see OpenLog.
	KeepLogs bool
}

// Destroy ends the sandbox and removes all it used. It may be repeated.
func (s *Sandbox) Destroy(ctx context.Context, options DestroyOptions) error {
	s.mu.Lock()
	s.killed = true
	s.mu.Unlock()
	s.dropSessions()
	if err := s.killAll(ctx); err != nil {
		return err
	}
	if err := s.state.Cgroup.Remove(ctx); err != nil {
		return err
	}
	if err := errors.Join(s.unmountRoot(), s.unmountTmpfs()); err != nil {
		return err
	}
	if !options.KeepLogs {
		if err := os.RemoveAll(s.dir); err != nil {
			return fmt.Errorf("cannot remove the sandbox: %w", err)
		}
		return nil
	}
	if err := s.keepLogs(); err != nil {
		return err
	}
	var errs []error
	// The record goes last: until then Open finds the rest.
	for _, name := range []string{"upper", "work", "root", "tmpfs", stateFile} {
		errs = append(errs, os.RemoveAll(filepath.Join(s.dir, name)))
	}
	return errors.Join(errs...)
}
