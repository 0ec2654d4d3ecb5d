// Package capture takes the files of a task for a checkpoint, and puts them
// back for a restore.
//
// # What belongs to a checkpoint
//
// A task sees an overlay: the node's root (or a directory, or an image)
// below, its own upper layer above. These trees are stored:
//
//   - "upper": everything in the upper layer, as it was at the instant of the
//     dump: CRIU checks only the size of an open file, so contents of another
//     instant would go unnoticed and corrupt the job.
//   - "closure": those files of the lower layer that a process has mapped, open,
//     or as its directory, so that the job restores on a node where they
//     differ or are missing;
//   - a tree for each tmpfs that CRIU was told to leave out, copied as a whole
//     while the task is frozen (Snapshot).
//
// Files that are open but deleted are CRIU's (it calls them ghosts), and
// what lies in other mounts is either CRIU's (any other tmpfs) or shared with the
// outside (volumes).
//
// # How the upper layer is captured
//
//	while the task runs         Upper.PreCopy
//	  for each regular file that the repository does not hold already:
//	    copy it to the spool, note its identity (inode, size, mtime, ctime)
//	while it is frozen          Upper.Finish
//	  for each entry: note its attributes; for each regular file:
//	    identity known to the repository   -> nothing is copied
//	    identity as noted by PreCopy       -> the copy is good
//	    otherwise                          -> copy it now
//	afterwards                  Index.Entries
//	  the entries with the copies, for the repository
//
// An identity proves nothing in two cases, in which the file is always copied
// while frozen: it is mapped shared and writable (stores to a page that is
// already dirty move no time stamp), or it was changed so shortly before it
// was looked at that a later change could carry the same time stamp.
package capture
