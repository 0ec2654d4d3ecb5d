package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"dormouse/agent/capture"
	"dormouse/agent/criu"
	"dormouse/agent/sandbox"
	"dormouse/agent/sandbox/pid1"
	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
	"dormouse/repository"
)

// restore builds a task again from a checkpoint. Whatever fails, nothing of the
// new task is left; the checkpoint is not touched.
func (a *Agent) restore(ctx context.Context, ref *agentpb.TaskRef, request *agentpb.RestoreTask, progress func(float64, string)) (*agentpb.TaskState, error) {
	if t, err := a.find(ref); err == nil {
		return t.state(), nil // it was restored, and may be held
	}
	if a.criuErr != nil {
		return nil, a.criuErr
	}
	spec, err := parseSpec(request.GetSpec())
	if err != nil {
		return nil, err
	}
	entry, err := a.manifestEntry(ctx, request, int(ref.GetIndex()))
	if err != nil {
		return nil, err
	}
	if err := a.canRun(entry); err != nil {
		return nil, refusal{fmt.Errorf("checkpoint %s cannot be restored on node %s: %w", request.GetCheckpoint(), a.config.Node, err)}
	}
	t, err := a.newTask(record{
		Job: ref.GetJob(), Index: ref.GetIndex(), Run: ref.GetRun(), Spec: spec, Stage: stageRestoring,
		VirtualIP: request.GetVirtualIp(), Hosts: hosts(request.GetHosts()), From: request.GetCheckpoint(),
	})
	if err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(a.life)
	h := newRestoring(request.GetHold(), cancel)
	t.mu.Lock()
	t.restore = h
	t.mu.Unlock()
	a.restores.Go(func() {
		defer close(h.done)
		defer cancel()
		h.err = a.finishRestore(running, t, h, entry, request.GetNetwork(), progress)
	})
	select {
	case <-h.reached:
		return t.state(), nil
	case <-h.done:
	case <-ctx.Done():
		h.abandon()
	}
	if h.err != nil {
		return nil, h.err
	}
	return t.state(), nil
}

// finishRestore is the whole of a restore.
func (a *Agent) finishRestore(ctx context.Context, t *task, h *restoring, entry *repository.TaskManifest, plan *agentpb.NetworkPlan, progress func(float64, string)) error {
	defer os.RemoveAll(a.workDir(t.id()))
	if err := a.rebuild(ctx, t, h, entry, plan, progress); err != nil {
		r, _ := t.snapshot()
		return errors.Join(fmt.Errorf("restore checkpoint %s: %w", r.From, err), a.undo(t))
	}
	_, err := a.begin(ctx, t)
	return err
}

// manifestEntry verifies the checkpoint's manifest and returns this task's part
// of it.
func (a *Agent) manifestEntry(ctx context.Context, request *agentpb.RestoreTask, index int) (*repository.TaskManifest, error) {
	repo, err := a.repository()
	if err != nil {
		return nil, err
	}
	manifest, err := repo.LoadManifest(ctx, request.GetCheckpoint(), a.verifier())
	if err != nil {
		return nil, err
	}
	for i := range manifest.Tasks {
		if manifest.Tasks[i].Index == index {
			return &manifest.Tasks[i], nil
		}
	}
	return nil, refuse("checkpoint %s has no task %d", request.GetCheckpoint(), index)
}

// canRun compares what the checkpoint needs with what this node has.
func (a *Agent) canRun(entry *repository.TaskManifest) error {
	dumped, err := criu.ParseVersion(entry.CRIU)
	if err != nil {
		return err
	}
	if err := a.criu.CheckVersion(dumped); err != nil {
		return err
	}
	var need needs
	if err := json.Unmarshal(entry.Extra, &need); err != nil {
		return fmt.Errorf("what it needs of a node: %w", err)
	}
	have, err := a.cpu()
	if err != nil {
		return err
	}
	return criu.CheckCPU(have, need.CPU)
}

// smallTask is up to which size a task is there so soon that the collection of
// garbage would be much of the time.
const smallTask = 1 << 30

