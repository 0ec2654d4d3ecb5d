package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"dormouse/agent/capture"
	"dormouse/agent/criu"
	"dormouse/agent/sandbox"
	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// Files of a capture's spool directory.
const (
	captureFile = "capture.json" // captured: written when all below is complete
	imagesDir   = "images"       // CRIU's
	upperIndex  = "upper.index"
	closeIndex  = "closure.index"
	indexSuffix = ".index" // of each small tmpfs
)

// The trees of a part.
const (
	upperTree   = "upper"
	closureTree = "closure"
	tmpfsTree   = "tmpfs-" // and the name of a small one
)

// captured is what must be known of a complete capture to store it.
type captured struct {
	Checkpoint string           `json:"checkpoint"`
	Job        string           `json:"job"`
	Index      int32            `json:"index"`
	Frozen     time.Time        `json:"frozen"`
	Steps      api.CaptureSteps `json:"steps"`
	CRIU       criu.Version     `json:"criu"`
	Tmpfs      []string         `json:"tmpfs,omitempty"` // trees, each of a small tmpfs
}

// capturing is one checkpoint of one task, from its pre-flight to its discard.
type capturing struct {
	key   string // of Agent.captures
	spool *spoolDir
	work  string // CRIU's log and notes; on disk, for an agent that comes after a crash

	// mu serialises the steps that run on different lanes: storing, discarding
	// and aborting.
	mu        sync.Mutex
	part      *repository.PartWriter
	pending   *criu.PendingDump // CRIU, started ahead of the freeze
	streams   *pageStreams      // of the content of memory; nil: CRIU writes to the spool itself
	files     time.Duration     // that the files took at the end of the dump
	filesErr  error             // and why they could not be taken
	upper     *capture.Upper
	tmpfs     []sandbox.Tmpfs // that CRIU leaves to us
	stored    atomic.Int64    // bytes given to the repository so far
	begun     time.Time
	frozen    bool
	complete  bool
	thawed    bool
	result    captured
	discarded bool

	// An upload is ended by who drops what it stores.
	uploading sync.Mutex
	endUpload context.CancelFunc
	dropped   bool
}

func captureKey(ref *agentpb.TaskRef, checkpoint string) string {
	return fmt.Sprintf("%s-%d", checkpoint, ref.GetIndex())
}

func (a *Agent) findCapture(ref *agentpb.TaskRef, checkpoint string) *capturing {
	a.capturesMu.Lock()
	defer a.capturesMu.Unlock()
	return a.captures[captureKey(ref, checkpoint)]
}

func (c *capturing) images() string { return filepath.Join(c.spool.path, imagesDir) }

// preflight names what keeps the task from being checkpointed, makes room for
// the images and copies ahead what can be.
func (a *Agent) preflight(ctx context.Context, ref *agentpb.TaskRef, checkpoint string, progress func(float64, string)) (*agentpb.PreflightResult, error) {
	t, err := a.find(ref)
	if err != nil {
		return nil, err
	}
	box, err := t.live()
	if err != nil {
		return nil, err
	}
	if a.criuErr != nil {
		return nil, a.criuErr
	}
	if err := a.discard(ref, checkpoint); err != nil { // of an earlier attempt
		return nil, err
	}
	t.gate.Shut(ctx, gatePreflight)
	defer t.gate.Open(gatePreflight)
	r, _ := t.snapshot()
	report, err := a.criu.Preflight(ctx, criu.PreflightRequest{
		Pid: box.Pid(), Cgroup: box.CgroupPath(), ExternalMounts: dumpMounts(box),
		ControlledInit: true,
	})
	if err != nil {
		return nil, err
	}
	ties, err := a.lookAtTies(ctx, &r, box)
	if err != nil {
		return nil, err
	}
	result := &agentpb.PreflightResult{EstimatedBytes: report.ImageBytes}
	for _, r := range append(report.Refusals, ties...) {
		result.Refusals = append(result.Refusals, r.String())
	}
	if len(result.Refusals) > 0 {
		return result, nil
	}
	progress(0, "copying files ahead")
	bytes, err := a.prepare(ctx, t, box, checkpoint, report)
	result.EstimatedBytes += bytes
	if errors.Is(err, errNoRoom) {
		result.Refusals = append(result.Refusals, err.Error())
		return result, nil
	}
	failpoint.Hit("agent.preflight.done")
	return result, err
}

