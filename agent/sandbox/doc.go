// Package sandbox builds, restores, watches and ends the sandbox of one task:
// pid, mount, network, ipc and uts namespaces, cgroups, and an overlay root
// with a small pid 1 of our own (cmd/dormouse-init) that travels inside.
//
// A sandbox is a directory:
//
//	DIR/sandbox.json   what it is and which process is its pid 1 (Open reads it)
//	DIR/upper          the overlay's upper layer: all that the task changed
//	DIR/upper/.dormouse  pid 1's own files: binary, output, control socket, exit status
//	DIR/work           the overlay's work directory
//	DIR/root           where the root is mounted
//	DIR/tmpfs          where file systems in memory are filled for a restore
//
// Birth:
//
//	Create    directories, cgroups, the image unpacked       (steps, undone in reverse)
//	Start     pid 1's files into upper, network namespace, clone, then in the
//	          child: mounts, identity, privileges dropped, command executed.
//	          A failure in the child comes back through a pipe as one sentence.
//
// Restore, with CRIU between the two halves:
//
//	Create, MakeNetwork and Connect, upper filled by the caller: all at once if need be
//	OpenCgroup       CRIU can be started, while the rest is being done
//	MountTmpfs       file systems in memory, for the caller to fill
//	PrepareRestore   overlay mounted at DIR/root
//	Recognize        pid 1 held, before it runs: afterwards it may end at any moment
//	FinishRestore    all unmounted again (the tree has its own mounts), pid recorded
//
// Tasks of one job (parallel.go). Options.Network connects the namespaces; host
// names, host files and the environment tell launchers such as mpirun where to
// start what, and dormouse-rsh, through which they do, asks the pid 1 of the
// other task. All of it lies inside the job: processes started remotely are
// children of a pid 1 and the connections between sandboxes carry the job's own
// addresses, so that a checkpoint of all tasks holds every end of everything.
//
// Requests (requests.go). Programs inside ask their pid 1 for a checkpoint of the
// job; it keeps the request in its memory, and Listen brings it to the agent as
// often as it takes. So the copy in a checkpoint has it too, and is told by
// Restored what became of it there.
//
// The agent need not be the parent of pid 1: after an agent's restart Open finds
// it by pid and start time and checks that it is in the sandbox's cgroup. So the
// end of a sandbox is seen through a pidfd, and how its command ended is read
// from a file that pid 1 writes before it exits.
//
// Nothing inside is trusted: files below upper that the agent reads are opened
// without following links out of it, and the process behind the control socket
// has to be the sandbox's pid 1.
package sandbox