// rebuild fetches the task's part and wakes the task.
func (a *Agent) rebuild(ctx context.Context, t *task, h *restoring, entry *repository.TaskManifest, plan *agentpb.NetworkPlan, progress func(float64, string)) (err error) {
	repo, err := a.repository()
	if err != nil {
		return err
	}
	part, err := repo.OpenPart(ctx, entry.Part)
	if err != nil {
		return err
	}
	if part.Size() <= smallTask {
		defer a.garbage.relax()()
	}
	r, _ := t.snapshot()
	size, err := a.spool.sizeOfRestore(ctx, part)
	if err != nil {
		return err
	}
	spool, err := a.spool.open(t.id(), "the restore", size)
	if err != nil {
		return refusal{err}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, spool.close())
		}
	}()
	progress(0, "fetching memory and files")
	images := filepath.Join(spool.path, imagesDir)
	memory, err := openMemory(ctx, part, spool.path, images, a.spool.fuse)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, memory.close())
		}
	}()
	built, err := a.build(ctx, t, &r, part, plan, memory)
	if err != nil {
		return spaceError(err, spool)
	}
	progress(0.5, "waking processes")
	if err := a.wake(ctx, t, h, built, images, memory); err != nil {
		return spaceError(err, spool)
	}
	a.lanes.run(t.id()+" pages", func() { a.rememberPages(memory, spool, &r) })
	return nil
}

// built is the CRIU that wakes a task, and what it wakes it in.
type built struct {
	criu    *criu.PendingRestore
	box     *sandbox.Sandbox
	cgroup  *os.File
	netns   *os.File
	network errgroup.Group // that connects netns
	target  *sandbox.RestoreTarget
	tmpfs   []sandbox.Tmpfs
	work    string // of the CRIU
}

// close gives up what was built for a task that is not woken; its sandbox is the
// task's.
func (b *built) close() {
	if b.criu != nil {
		b.criu.Abort()
	}
	_ = b.network.Wait() // it failed for another reason, or for this one
	for _, file := range []*os.File{b.cgroup, b.netns} {
		if file != nil {
			file.Close()
		}
	}
}

// build brings the images, but for the content of memory, into the spool and,
// beside that, makes the sandbox and its files, and starts CRIU. The network may be
// late; with a plan the job's network is made as well.
func (a *Agent) build(ctx context.Context, t *task, r *record, part *repository.PartReader, plan *agentpb.NetworkPlan, memory *memorySource) (_ *built, err error) {
	b := &built{}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	upper := filepath.Join(t.dir, upperTree)
	networked, made := make(chan struct{}), make(chan struct{})
	group, all := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := a.startNetwork(ctx, t, r, plan, b); err != nil {
			return err
		}
		close(networked)
		return nil
	})
	group.Go(func() error {
		err := part.RestoreImages(all, memory.images, repository.RestoreOptions{
			Only: func(e repository.Entry) bool { return !isPages(e.Path) },
		})
		if err != nil {
			return err
		}
		return memory.attach()
	})
	group.Go(func() (err error) {
		if err := part.RestoreTree(all, upperTree, upper, repository.RestoreOptions{Local: a.ownInit}); err != nil {
			return err
		}
		if err := await(all, networked, made); err != nil {
			return err
		}
		if err := restoreFiles(all, part, a.known, b.box, upper, t.dir); err != nil {
			return err
		}
		failpoint.Hit("agent.restore.files")
		b.target, err = b.box.PrepareRestore(all, b.netns)
		return err
	})
	group.Go(func() (err error) {
		if b.box, err = a.createBox(all, t, r); err != nil {
			return err
		}
		t.setBox(b.box)
		close(made)
		if err := await(all, networked); err != nil {
			return err
		}
		if err := a.startCRIU(b); err != nil {
			return err
		}
		if b.tmpfs, err = restoreTmpfs(all, part, b.box); err != nil {
			return err
		}
		b.work, err = a.makeWorkDir(t)
		return err
	})
	if err = group.Wait(); err == nil {
		// Not before: what was waited for is little, and would wait for the disk.
		memory.reader.Begin()
	}
	return b, err
}