// prepare opens the spool and the part and copies files ahead. It returns how
// many bytes of files the capture has to copy.
func (a *Agent) prepare(ctx context.Context, t *task, box *sandbox.Sandbox, checkpoint string, report *criu.PreflightReport) (_ int64, err error) {
	r, _ := t.snapshot()
	key := captureKey(r.ref(), checkpoint)
	c := &capturing{key: key, work: a.workDir(key)}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if c.part, err = a.newPart(ctx, &r, c.stored.Store); err != nil {
		return 0, err
	}
	view, err := look(box)
	if err != nil {
		return 0, err
	}
	files, err := capture.Estimate(ctx, box.UpperDir(), c.part.Unchanged, view.Shared)
	if err != nil {
		return 0, err
	}
	if c.spool, err = a.spool.open(c.key, "the checkpoint", report.ImageBytes+files+slack); err != nil {
		return files, err
	}
	for _, dir := range []string{c.images(), c.work} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return files, err
		}
	}
	if c.upper, err = capture.NewUpper(box.UpperDir(), c.spool.path, c.part.Unchanged, sandbox.KeepXattr); err != nil {
		return files, err
	}
	if err := c.upper.PreCopy(ctx, view.Shared); err != nil {
		return files, spaceError(err, c.spool)
	}
	if c.spool.inMemory { // one on disk must be good for the next agent at any instant
		if c.streams, err = newPageStreams(ctx, c.images(), privateMemory(box.Pid())); err != nil {
			return files, spaceError(err, c.spool)
		}
	}
	a.capturesMu.Lock()
	defer a.capturesMu.Unlock()
	a.captures[c.key] = c
	return files, nil
}

// slack is room for the images that describe processes, beside their memory.
const slack = 16 << 20

func look(box *sandbox.Sandbox) (*capture.View, error) {
	pids, err := box.Pids()
	if err != nil {
		return nil, err
	}
	return capture.Look(box.Pid(), pids, box.UpperDir())
}

func dumpMounts(box *sandbox.Sandbox) []criu.DumpMount {
	var mounts []criu.DumpMount
	for _, e := range box.External() {
		mounts = append(mounts, dumpMount(e))
	}
	return mounts
}

func dumpMount(e sandbox.External) criu.DumpMount {
	return criu.DumpMount{Key: e.Key, Mountpoint: e.Mountpoint}
}

func (a *Agent) newPart(ctx context.Context, r *record, progress func(int64)) (*repository.PartWriter, error) {
	repo, err := a.repository()
	if err != nil {
		return nil, err
	}
	return repo.NewPart(ctx, repository.PartOptions{
		Holder:    fmt.Sprintf("node %s job %s task %d", a.config.Node, r.Job, r.Index),
		PageCache: a.pageCache(r), FileCache: a.known, Progress: progress,
	})
}

// pageCache names the table of a task's pages in its newest checkpoint. It is
// the task's for all its runs.
func (a *Agent) pageCache(r *record) string {
	return filepath.Join(a.pagesDir(), fmt.Sprintf("%s-%d", r.Job, r.Index))
}

