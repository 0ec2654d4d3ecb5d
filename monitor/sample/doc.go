// Package sample measures what a task got from its node, what it had to wait
// for, and what the node itself was short of.
//
// A Collector belongs to one task and reads the task's control groups, v2, v1 or
// both, and the kernel's figures of its processes and threads. Everything that
// grows is given as a sum that never goes back, so that
// the difference of two samples tells what happened in between, whoever takes
// them and however far apart they are. Package starvation judges those
// differences; nothing is judged here.
//
//	CPU used          cpu.stat (v2, always there), cpuacct.usage (v1), else threads' sum
//	wait for a CPU    /proc/TID/schedstat of every thread; cpu.pressure
//	throttling        cpu.stat: throttled_usec (v2), throttled_time (v1)
//	memory            memory.stat: major faults, refaults, swap; memory.pressure
//	I/O               io.stat (v2), blkio.throttle.* (v1), else /proc/PID/io; io.pressure;
//	                  /proc/TID/stat field 42 where delay accounting is on
//	states            /proc/PID/stat, cgroup.events
//
// Pressure files are in every v2 directory, even where all controllers are
// still in v1, unless the kernel was started without PSI; then Task.PSI is
// false and the sums of threads must do.
//
// # Threads that end
//
// The kernel keeps the run-queue delay per thread and forgets it when the thread
// ends. So the collector remembers every thread's last figures, adds what each
// has gained since, and drops a thread that is gone without taking anything
// away. What a thread waits between its last reading and its end is lost; for
// tasks made of processes that live shorter than a period cpu.pressure is the
// better figure, and a detector should take the greater of the two.
//
// # Cost
//
// Files are read into one buffer, without a directory listing: cgroup.threads
// names all threads. A thread whose schedstat has not changed has not run, and
// so cannot have changed its state: its /proc/TID/stat is not read again. At most
// MaxThreads threads are read in one round; beyond that the rounds take turns.
// BenchmarkNode measures a node with 20 tasks.
package sample
