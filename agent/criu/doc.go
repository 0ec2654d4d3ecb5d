// Package criu is Dormouse's engine for putting a process tree to sleep and
// waking it: a thin, complete wrapper around CRIU (Checkpoint/Restore In
// Userspace, version 4 or newer).
//
// # How it works
//
// Every dump and every restore is one `criu swrk FD` child that speaks CRIU's
// RPC (protobuf messages over a SOCK_SEQPACKET socket pair):
//
//	dump                                     restore
//	1 start criu, send the request           1 start criu in the target cgroups
//	2 answer its notifications:              2 show it what was mounted since, send the request
//	    pre-dump, post-dump                  3 answer its notifications:
//	3 at pre-dump, when the caller has           pre-restore, setup-namespaces,
//	  frozen the tree, note affinities           post-setup-namespaces, post-restore,
//	  and TCP sockets                            network-unlock, pre-resume, post-resume
//	4 at post-dump compare what was dumped   4 at pre-resume pin the threads again
//	  with the cgroup: a process left out    5 return the pid of the new tree's init
//	  fails the dump
//	5 read the statistics
//
// What CRIU finds out about the kernel is kept for the next one (kdat.go).
//
// Every option CRIU gets is set in options.go and nowhere else. CRIU's answer
// carries only the first error it logged, which is often a harmless one, so an
// [Error] is built from the log file instead.
//
// # What a failure leaves behind
//
// A failed dump leaves the tree as it was: running, or frozen if the caller had
// frozen its cgroup. CRIU is not killed while it works, because it holds TCP
// sockets in repair mode (tcp(7), TCP_REPAIR) in which the application cannot
// use them: a cancelled context makes the next notification fail and makes
// CRIU's next large write fail, upon which CRIU undoes its work by itself. Only
// if that takes longer than the request's Grace, or if somebody else kills
// CRIU, does the engine take the sockets out of repair mode itself (repair.go).
//
// One thing cannot be helped: CRIU gets its code into each process by having it
// execute a few instructions that end in a breakpoint. A CRIU that is killed by
// somebody else within that fraction of a millisecond lets the process run into
// the breakpoint's SIGTRAP.
//
// A failed restore may leave processes in the target cgroup; killing that
// cgroup is the caller's part, CRIU itself is gone when Restore returns.
//
// # Before any of it
//
// [Engine.Preflight] looks for what CRIU cannot capture, without stopping
// anything, and names each finding with the process and descriptor.
package criu