// freeze stops the task. Its failure leaves the task running.
func (a *Agent) freeze(ctx context.Context, ref *agentpb.TaskRef, checkpoint string) (err error) {
	t, err := a.find(ref)
	if err != nil {
		return err
	}
	box, err := t.live()
	if err != nil {
		return err
	}
	c := a.findCapture(ref, checkpoint)
	if c == nil {
		return retry{fmt.Errorf("checkpoint %s was not prepared on this node, or the agent was restarted since", checkpoint)}
	}
	if c.frozen {
		return nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.abort(t, c))
		}
	}()
	t.gate.Shut(ctx, gateCheckpoint)
	err = t.note(func(r *record) { r.Checkpoint, r.Work = checkpoint, c.work })
	if err != nil {
		return err
	}
	if c.pending, err = a.prepareDump(box, c); err != nil {
		return a.keepLog(err, c.key)
	}
	if err := box.Quiesce(ctx); err != nil {
		return retry{fmt.Errorf("close the task's connections to the agent: %w", err)}
	}
	c.begun = time.Now()
	if err := t.hold(ctx, holdCheckpoint); err != nil {
		return err
	}
	c.frozen = true
	c.result.Frozen = c.begun
	c.result.Steps.FreezeMS = milliseconds(time.Since(c.begun))
	failpoint.Hit("agent.freeze.frozen")
	return nil
}

// freezeAlone freezes, captures and thaws a task for which no other waits. Its
// pause has none of the ways to the controller then, nor what that writes down
// between its steps. Each of the three leaves what is done as it is, so the
// command may come again, also to the next agent.
func (a *Agent) freezeAlone(ctx context.Context, ref *agentpb.TaskRef, checkpoint string) error {
	if c := a.findCapture(ref, checkpoint); c == nil || !c.complete {
		if err := a.freeze(ctx, ref, checkpoint); err != nil {
			return err
		}
		if _, err := a.capture(ctx, ref, checkpoint); err != nil {
			return err
		}
	}
	return a.thaw(ctx, ref, checkpoint, false)
}

// goOn lets a task run that was stopped for a checkpoint. It does so also when
// the agent is being stopped.
func (a *Agent) goOn(t *task) error {
	ctx := context.WithoutCancel(a.life)
	r, box := t.snapshot()
	if r.Checkpoint != "" && box != nil {
		if err := a.resumeTies(ctx, &r, box); err != nil {
			return err
		}
	}
	if err := t.release(ctx, holdCheckpoint); err != nil {
		return err
	}
	t.gate.Open(gateCheckpoint)
	r, _ = t.snapshot()
	if r.Checkpoint == "" {
		return nil
	}
	return t.note(func(r *record) { r.Checkpoint, r.Work = "", "" })
}

// capture dumps the frozen task. The task stays frozen, unless that fails. One
// that was captured alone may have gone on and ended since.
func (a *Agent) capture(ctx context.Context, ref *agentpb.TaskRef, checkpoint string) (*agentpb.CaptureResult, error) {
	c := a.findCapture(ref, checkpoint)
	if c == nil || !c.complete {
		t, err := a.find(ref)
		if err != nil {
			return nil, err
		}
		box, err := t.live()
		if err != nil {
			return nil, err
		}
		if c == nil || !c.frozen {
			return nil, retry{fmt.Errorf("the task is not frozen for checkpoint %s: the agent was restarted since", checkpoint)}
		}
		if err := a.dump(ctx, t, box, c, checkpoint); err != nil {
			return nil, errors.Join(err, a.abort(t, c))
		}
	}
	steps, err := json.Marshal(c.result.Steps)
	return &agentpb.CaptureResult{Steps: steps}, err
}

