// Package tally says what the summaries that go up the monitoring tree mean:
// package tree adds tables and histograms up by position, an agent fills them
// (Fill) and the controller reads them (Read).
//
//	table 0       nodes: node id -> Node, weighs its busy CPUs
//	table 1       jobs: job id -> Job, weighs the CPUs used
//	histogram 0   of all tasks: share of the time ready in which they did not run
//	histogram 1   of all tasks: share of the time standing still for memory
//	histogram 2   of all tasks: share of the time standing still for I/O
//	histogram 3   of all nodes: share of the CPUs that is busy
//
// All numbers on the way are unsigned: CPUs, shares and rates travel in
// thousandths. A position, once given, keeps its meaning; new ones are added at
// the end, so that agents and controllers of different versions understand each
// other. What an older agent does not send reads as zero.
package tally
