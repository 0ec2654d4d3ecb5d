package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"dormouse/agent/sandbox/pid1"
)

// LogPaths are where the command's output and errors are now. The task may put
// anything there: to read them use OpenLog.
func (s *Sandbox) LogPaths() (stdout, stderr string) {
	dir := filepath.Join(s.UpperDir(), pid1.Directory)
	return filepath.Join(dir, pid1.StdoutFile), filepath.Join(dir, pid1.StderrFile)
}

// OpenLog opens what the command has written to "stdout" or "stderr".
func (s *Sandbox) OpenLog(stream string) (*os.File, error) { return OpenLog(s.dir, stream) }

// OpenLog opens a log of the sandbox in dir, also after it was destroyed with
// its logs kept.
func OpenLog(dir, stream string) (*os.File, error) {
	if stream != pid1.StdoutFile && stream != pid1.StderrFile {
		return nil, fmt.Errorf("there is no log %q: only stdout and stderr", stream)
	}
	file, err := openInside(filepath.Join(dir, "upper"), filepath.Join(pid1.Directory, stream))
	if errors.Is(err, os.ErrNotExist) {
		file, err = openInside(dir, "/"+stream)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the log: %w", err)
	}
	return file, nil
}

// OpenProgress opens the file in which the task says how far it has come.
func (s *Sandbox) OpenProgress() (*os.File, error) {
	return openInside(s.UpperDir(), filepath.Join(pid1.Directory, pid1.ProgressFile))
}

// keepLogs moves the logs to where OpenLog finds them without the rest.
func (s *Sandbox) keepLogs() error {
	for _, stream := range []string{pid1.StdoutFile, pid1.StderrFile} {
		// A link or directory that the task put in its place is not kept.
		file, err := openInside(s.UpperDir(), filepath.Join(pid1.Directory, stream))
		if err != nil {
			continue
		}
		from := filepath.Join(s.UpperDir(), pid1.Directory, stream)
		if err := errors.Join(file.Close(), os.Rename(from, filepath.Join(s.dir, stream))); err != nil {
			return fmt.Errorf("cannot keep the logs of %s: %w", s.ID(), err)
		}
	}
	return nil
}
