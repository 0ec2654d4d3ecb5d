package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/agent/capture"
	"dormouse/agent/criu"
	"dormouse/agent/pages"
	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// upload stores what was captured. It runs beside the task. The answer is kept
// until the checkpoint is discarded: the controller may ask again, also after a
// restart of the agent.
func (a *Agent) upload(ctx context.Context, ref *agentpb.TaskRef, checkpoint string, progress func(float64, string)) (*agentpb.UploadResult, error) {
	answer := a.uploadFile(captureKey(ref, checkpoint))
	result := &agentpb.UploadResult{}
	if err := readJSON(answer, result); err == nil {
		return result, nil
	}
	c := a.findCapture(ref, checkpoint)
	if c == nil || !c.complete {
		return nil, fmt.Errorf("what task %d captured for checkpoint %s was lost when the agent ended", ref.GetIndex(), checkpoint)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, end := c.uploadUntilDropped(ctx)
	defer end()
	if c.discarded {
		return nil, fmt.Errorf("checkpoint %s was discarded", checkpoint)
	}
	begun, worked := time.Now(), processorTime()
	part, err := a.store(ctx, c, progress)
	if err != nil {
		if c.part != nil {
			err = errors.Join(err, c.part.Close())
			c.part = nil
		}
		return nil, fmt.Errorf("store checkpoint %s: %w", checkpoint, err)
	}
	steps := c.result.Steps
	steps.UploadMS, steps.UploadCPUMS = milliseconds(time.Since(begun)), milliseconds(processorTime()-worked)
	steps.StoredBytes, steps.NewBytes = part.StoredBytes, part.NewBytes
	cpu, err := a.cpu()
	if err != nil {
		return nil, err
	}
	entry, err := c.manifestEntry(part, cpu)
	if err != nil {
		return nil, err
	}
	if result.Part, err = json.Marshal(entry); err != nil {
		return nil, err
	}
	if result.Steps, err = json.Marshal(steps); err != nil {
		return nil, err
	}
	if err := writeJSONDurably(answer, result); err != nil {
		return nil, err
	}
	failpoint.Hit("agent.upload.done")
	return result, c.spool.close() // the part stays open, and protected, until the discard
}

// uploadUntilDropped ends ctx, too, when the capture is to be dropped: its
// checkpoint was called off, and nobody waits for the upload.
func (c *capturing) uploadUntilDropped(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancel(ctx)
	c.uploading.Lock()
	defer c.uploading.Unlock()
	c.endUpload = end
	if c.dropped {
		end()
	}
	return ctx, end
}

// stopUpload ends the upload that is under way, and any later one.
func (c *capturing) stopUpload() {
	c.uploading.Lock()
	defer c.uploading.Unlock()
	c.dropped = true
	if c.endUpload != nil {
		c.endUpload()
	}
}

// processorTime is what this process has used. Of uploads beside each other,
// each is taken for all of it: the cost is overrated rather than forgotten.
func processorTime() time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0 // not on Linux: getrusage(2) has no other error for these arguments
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// uploadFile holds the answer to an Upload.
func (a *Agent) uploadFile(key string) string { return filepath.Join(a.uploadsDir(), key+".json") }

func (a *Agent) store(ctx context.Context, c *capturing, progress func(float64, string)) (*repository.PartResult, error) {
	var err error
	if c.part == nil { // the agent was restarted, or an earlier attempt failed
		r := record{Job: c.result.Job, Index: c.result.Index}
		if c.part, err = a.newPart(ctx, &r, c.stored.Store); err != nil {
			return nil, err
		}
	}
	c.part.SetCaptured(c.result.Frozen)
	stop := c.reportProgress(progress)
	defer stop()
	if c.spool.inMemory { // one on disk must be good for the next agent at any instant
		if _, err := pages.DropZeros(c.images()); err != nil {
			return nil, err
		}
	}
	if err := c.part.AddImages(ctx, c.images()); err != nil {
		return nil, err
	}
	failpoint.Hit("agent.upload.half")
	type tree struct{ name, index string }
	trees := []tree{{upperTree, upperIndex}, {closureTree, closeIndex}}
	for _, name := range c.result.Tmpfs {
		trees = append(trees, tree{name, name + indexSuffix})
	}
	for _, tree := range trees {
		index, err := capture.OpenIndex(c.spool.path, tree.index)
		if err != nil {
			return nil, err
		}
		if err := c.part.AddTree(ctx, tree.name, index.Entries()); err != nil {
			return nil, err
		}
	}
	result, err := c.part.Commit(ctx)
	return &result, err
}

// reportProgress tells the controller how far the upload is until stop.
func (c *capturing) reportProgress(progress func(float64, string)) (stop func()) {
	const period = 250 * time.Millisecond
	done := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		for {
			select {
			case <-done:
				return
			case <-ticker.C:
				fraction := float64(c.stored.Load()) / float64(max(c.result.Steps.SizeBytes, 1))
				progress(min(fraction, 1), fmt.Sprintf("storing task %d", c.result.Index))
			}
		}
	})
	return func() {
		close(done)
		telling.Wait()
	}
}

// needs is what a node must have to run the task; TaskManifest.Extra.
type needs struct {
	CPU criu.CPU `json:"cpu"`
}

func (c *capturing) manifestEntry(part *repository.PartResult, cpu criu.CPU) (*repository.TaskManifest, error) {
	extra, err := json.Marshal(needs{CPU: cpu})
	if err != nil {
		return nil, err
	}
	return &repository.TaskManifest{
		Index: int(c.result.Index), Part: part.ID, Node: c.result.Steps.Node,
		SizeBytes: part.SizeBytes, StoredBytes: part.StoredBytes, NewBytes: part.NewBytes,
		CRIU: c.result.CRIU.String(), Kernel: kernelRelease(),
		CPUVendor: cpu.Vendor, CPUFeatures: cpu.Features, Extra: extra,
	}, nil
}
