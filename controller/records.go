package controller

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/interval"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

// jobRecord is a job as it is stored.
type jobRecord struct {
	api.JobDetail
	// Runs are the lives of the job that ended in failure, oldest first, since a
	// person has last restarted it.
	Runs []failedRun `json:"runs,omitempty"`
	// Starts counts failed tries to start the job that were worth another.
	Starts int `json:"starts,omitempty"`
	// Network is the number of the present run's network.
	Network uint32 `json:"network,omitempty"`
	// Secret is what the job's tasks know each other by. It leaves the
	// controller only to the job's own agents.
	Secret []byte `json:"secret,omitempty"`
	// Drill is set when the job is a checkpoint's restore on trial.
	Drill bool `json:"drill,omitempty"`
	// Kept are ended tasks whose logs are still on their nodes.
	Kept []taskRef `json:"kept,omitempty"`
	// Yield is set from when the job begins to give up its place until it has one
	// again: it comes back by itself.
	Yield *yield `json:"yield,omitempty"`
	// Stubborn is set after the job could not give way.
	Stubborn *stubborn `json:"stubborn,omitempty"`
	// Relief is what was done last about the job being kept from working.
	Relief relief `json:"relief,omitzero"`
	// Size and Took are the bytes of the newest durable checkpoint and how long it
	// took, CRIU the version that a node needs to restore it.
	Size int64   `json:"size,omitempty"`
	Took float64 `json:"took_ms,omitempty"`
	CRIU string  `json:"criu,omitempty"`
	// Own are the job's checkpoints, so that nobody reads those of all jobs to
	// find them. Nil: the record is of a controller that kept no such list.
	Own []string `json:"own"`
	// History is what automatic checkpoints go by.
	History history `json:"history,omitzero"`
}

// taskRef is one incarnation of a task and where it is or was.
type taskRef struct {
	Node  string `json:"node"`
	Job   string `json:"job"`
	Index int    `json:"index"`
	Run   int64  `json:"run"`
}

func (r taskRef) proto() *agentpb.TaskRef {
	return &agentpb.TaskRef{Job: r.Job, Index: int32(r.Index), Run: r.Run}
}

// refs are the tasks of the job's present run that have a node.
func (j *jobRecord) refs() []taskRef {
	var refs []taskRef
	for _, t := range j.TaskStatus {
		if t.Node != "" {
			refs = append(refs, taskRef{Node: t.Node, Job: j.ID, Index: t.Index, Run: j.Run})
		}
	}
	return refs
}