// prepareDump starts CRIU, which looks at the kernel for some 30 ms before it
// turns to the task: they need not be part of the pause.
func (a *Agent) prepareDump(box *sandbox.Sandbox, c *capturing) (*criu.PendingDump, error) {
	var err error
	if c.tmpfs, err = box.SmallTmpfs(); err != nil {
		return nil, err
	}
	mounts := dumpMounts(box)
	for _, t := range c.tmpfs {
		mounts = append(mounts, dumpMount(t.External()))
	}
	return a.criu.PrepareDump(a.life, criu.DumpRequest{
		Pid: box.Pid(), ImagesDir: c.images(), WorkDir: c.work, LeaveRunning: true,
		FreezeCgroup: box.CgroupPath(), ExternalMounts: mounts, ExternalNetNS: true,
		Notify: func(ctx context.Context, event criu.Event, _ int) error {
			if event != criu.EventPostDump {
				return nil
			}
			// CRIU has made links to deleted but still linked files by now, and
			// removes them when it goes on: this is the one instant at which the
			// files are as the images need them.
			start := time.Now()
			c.filesErr = c.finishStreams()
			if c.filesErr == nil {
				c.filesErr = captureFiles(ctx, box, c)
			}
			c.files = time.Since(start)
			return c.filesErr
		},
	})
}

func (a *Agent) dump(ctx context.Context, t *task, box *sandbox.Sandbox, c *capturing, checkpoint string) error {
	// By now every task of the job stands still.
	r, _ := t.snapshot()
	if err := a.quiesceTies(ctx, &r, box); err != nil {
		return err
	}
	failpoint.Hit("agent.capture.dumping")
	begun := time.Now()
	result, err := c.pending.Dump(ctx)
	if c.filesErr != nil {
		return spaceError(c.filesErr, c.spool)
	}
	if err != nil {
		return dumpError(a.keepLog(err, c.key), c.spool)
	}
	failpoint.Hit("agent.capture.files")
	if err := c.finish(&r, checkpoint, a.config.Node, result, time.Since(begun)-c.files, c.files); err != nil {
		return spaceError(err, c.spool)
	}
	failpoint.Hit("agent.capture.dumped")
	return nil
}

// finishStreams completes the content of memory among the images.
func (c *capturing) finishStreams() error {
	if c.streams == nil {
		return nil
	}
	bytes, err := c.streams.finish()
	c.result.Steps.SizeBytes += bytes
	return err
}

// captureFiles takes the files of a task that stands still.
func captureFiles(ctx context.Context, box *sandbox.Sandbox, c *capturing) error {
	view, err := look(box)
	if err != nil {
		return err
	}
	upper, err := c.upper.Finish(ctx, view.Shared)
	if err != nil {
		return err
	}
	closure, err := capture.Closure(ctx, box.LowerDir(), box.UpperDir(), view.Paths)
	if err != nil {
		return err
	}
	if err := upper.Save(c.spool.path, upperIndex); err != nil {
		return err
	}
	if err := closure.Save(c.spool.path, closeIndex); err != nil {
		return err
	}
	c.result.Steps.SizeBytes += upper.Size() + closure.Size()
	for _, t := range c.tmpfs {
		tree := tmpfsTree + t.Name
		index, err := capture.Snapshot(ctx, t.Dir, c.spool.path, tree)
		if err != nil {
			return err
		}
		if err := index.Save(c.spool.path, tree+indexSuffix); err != nil {
			return err
		}
		c.result.Tmpfs = append(c.result.Tmpfs, tree)
		c.result.Steps.SizeBytes += index.Size()
	}
	return nil
}

// finish notes that all of the capture is there.
func (c *capturing) finish(r *record, checkpoint, node string, dump *criu.DumpResult, dumping, files time.Duration) error {
	k := &c.result
	k.Checkpoint, k.Job, k.Index, k.CRIU = checkpoint, r.Job, r.Index, dump.Version
	k.Steps.Task, k.Steps.Node = int(r.Index), node
	k.Steps.DumpMS, k.Steps.FilesMS = milliseconds(dumping), milliseconds(files)
	k.Steps.FrozenMS, k.Steps.MemDumpMS = milliseconds(dump.Stats.Frozen), milliseconds(dump.Stats.MemDump)
	k.Steps.PagesWritten = int64(dump.Stats.PagesWritten + dump.Stats.SharedPagesWritten)
	k.Steps.SizeBytes += dump.Bytes
	k.Steps.PauseMS = milliseconds(time.Since(c.begun)) // so far; all of it when the task is suspended
	if err := c.save(); err != nil {
		return err
	}
	c.complete = true
	return nil
}

