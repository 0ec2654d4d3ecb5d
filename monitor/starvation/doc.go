// Package starvation tells a task that is kept from working from one that has
// nothing to do. It is pure: samples with their times go in, verdicts with their
// figures come out; nothing is read and no clock is asked.
//
// A Detector belongs to one task. It is fed one sample.Task (and the host's
// sample.Host) a period and compares the time between two samples with what the
// task is due and with the task's own past:
//
//	samples ──> period (differences) ──> suspicion ──> confirmation ──> Verdict
//	                │                        ^
//	                └──> history (only of periods above suspicion)
//
// # Suspicions
//
// Starved of CPU: it wanted to run and was not let. What it wanted is the time
// it used plus the time its threads waited, but no more than it is due (its
// job's CPUs): sixteen threads that share their two CPUs among themselves have
// what they asked for. The part of this it missed is compared with a limit.
// Threads that wait for each other in short bursts are told from threads that
// wait for strangers by cpu.pressure "full" (while some thread of the group runs
// on a CPU, the group does not stall there), and where that is missing by how
// busy the rest of the machine was. What the hypervisor stole while the task ran
// was missed too. The wait may be behind others or for the group's own quota;
// the quota matters only when it gives less than the task is due.
//
// Starved of memory: it stood still for pages to be found or fetched back
// (memory.pressure), or took major faults at many times its own rate: to fetch
// back pages that its limit or a full machine took away, standing still for that
// (on a quick disk mostly booked as I/O), or, without PSI, while its CPU use broke
// down.
//
// Starved of I/O: it stood still for I/O, and each operation takes several times
// as long as it used to. A task that waits because it asks for much at the usual
// speed is not starved.
//
// No progress: all of it is stopped or frozen and nobody said that this is on
// purpose; or it reports progress, has stopped doing so for well longer than its
// longest pause so far, and yet uses CPU as ever (a live-lock). One that reports
// nothing more and sleeps waits for something, which is its own affair.
//
// A milder shortage suffices for the first two when progress has broken down at
// the same time. Progress is what the task reports or, if it reports nothing, the
// CPU time it consumes. That it falls alone proves nothing: the task may be in
// a slower phase of its own.
//
// # History
//
// Each figure's normal is the median of its last History values, their spread
// the median absolute deviation times 1.4826 (Hampel, "The influence curve and its
// role in robust estimation", JASA 69, 1974; Leys et al., "Detecting outliers: Do
// not use standard deviation around the mean, use absolute deviation around the
// median", JESP 49, 2013): half the past may be strange before the normal is. A
// break-down of progress is found by a one-sided cumulative sum of how far each
// rate is below the normal, in spreads (Page, "Continuous inspection schemes",
// Biometrika 41, 1954), each term bounded so that no single period suffices.
// Nothing is learned while a suspicion lasts: misery never becomes normal.
//
// # Confirmation
//
// Confirm periods in a row must be suspect before a verdict, and Clear periods
// in a row must be good, by stricter limits, before it is withdrawn. Periods that
// are excused (a checkpoint was taken, the task was stopped on purpose, it shuts
// down), and those in which it starts, count neither for nor against, and teach
// nothing. With the default of two a shortage that begins anywhere in a period
// is reported at the end of the second full one: within three periods.
//
// # Jobs
//
// Judge joins the verdicts of a job's tasks and names the straggler: tasks that
// spin while they wait for a starved or stopped one are not themselves at fault.
package starvation
