// Package agent is the daemon of a node. It holds one stream to the controller,
// does what the commands on it say, and keeps tasks alive across its own
// restarts and upgrades.
//
// # Layers
//
//	agent            the daemon: session, lease, lanes of commands, state of tasks
//	agent/sandbox    namespaces, cgroups, root file system, exec, logs of one task
//	agent/network    the networks of jobs on this node, and cutting tasks off them
//	agent/criu       one dump or restore
//	agent/plugins    what a checkpoint does beyond CRIU
//	agent/capture    the files of one task
//	agent/progress   how far a task says it has come
//	agent/health     asking a task how it is
//	monitor          what was measured of a task, and what it means
//	repository       where what was captured is stored
//
// # The life of a task here
//
// Every step is written to the task's state file before it is taken:
//
//	starting  -> running -> ended -> destroyed (only logs are left) -> forgotten
//	restoring ->
//
// An agent that finds a task starting or restoring when it comes up undoes it:
// the controller repeats the command. One that finds it running takes it over.
//
// # The life of a checkpoint here
//
//	Preflight  what cannot be captured is named; room is made in the spool, and
//	           memory in it made ready; files are copied ahead
//	Freeze     connections to pid 1 are closed, the cgroup is frozen
//	Capture    plugins bring to rest what ties the task to others (ties.go): what
//	           was sent gets the time to arrive, the task is cut off its network;
//	           CRIU dumps into the spool, memory through pipes of ours
//	           (streams.go); at its end the files follow
//	Open       the network is back
//	Thaw       the task goes on
//	Upload     the spool is stored, beside the running task
//	Discard    the spool is removed
//
// Where no other task has to be waited for, Freeze goes as far as Thaw.
//
// A restore is the mirror: small images and files are fetched while CRIU starts and
// the network is made, and then memory begins to be fetched and verified, of which
// never all is held (pages.go). CRIU builds the processes, and reads what memory
// they may share from a file system of ours (where the kernel has no FUSE, it waits
// until that is in the spool); the rest, most of it, the agent writes into the
// processes itself before they run. What the node lacks of the task's closure is
// put into its upper layer. Whatever fails, nothing of the new task is left: a task
// runs only after all of its memory was verified.
//
// # Jobs of several tasks
//
// The controller takes every step on all tasks before it takes the next on any.
// So nobody sends when the first is cut off, and each is reachable when the first
// goes on. A restored task is built cut off and held: CRIU waits, in a goroutine
// of ours, right before it lets sockets and processes go, until all others have
// come as far and the controller has had their networks opened and releases them.
// What is held ends with the agent, or when nobody releases it (held.go).
//
// # When the agent is lost
//
// From Freeze to Thaw the state file names the checkpoint. An agent that comes
// up and finds it there either holds the complete capture, and then keeps the
// task frozen until the controller decides, or rolls back: it waits for what
// CRIU left to undo itself, opens the network and thaws the task.
//
// # Memory
//
// What the agent itself holds does not grow with the size of a task: besides
// some 40 MiB, the buffers that package repository states for each upload and
// each restore under way, up to twice as the garbage collector goes, and of
// images in the spool two windows of 16 MiB at a time. The spool is memory, too,
// but the node's and not the agent's: as large as the images of the tasks that
// are being captured, and bounded by spool_mem_bytes, or else by half of what the
// node has free. A restore needs spool for small images only.
//
// # The monitor
//
// Every running task is measured once in its period, together with the node, and
// judged by a detector of its own (monitor.go). What Dormouse itself does to a
// task excuses it (excuse.go): from the pre-flight of a checkpoint to its thaw and
// again while it is stored, while the task is frozen, stopped or signalled on the
// user's behalf. Beside that the task is asked how it is, if its job says so
// (health.go), but nothing is asked from the freeze of a checkpoint to its thaw: a
// probe is ended first, with all it started, so that none is captured.
//
// Only what has changed is told: a finding. It is written to monitor.json together
// with what was last said of its task, before anything of it is told, and stays
// there until the controller has it (tree.go). An agent that comes up therefore
// says nothing twice; and because its detectors begin anew, it withdraws what the
// earlier one has found only after some periods.
//
// Findings and figures go up the monitoring tree, whose rules are in package
// monitor/tree; treeNode carries out what that decides. Reports go to the
// parent and come from the children by calls from agent to agent (treelinks.go),
// or to the controller on the session's stream. Rounds begin by the controller's
// clock, as its answers to heartbeats show it (clock.go).
//
// # The lease
//
// Without an acknowledged heartbeat for the term of the lease all tasks are
// frozen, because the controller may start them elsewhere afterwards. They are
// thawed only when the controller has said, in its welcome, that they are still
// ours. A task is frozen as long as there is any reason for it: the lease and a
// checkpoint are two. While no agent lives, a guard process does the freezing
// (guard.go).
package agent
