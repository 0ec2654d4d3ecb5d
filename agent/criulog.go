package agent

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"slices"

	"dormouse/agent/criu"
)

// keptLogs is how many logs of failed dumps and restores are kept.
const keptLogs = 16

func (a *Agent) criuLogsDir() string { return filepath.Join(a.config.State, "criu-logs") }

// keepLog saves CRIU's log, which err names, from the work directory that is
// about to be removed, and makes err name the saved one.
func (a *Agent) keepLog(err error, name string) error {
	var failed *criu.Error
	if !errors.As(err, &failed) || failed.LogPath == "" {
		return err
	}
	kept := filepath.Join(a.criuLogsDir(), name+".log")
	if os.Rename(failed.LogPath, kept) != nil {
		return err
	}
	failed.LogPath = kept
	a.pruneLogs()
	return err
}

// pruneLogs removes the oldest logs; failing to is no harm.
func (a *Agent) pruneLogs() {
	entries, err := os.ReadDir(a.criuLogsDir())
	if err != nil || len(entries) <= keptLogs {
		return
	}
	age := func(e os.DirEntry) int64 {
		info, err := e.Info()
		if err != nil {
			return 0
		}
		return info.ModTime().UnixNano()
	}
	slices.SortFunc(entries, func(x, y os.DirEntry) int { return cmp.Compare(age(x), age(y)) })
	for _, e := range entries[:len(entries)-keptLogs] {
		os.Remove(filepath.Join(a.criuLogsDir(), e.Name()))
	}
}