// await returns when all of them are closed.
func await(ctx context.Context, all ...<-chan struct{}) error {
	for _, closed := range all {
		select {
		case <-closed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// startNetwork makes the namespace of the task's network, and begins to connect it.
func (a *Agent) startNetwork(ctx context.Context, t *task, r *record, plan *agentpb.NetworkPlan, b *built) (err error) {
	config := boxConfig(t, r)
	prepared := make(chan error, 1)
	go func() {
		var err error
		if plan != nil {
			_, err = a.prepareNetwork(ctx, r.network(), plan)
		}
		prepared <- err
	}()
	b.netns, err = a.boxes.MakeNetwork(config)
	b.network.Go(func() error {
		if err := <-prepared; err != nil || b.netns == nil {
			return err
		}
		return a.boxes.Connect(ctx, config, b.netns)
	})
	return err
}

// ownInit knows where to find the program of a task's pid 1, which as a rule is this
// node's: it is most of what an upper layer has.
func (a *Agent) ownInit(e repository.Entry) string {
	if "/"+e.Path == filepath.Join(pid1.Directory, pid1.InitFile) {
		return a.config.Init
	}
	return ""
}

// startCRIU starts a CRIU where the task is to be.
func (a *Agent) startCRIU(b *built) (err error) {
	birth := criu.Birth{NetNS: b.netns}
	if birth.Cgroup, birth.Tasks, err = b.box.OpenCgroup(); err != nil {
		return err
	}
	b.cgroup = birth.Cgroup
	b.criu, err = a.criu.PrepareRestore(birth)
	return err
}

// makeWorkDir makes CRIU's work directory, where the next agent would look for it.
func (a *Agent) makeWorkDir(t *task) (string, error) {
	work := a.workDir(t.id())
	if err := os.Mkdir(work, 0o700); err != nil {
		return "", err
	}
	return work, t.note(func(r *record) { r.Work = work })
}

// restoreTmpfs makes and fills those file systems in memory that CRIU has left to
// us.
func restoreTmpfs(ctx context.Context, part *repository.PartReader, box *sandbox.Sandbox) ([]sandbox.Tmpfs, error) {
	var names []string
	for _, tree := range part.Trees() {
		if name, ok := strings.CutPrefix(tree, tmpfsTree); ok {
			names = append(names, name)
		}
	}
	made, err := box.MountTmpfs(names)
	for _, t := range made {
		if err := part.RestoreTree(ctx, tmpfsTree+t.Name, t.Dir, repository.RestoreOptions{}); err != nil {
			return nil, err
		}
	}
	return made, err
}

// rememberPages lets the next checkpoint of the task store only what changed
// since this one. It runs beside the task, and removes the images.
func (a *Agent) rememberPages(memory *memorySource, spool *spoolDir, r *record) {
	err := errors.Join(memory.stop(), memory.remember(a.life, a.pageCache(r)))
	if err != nil {
		// The next checkpoint hashes all memory again, that is all.
		a.log.Warn("cannot keep the table of pages", "job", r.Job, "task", r.Index, "error", err)
	}
	if err := errors.Join(memory.close(), spool.close()); err != nil {
		a.log.Warn("cannot remove the images of a restore", "job", r.Job, "task", r.Index, "error", err)
	}
}

// createBox makes the sandbox. When this node does not have the task's root,
// the closure alone takes its place: the processes that were captured go on, but
// whatever else they need of the root later is missing, and the task's state
// says so.
func (a *Agent) createBox(ctx context.Context, t *task, r *record) (*sandbox.Sandbox, error) {
	config := boxConfig(t, r)
	box, err := a.boxes.Create(ctx, config)
	if !errors.Is(err, sandbox.ErrBadImage) && !(err != nil && rootIsMissing(config.Root)) {
		return box, err
	}
	empty := filepath.Join(t.dir, "root")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return nil, err
	}
	config.Root = "dir:" + empty
	reason := fmt.Sprintf("restored without its root: %v; only the files that it had open or mapped are there", err)
	a.log.Warn("restoring a task without its root", "task", t.id(), "error", err)
	if err := t.update(func(r *record) { r.Reason = reason }); err != nil {
		return nil, err
	}
	return a.boxes.Create(ctx, config)
}

// rootIsMissing reports whether a root names a path that is not on this node.
func rootIsMissing(text string) bool {
	root, err := sandbox.ParseRoot(text)
	if err != nil || root.Kind != api.RootDir {
		return false
	}
	return !fileExists(root.Path)
}

// restoreFiles completes the upper layer: the task's own files, which are in the
// directory upper, and those of its closure that this node does not have.
func restoreFiles(ctx context.Context, part *repository.PartReader, known *repository.FileCache, box *sandbox.Sandbox, upper, dir string) error {
	// Over the sandbox's own, which is empty: rename(2) does, os.Rename does not.
	if err := unix.Rename(upper, box.UpperDir()); err != nil {
		return &os.LinkError{Op: "rename", Old: upper, New: box.UpperDir(), Err: err}
	}
	differing, err := capture.Differing(ctx, part.Knowing(known), closureTree, box.LowerDir())
	if err != nil || len(differing) == 0 {
		return err
	}
	stored := filepath.Join(dir, closureTree)
	defer os.RemoveAll(stored)
	err = part.RestoreTree(ctx, closureTree, stored, repository.RestoreOptions{
		Only: func(e repository.Entry) bool { return differing[e.Path] },
	})
	if err != nil {
		return err
	}
	return capture.Apply(stored, box.LowerDir(), box.UpperDir())
}

// wake lets CRIU build the processes in what was built for them; it takes over their
// network. It begins while their memory is still being fetched: CRIU waits where it
// reads it or, without FUSE, once all namespaces are there.
func (a *Agent) wake(ctx context.Context, t *task, h *restoring, b *built, images string, memory *memorySource) error {
	defer b.close()
	box := b.box
	var tree *sandbox.Restored
	request := criu.RestoreRequest{
		ImagesDir: images, WorkDir: b.work, Root: b.target.Root,
		Notify: func(ctx context.Context, event criu.Event, root int) error {
			switch event {
			case criu.EventPostSetupNamespaces:
				// Sockets come after this.
				if err := b.network.Wait(); err != nil {
					return err
				}
				return memory.wait(ctx)
			case criu.EventPostRestore:
				return memory.fill(ctx, root)
			case criu.EventNetworkUnlock:
				// Every connection is there, and none sends before CRIU goes on.
				if err := memory.complete(); err != nil {
					return err
				}
				failpoint.Hit("agent.restore.unlock")
				r, _ := t.snapshot()
				if err := a.mendTies(ctx, &r, box, b.netns); err != nil {
					return err
				}
				if h.hold {
					return h.wait(ctx, b.netns)
				}
				return a.resume(ctx, &r, b.netns)
			case criu.EventPreResume:
				var err error
				tree, err = box.Recognize(root)
				return err
			}
			return nil
		},
	}
	external := b.target.External
	for _, t := range b.tmpfs {
		external = append(external, t.External())
	}
	for _, e := range external {
		request.ExternalMounts = append(request.ExternalMounts, criu.RestoreMount{Key: e.Key, Source: e.Source})
	}
	first, err := memory.neededFirst()
	if err != nil {
		return err
	}
	if first {
		if err := memory.wait(ctx); err != nil {
			return err
		}
	}
	failpoint.Hit("agent.restore.before-criu")
	_, err = b.criu.Restore(ctx, request)
	b.criu = nil
	if failed := errors.Join(memory.failure(), b.network.Wait()); failed != nil {
		err = failed // CRIU only says that it was told to give up
	} else if err != nil {
		err = a.keepLog(err, t.id())
	}
	if err != nil {
		tree.Close()
		return err
	}
	failpoint.Hit("agent.restore.after-criu")
	return box.FinishRestore(ctx, tree)
}
