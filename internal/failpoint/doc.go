// Package failpoint names the instants at which tests kill a process.
//
// Code that takes a durable step calls Hit with the step's name. In a normal
// build Hit is empty and inlined away. Built with `-tags failpoint`, it reads
// DORMOUSE_FAILPOINT, a comma-separated list of NAME=ACTION:
//
//	agent.capture.dumped=kill          the process ends itself with SIGKILL, once per NAME
//	agent.capture.dumped=pause:FILE    the process creates FILE and goes on when FILE is gone
//
// A kill happens only while DORMOUSE_FAILPOINT_ONCE names a file that does not
// exist yet (it is created first), so that the restarted process survives.
package failpoint
