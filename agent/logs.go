package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// growth is how often a followed log is looked at. The task writes through an
// overlay, whose layers give no inotify(7) events, and a watch on the overlay's
// own file would pin the task's mount namespace; asking for a size is cheap.
const growth = 100 * time.Millisecond

// logTail sends a log from its beginning on.
type logTail struct {
	file *os.File
	at   int64
	send func([]byte) error
}

// followLogs sends the logs; with follow, until ended is closed.
func followLogs(ctx context.Context, logs []*logTail, ended <-chan struct{}, follow bool) error {
	ticker := time.NewTicker(growth)
	defer ticker.Stop()
	for {
		over := !follow
		select {
		case <-ended:
			over = true
		default:
		}
		for _, log := range logs {
			if err := log.advance(); err != nil {
				return err
			}
		}
		if over {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
		case <-ticker.C:
		}
	}
}

// advance sends what was added. A log that the task made shorter is sent from
// its beginning again.
func (l *logTail) advance() error {
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() < l.at {
		l.at = 0
	}
	buffer := make([]byte, piece)
	for l.at < info.Size() {
		n, err := l.file.ReadAt(buffer[:min(int64(piece), info.Size()-l.at)], l.at)
		if n > 0 {
			if err := l.send(append([]byte(nil), buffer[:n]...)); err != nil {
				return err
			}
			l.at += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}