// request is what an operation was asked to do; Operation.Input.
type request struct {
	Label       string      `json:"label,omitempty"`
	Trigger     api.Trigger `json:"trigger,omitempty"`
	From        string      `json:"from,omitempty"` // checkpoint
	Cloud       string      `json:"cloud,omitempty"`
	Signal      int         `json:"signal,omitempty"`
	Checkpoints []string    `json:"checkpoints,omitempty"` // to verify; empty: all
	Tasks       int         `json:"tasks,omitempty"`       // of the job
	Request     string      `json:"request,omitempty"`     // of a program inside the job
	Why         string      `json:"why,omitempty"`         // it was begun, where that is not plain
	For         string      `json:"for,omitempty"`         // the job that another gives way to
	Out         string      `json:"out,omitempty"`         // the job that is swapped out
	Yield       string      `json:"yield,omitempty"`       // the operation that takes it out
	Nodes       []string    `json:"nodes,omitempty"`       // where a swapped job goes, by task
	Node        string      `json:"node,omitempty"`        // to drain
	// Anew has a recovery start the job from nothing, NotBefore not before then.
	Anew      bool      `json:"anew,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
}

// opRecord is an operation as it is stored.
type opRecord struct {
	api.Operation
	Position protocol.State `json:"position"`
	// Cancel is why the operation was called off, once it was.
	Cancel string `json:"cancel,omitempty"`
	// Then is the operation that takes the job over when this one has ended, and
	// After, in that one, this one.
	Then  string `json:"then,omitempty"`
	After string `json:"after,omitempty"`
	// Anew is set when a restart has no checkpoint and starts from the beginning.
	Anew bool `json:"anew,omitempty"`
	// Stopped is set once the job's old tasks are being destroyed: from then
	// on a failure leaves the job without tasks.
	Stopped bool `json:"stopped,omitempty"`
	// Run is the job's run that the operation has begun; 0 while there is none.
	Run int64 `json:"run,omitempty"`
	// Avoid are nodes on which an attempt failed.
	Avoid []string `json:"avoid,omitempty"`
	// Parts are the tasks' entries of the manifest, by index.
	Parts map[int]json.RawMessage `json:"parts,omitempty"`
	// Steps are the measured parts of the capture.
	Steps map[int]api.CaptureSteps `json:"steps,omitempty"`
	// Moved are the jobs that a drain took off its node.
	Moved []string `json:"moved,omitempty"`
	// Endpoints are the ways to the job's network, by node.
	Endpoints map[string]endpoint `json:"endpoints,omitempty"`
	// Placed is when a restore found its Nodes, and Up when all tasks ran there.
	Placed time.Time `json:"placed,omitzero"`
	Nodes  []string  `json:"nodes,omitempty"`
	Up     time.Time `json:"up,omitzero"`
	// Broke is the step whose failure is being undone.
	Broke string `json:"broke,omitempty"`
	// Frozen is when the freeze was ordered.
	Frozen time.Time `json:"frozen,omitzero"`
}

// flow is the plan of an operation that is asked for so.
func (r request) flow(kind api.OperationKind) protocol.Flow {
	return protocol.FlowOf(kind, r.Tasks, r.Signal)
}

func (o *opRecord) request() (request, error) {
	var r request
	if len(o.Input) == 0 {
		return r, nil
	}
	if err := json.Unmarshal(o.Input, &r); err != nil {
		return r, fmt.Errorf("the input of operation %s cannot be read: %w", o.ID, err)
	}
	return r, nil
}

// nodeRecord is a node as it is stored.
type nodeRecord struct {
	api.Node
	Driver string `json:"driver,omitempty"`
	// Tally is how often the node was lost, up to its last change of state.
	Tally interval.Tally `json:"tally,omitzero"`
	// Hellos counts the sessions that its agents began.
	Hellos int64 `json:"hellos,omitempty"`
	// TreeAddress is where other nodes reach its agent's part of the monitoring tree.
	TreeAddress string `json:"tree_address,omitempty"`
	// RestoresWithNetwork says that its agent makes the network of a job of one task
	// within the command that restores it.
	RestoresWithNetwork bool `json:"restores_with_network,omitempty"`
	// Certificates are those that its agent may show.
	Certificates certificates `json:"certificates,omitzero"`
	// Further nodes are beyond those that the cloud begins with; GivenBack is set
	// once one is being taken away.
	Further   bool `json:"further,omitempty"`
	GivenBack bool `json:"given_back,omitempty"`
}

// cleanup is a task that its node must destroy or, with Checkpoint, what was
// captured of it for that one.
type cleanup struct {
	Task       taskRef `json:"task"`
	Checkpoint string  `json:"checkpoint,omitempty"`
	KeepLogs   bool    `json:"keep_logs"`
	// Number tells the order from earlier ones for the same task, which agents
	// may remember to have carried out.
	Number uint64 `json:"number"`
}

func (c cleanup) key() string {
	key := fmt.Sprintf("%s/%s/%06d/%012d", c.Task.Node, c.Task.Job, c.Task.Index, c.Task.Run)
	if c.Checkpoint != "" {
		key += "/" + c.Checkpoint
	}
	return key
}

func (c cleanup) command(try int) *agentpb.Command {
	command := &agentpb.Command{Id: fmt.Sprintf("cleanup/%d/%v/%d", c.Number, c.KeepLogs, try), Task: c.Task.proto()}
	if c.Checkpoint != "" {
		command.Body = &agentpb.Command_Discard{Discard: &agentpb.Discard{Checkpoint: c.Checkpoint}}
	} else {
		command.Body = &agentpb.Command_Destroy{Destroy: &agentpb.DestroyTask{KeepLogs: c.KeepLogs}}
	}
	return command
}

// tokenRecord is a join token, stored under its hash.
type tokenRecord struct {
	Cloud   string    `json:"cloud"`
	Node    string    `json:"node"`
	Expires time.Time `json:"expires"`
}

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// newID returns prefix and 40 random bits.
func newID(prefix string) string {
	var raw [5]byte
	rand.Read(raw[:]) // never fails: crypto/rand.Read
	return prefix + "-" + idEncoding.EncodeToString(raw[:])
}

// emit adds an event to the history.
func (c *Controller) emit(tx store.Tx, e api.Event) error {
	n, err := tx.Sequence(store.Events)
	if err != nil {
		return err
	}
	c.newestEvent.Store(n)
	e.ID, e.Time = n, c.clock.Now().UTC()
	if e.Job != "" {
		job, err := c.jobs.get(tx, e.Job)
		switch {
		case err == nil:
			e.Owner = job.Owner
		case !errors.Is(err, store.ErrNotFound):
			return err
		}
	}
	return store.Put(tx, store.Events, eventKey(n), e)
}

func eventKey(n uint64) string { return fmt.Sprintf("%016x", n) }

func getJob(tx store.Tx, id string) (*jobRecord, error) {
	job, err := store.Get[jobRecord](tx, store.Jobs, id)
	if err != nil {
		return nil, err
	}
	return &job, nil
}

func putJob(tx store.Tx, job *jobRecord) error {
	job.Queued = job.Phase == api.PhaseSuspended && job.Yield != nil
	return store.Put(tx, store.Jobs, job.ID, job)
}

func getOperation(tx store.Tx, id string) (*opRecord, error) {
	op, err := store.Get[opRecord](tx, store.Operations, id)
	if err != nil {
		return nil, err
	}
	return &op, nil
}

func putOperation(tx store.Tx, op *opRecord) error { return store.Put(tx, store.Operations, op.ID, op) }

// findID resolves an id, or a prefix of one that fits nothing else, in table.
func findID(tx store.Tx, table store.Table, what, ref string) (string, error) {
	if ref == "" {
		return "", invalid("the %s's id is empty", what)
	}
	if _, err := tx.Get(table, ref); err == nil {
		return ref, nil
	} else if !errors.Is(err, store.ErrNotFound) {
		return "", err
	}
	var found []string
	err := tx.Scan(table, ref, func(key string, _ []byte) error {
		if !strings.HasPrefix(key, ref) || len(found) > 4 {
			return store.ErrStop
		}
		found = append(found, key)
		return nil
	})
	if err != nil {
		return "", err
	}
	return onlyOne(found, what, ref)
}

func onlyOne(found []string, what, ref string) (string, error) {
	switch len(found) {
	case 0:
		return "", notFound("there is no %s %q", what, ref)
	case 1:
		return found[0], nil
	}
	return "", invalid("%q may mean several %ss: %s", ref, what, strings.Join(found, ", "))
}

// findJob resolves a job's id, name or unambiguous prefix of the id. Of several
// jobs of one name, the only one that is not over is meant.
func findJob(tx store.Tx, ref string) (*jobRecord, error) {
	if job, err := getJob(tx, ref); ref != "" && !errors.Is(err, store.ErrNotFound) {
		return job, err
	}
	jobs, err := mentioning[jobRecord](tx, store.Jobs, ref)
	if err != nil {
		return nil, err
	}
	var named, live []string
	for _, job := range jobs {
		if ref == "" || job.Name != ref {
			continue
		}
		named = append(named, job.ID)
		if !job.Phase.Final() {
			live = append(live, job.ID)
		}
	}
	id := ""
	switch {
	case len(live) == 1:
		id = live[0]
	case len(named) > 0:
		id, err = onlyOne(named, "job", ref)
	default:
		id, err = findID(tx, store.Jobs, "job", ref)
	}
	if err != nil {
		return nil, err
	}
	return getJob(tx, id)
}

func findCheckpoint(tx store.Tx, ref string) (api.Checkpoint, error) {
	id, err := findID(tx, store.Checkpoints, "checkpoint", ref)
	if err != nil {
		return api.Checkpoint{}, err
	}
	return store.Get[api.Checkpoint](tx, store.Checkpoints, id)
}

// checkpointsOf lists a job's checkpoints, oldest first; of all jobs when job is empty.
func checkpointsOf(tx store.Tx, job string) ([]api.Checkpoint, error) {
	if job != "" {
		record, err := getJob(tx, job)
		if err == nil && record.Own != nil {
			return ownCheckpoints(tx, record)
		}
		if err := ignoreNotFound(err); err != nil {
			return nil, err
		}
	}
	all, err := mentioning[api.Checkpoint](tx, store.Checkpoints, job)
	if err != nil {
		return nil, err
	}
	list := make([]api.Checkpoint, 0, len(all))
	for _, cp := range all {
		if job == "" || cp.Job == job {
			list = append(list, cp)
		}
	}
	sortBy(list, func(cp api.Checkpoint) (time.Time, string) { return cp.Created, cp.ID })
	return list, nil
}

func ownCheckpoints(tx store.Tx, job *jobRecord) ([]api.Checkpoint, error) {
	list := make([]api.Checkpoint, 0, len(job.Own))
	for _, id := range job.Own {
		cp, err := store.Get[api.Checkpoint](tx, store.Checkpoints, id)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, cp)
	}
	sortBy(list, func(cp api.Checkpoint) (time.Time, string) { return cp.Created, cp.ID })
	return list, nil
}

// disown forgets that checkpoints are the job's.
func (j *jobRecord) disown(gone ...string) {
	j.Own = slices.DeleteFunc(slices.Clone(j.Own), func(id string) bool { return slices.Contains(gone, id) })
}

// newestDurable is the checkpoint that a job is restored from unless another
// is named: its own newest durable one, else the one it was cloned from. Empty
// when there is none.
func newestDurable(tx store.Tx, job *jobRecord) (string, error) {
	list, err := checkpointsOf(tx, job.ID)
	if err != nil {
		return "", err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].State == api.CheckpointDurable {
			return list[i].ID, nil
		}
	}
	if job.From == "" {
		return "", nil
	}
	from, err := store.Get[api.Checkpoint](tx, store.Checkpoints, job.From)
	if errors.Is(err, store.ErrNotFound) || (err == nil && from.State != api.CheckpointDurable) {
		return "", nil
	}
	return from.ID, err
}