// save writes what finish noted. The task stands still and the contents are
// not synced either, so neither is this.
func (c *capturing) save() error {
	return writeJSONQuickly(filepath.Join(c.spool.path, captureFile), &c.result)
}

// thaw lets the task go on; with abort, what was captured is thrown away.
func (a *Agent) thaw(_ context.Context, ref *agentpb.TaskRef, checkpoint string, abort bool) error {
	c := a.findCapture(ref, checkpoint)
	t, err := a.find(ref)
	if err == nil {
		failpoint.Hit("agent.thaw.before")
		if r, _ := t.snapshot(); r.Checkpoint == checkpoint {
			if err := a.goOn(t); err != nil {
				return err
			}
		}
		failpoint.Hit("agent.thaw.after")
	}
	if abort {
		return a.discard(ref, checkpoint)
	}
	if c == nil || !c.complete {
		return nil
	}
	if c.thawed || c.begun.IsZero() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.thawed = true
	c.result.Steps.PauseMS = milliseconds(time.Since(c.begun))
	return c.save()
}

// abort undoes a capture that failed: the task goes on.
func (a *Agent) abort(t *task, c *capturing) error {
	err := a.goOn(t)
	return errors.Join(err, a.dropCapture(c))
}

// discard forgets the local files of a checkpoint, and with them the
// protection of its chunks from garbage collection.
func (a *Agent) discard(ref *agentpb.TaskRef, checkpoint string) error {
	if err := os.Remove(a.uploadFile(captureKey(ref, checkpoint))); err != nil && !notExist(err) {
		return err
	}
	c := a.findCapture(ref, checkpoint)
	if c == nil {
		return nil
	}
	return a.dropCapture(c)
}

func (a *Agent) dropCapture(c *capturing) error {
	c.stopUpload()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.discarded = true
	if err := c.close(); err != nil {
		return err
	}
	a.capturesMu.Lock()
	defer a.capturesMu.Unlock()
	if a.captures[c.key] == c {
		delete(a.captures, c.key)
	}
	return nil
}

// close gives up what the capture holds.
func (c *capturing) close() error {
	var errs []error
	if c.pending != nil {
		c.pending.Abort()
	}
	if c.streams != nil {
		c.streams.close()
		c.streams = nil
	}
	if c.part != nil {
		errs = append(errs, c.part.Close())
		c.part = nil
	}
	if c.spool != nil {
		errs = append(errs, c.spool.close())
	}
	if c.work != "" {
		errs = append(errs, os.RemoveAll(c.work))
	}
	return errors.Join(errs...)
}

// closeCaptures ends the captures of an agent that is being stopped. Complete
// ones on disk stay for the next agent.
func (a *Agent) closeCaptures() error {
	a.capturesMu.Lock()
	defer a.capturesMu.Unlock()
	var errs []error
	for _, c := range a.captures {
		if c.complete && !c.spool.inMemory {
			if c.part != nil {
				errs = append(errs, c.part.Close())
			}
			continue
		}
		errs = append(errs, c.close())
	}
	clear(a.captures)
	return errors.Join(errs...)
}

// dumpError makes CRIU's error one for the controller.
func dumpError(err error, spool *spoolDir) error {
	if errors.Is(err, criu.ErrNoSpace) {
		return noSpace(err, spool)
	}
	return err
}

func spaceError(err error, spool *spoolDir) error {
	if errors.Is(err, syscall.ENOSPC) {
		return noSpace(err, spool)
	}
	return err
}

func noSpace(err error, spool *spoolDir) error {
	return fmt.Errorf("%s ran out of space while the checkpoint was captured; the job goes on: %w", filepath.Dir(spool.path), err)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
