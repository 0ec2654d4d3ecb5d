package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// floor measures what a restore costs a system that makes Dormouse's promises in
// the simplest way, beside the plain one. It is no lower bound: who does more of
// it at once, as Dormouse does, may be quicker. In a row:
//
//   - a command is started (`dormouse version`, which asks nobody);
//   - one record is written and synced, for state is written before it is acted
//     upon;
//   - plain CRIU restores, and beside it one thread hashes the memory's content,
//     but for the zeros, as chunks are verified.
//
// The floor ends at the first instruction or with the last hash, whichever is
// later: nothing may run that was not verified. It has no network, no sandbox, no
// files and no daemons, and takes the images from memory, unpacked. It is made
// for two processors: with more, several threads could hash.
type floor struct {
	raw    *raw
	binary string
}

const hashedAtOnce = 64 << 10 // the size of Dormouse's chunks

func (f *floor) restore(ctx context.Context, s scenario, images, tickFile, scratch string) (time.Duration, error) {
	begin := time.Now()
	if out, err := exec.CommandContext(ctx, f.binary, "version").CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s version: %w: %s", f.binary, err, out)
	}
	if err := writeSynced(filepath.Join(scratch, "floor-record")); err != nil {
		return 0, err
	}
	var first, hashed time.Time
	both, ctx := errgroup.WithContext(ctx)
	both.Go(func() error {
		if err := f.raw.run(ctx, images, "restore", "--restore-detached"); err != nil {
			return err
		}
		var err error
		first, err = firstTick(ctx, tickFile, begin)
		return err
	})
	both.Go(func() error {
		err := hashPages(images, s.randomPages()*pageSize)
		hashed = time.Now()
		return err
	})
	err := both.Wait()
	if hashed.After(first) {
		first = hashed
	}
	return first.Sub(begin), err
}

func writeSynced(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = file.Write(make([]byte, pageSize))
	return errors.Join(err, file.Sync(), file.Close())
}

// hashPages hashes the first bytes of the memory in images.
func hashPages(images string, bytes int64) error {
	names, err := filepath.Glob(filepath.Join(images, "pages-*.img"))
	if err != nil {
		return err
	}
	buf := make([]byte, hashedAtOnce)
	for _, name := range names {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		for n := 0; bytes > 0 && err == nil; bytes -= int64(n) {
			n, err = io.ReadFull(file, buf)
			_ = blake3.Sum256(buf[:n])
		}
		file.Close()
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
	}
	return nil
}

// endRestored ends what was restored with its old pid, which is then free.
func endRestored(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	for {
		// A signal number of 0 finds the process until its parent has taken note of its end, kill(2).
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			return nil
		}
		select {
		case <-time.After(time.Millisecond): // nobody tells those who are not its parent
		case <-ctx.Done():
			return fmt.Errorf("process %d does not end: %w", pid, ctx.Err())
		}
	}
}
