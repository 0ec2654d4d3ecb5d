package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// raw measures plain CRIU: the same subject without a sandbox, images on tmpfs.
type raw struct {
	criu    string
	subject string
	images  string // directory on a tmpfs
	binary  string // a dormouse, for floor
}

// rawResult is one round of plain CRIU.
type rawResult struct {
	pause   time.Duration
	pause2  time.Duration // of a second dump, after 1 % was rewritten; it is as complete as the first
	restore time.Duration // to the first instruction
	floor   time.Duration // of a restore that verifies and writes down: floor.go
	copied  time.Duration // cp and sync of the images to disk
	bytes   int64
}

func (r *raw) round(ctx context.Context, s scenario, scratch string) (result rawResult, err error) {
	tickFile, dirty := filepath.Join(scratch, "raw-ticks"), filepath.Join(scratch, "raw-dirty")
	images := filepath.Join(r.images, "raw")
	for _, path := range []string{tickFile, images} {
		if err := os.RemoveAll(path); err != nil {
			return result, err
		}
	}
	if err := os.Mkdir(images, 0o700); err != nil {
		return result, err
	}
	defer os.RemoveAll(images)
	subject := exec.Command(r.subject, s.args(tickFile, dirty)...)
	subject.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	subject.Dir = "/"
	if err := subject.Start(); err != nil {
		return result, err
	}
	pid := subject.Process.Pid
	ended := make(chan struct{})
	go func() { subject.Wait(); close(ended) }()
	defer func() {
		subject.Process.Kill()
		<-ended
	}()
	if err := waitTicking(ctx, tickFile); err != nil {
		return result, err
	}
	if result.pause, err = r.dump(ctx, pid, images, tickFile); err != nil {
		return result, err
	}
	if result.bytes, err = treeSize(images); err != nil {
		return result, err
	}
	// Here, beside the subject, as Dormouse's upload is: a copy after it has ended
	// would get the memory that it has just left, and a hypervisor takes a while, for
	// the memory that nobody has had for some seconds.
	if result.copied, err = copyAndSync(ctx, images, filepath.Join(scratch, "copy")); err != nil {
		return result, err
	}
	if err := rewrite(ctx, dirty, perMille); err != nil {
		return result, err
	}
	if result.pause2, err = r.second(ctx, pid, tickFile); err != nil {
		return result, err
	}
	subject.Process.Kill()
	<-ended
	// The restored subject has its old pid and is not our child.
	defer syscall.Kill(pid, syscall.SIGKILL)
	begin := time.Now()
	if err := r.run(ctx, images, "restore", "--restore-detached"); err != nil {
		return result, err
	}
	first, err := firstTick(ctx, tickFile, begin)
	if err != nil {
		return result, err
	}
	result.restore = first.Sub(begin)
	if err := endRestored(ctx, pid); err != nil {
		return result, err
	}
	f := floor{raw: r, binary: r.binary}
	result.floor, err = f.restore(ctx, s, images, tickFile, scratch)
	return result, err
}

// dump dumps to the directory images and returns the pause of the subject.
func (r *raw) dump(ctx context.Context, pid int, images, tickFile string) (time.Duration, error) {
	begin := time.Now()
	if err := r.run(ctx, images, "dump", "-t", strconv.Itoa(pid), "--leave-running"); err != nil {
		return 0, err
	}
	if _, err := firstTick(ctx, tickFile, time.Now()); err != nil {
		return 0, err
	}
	return longestGap(tickFile, begin)
}

// second is another dump, whose images are not kept.
func (r *raw) second(ctx context.Context, pid int, tickFile string) (time.Duration, error) {
	images := filepath.Join(r.images, "raw-second")
	if err := os.Mkdir(images, 0o700); err != nil {
		return 0, err
	}
	defer os.RemoveAll(images)
	return r.dump(ctx, pid, images, tickFile)
}

func (r *raw) run(ctx context.Context, images, verb string, args ...string) error {
	return r.runWith(ctx, nil, images, verb, args...)
}

// runWith gives CRIU a file, as descriptor 3, unless it is nil.
func (r *raw) runWith(ctx context.Context, file *os.File, images, verb string, args ...string) error {
	cmd := exec.CommandContext(ctx, r.criu, append([]string{verb, "-D", images, "-v1", "-o", "criu.log"}, args...)...)
	if file != nil {
		cmd.ExtraFiles = []*os.File{file}
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(images, "criu.log"))
		return fmt.Errorf("criu %s: %w: %s%s", verb, err, out, log)
	}
	return nil
}

// copyAndSync copies the images as cp does and returns how long that and a
// sync took.
func copyAndSync(ctx context.Context, from, to string) (time.Duration, error) {
	defer os.RemoveAll(to)
	begin := time.Now()
	if out, err := exec.CommandContext(ctx, "cp", "-r", from, to).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("cp: %w: %s", err, out)
	}
	if out, err := exec.CommandContext(ctx, "sync", "-f", to).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("sync: %w: %s", err, out)
	}
	return time.Since(begin), nil
}

func treeSize(dir string) (total int64, err error) {
	err = filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			total += info.Size()
		}
		return err
	})
	return total, err
}
