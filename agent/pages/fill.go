package pages

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// ErrNotFilled is wrapped by errors of Fill that are not the source's.
var ErrNotFilled = errors.New("cannot fill the memory of the restored processes")

// Fill writes what CRIU does not, from all, the stored pages images. The processes
// are there, with all their areas, and none runs; pids are their numbers in our own
// pid namespace by those inside the tree. No byte is written but from a read that
// did not fail.
func (d *Division) Fill(ctx context.Context, all Source, pids map[int]int) error {
	for _, image := range d.taken {
		if pids[image.pid] == 0 {
			return fmt.Errorf("%w: process %d was not restored", ErrNotFilled, image.pid)
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	blocks := d.blocks()
	for range runtime.NumCPU() {
		group.Go(func() error {
			for ctx.Err() == nil {
				i := next.Add(1) - 1
				if i >= int64(len(blocks)) {
					return nil
				}
				b := blocks[i]
				if err := b.image.fill(all, b.number, pids[b.image.pid]); err != nil {
					return err
				}
			}
			return context.Cause(ctx)
		})
	}
	return group.Wait()
}

type takenBlock struct {
	image  *takenImage
	number uint32
}

// blocks lists the blocks that have something to be written.
func (d *Division) blocks() []takenBlock {
	var blocks []takenBlock
	for i := range d.taken {
		image := &d.taken[i]
		for _, r := range image.runs {
			b := takenBlock{image, r.first / blockPages}
			if n := len(blocks); n == 0 || blocks[n-1] != b {
				blocks = append(blocks, b)
			}
		}
	}
	return blocks
}

// fill writes what is taken of a block into a process.
func (t *takenImage) fill(all Source, number uint32, pid int) error {
	runs := t.runsOf(number)
	last := runs[len(runs)-1]
	offset := int64(runs[0].first) * pageSize
	length := int64(last.first+last.pages)*pageSize - offset
	return all.Read(t.name, offset, int(length), func(parts [][]byte) error {
		if len(parts) != 1 {
			parts = [][]byte{slices.Concat(parts...)}
		}
		return writeRuns(pid, runs, parts[0])
	})
}

// runsOf returns the runs of a block.
func (t *takenImage) runsOf(number uint32) []takenRun {
	at := func(block uint32) int {
		i, _ := slices.BinarySearchFunc(t.runs, block*blockPages, func(r takenRun, first uint32) int {
			return int(int64(r.first) - int64(first))
		})
		return i
	}
	return t.runs[at(number):at(number+1)]
}

// mostVectors is what process_vm_writev(2) takes at once, IOV_MAX.
const mostVectors = 1024

// writeRuns writes content, which begins with the first run, into a process.
func writeRuns(pid int, runs []takenRun, content []byte) error {
	base := runs[0].first
	for some := range slices.Chunk(runs, mostVectors) {
		local := make([]unix.Iovec, len(some))
		remote := make([]unix.RemoteIovec, len(some))
		var want int
		for i, r := range some {
			n := int(r.pages) * pageSize
			local[i].Base = &content[int(r.first-base)*pageSize]
			local[i].SetLen(n)
			remote[i] = unix.RemoteIovec{Base: uintptr(r.address), Len: n}
			want += n
		}
		n, err := unix.ProcessVMWritev(pid, local, remote, 0)
		if err == nil && n != want {
			err = unix.EFAULT // as is said of the first page alone
		}
		if err != nil {
			return fmt.Errorf("%w: process %d at %#x: %w", ErrNotFilled, pid, some[0].address, os.NewSyscallError("process_vm_writev", err))
		}
	}
	return nil
}
