// Package controller is the part of Dormouse that knows what should be.
//
// It keeps jobs, operations, checkpoints, nodes and events in a store, serves
// them over REST, holds one stream to every node's agent, and makes the agents'
// world follow the store. It has these layers, each in files named after it:
//
//	api*.go         REST: requests are checked, become one transaction each, and are answered
//	operations.go   drives operations: take the step that is written, write the next, repeat
//	protocol/       the pure part of it: what follows what, whom a step awaits, what a failure means
//	schedule.go     who runs where, who waits, who gives way: what scheduler/ decides is written
//	preempt, drain  jobs give up their places, and come back through the queue
//	start, capture, restore, kill, verify: the steps themselves, applied to all tasks of a job
//	settle.go       what becomes of a job when its tasks end or its nodes are lost
//	recover.go      whether, when and from what a failed job is started again
//	monitor.go      the controller's end of the monitoring tree
//	findings.go     what nodes have found of themselves and of tasks, and what follows
//	relief.go       jobs that are kept from working are suspended or moved
//	webhook.go      findings on their way to the webhooks of jobs
//	cleanup.go      tasks that must not exist any more, remembered until their nodes confirm it
//	fleet.go        streams to agents; a command is repeated over reconnects until it is answered
//	agents.go       the gRPC service: join, connect, attach
//	certificates.go which certificates of a node are believed, and their renewal
//	nodes.go        leases: ready, unreachable, lost
//	image.go      what was decoded of the store last, and which jobs may be on a node
//	daemon.go       all of it in one process, from one configuration
//	member, forward, shared: one of several controllers on one etcd: it leads or follows
//	backup.go       copies of the store and the keys, out and in
//
// Three rules hold it together.
//
// The next step of an operation is written before it is taken, together with
// what the step before it changed. Every step may be taken again, so a
// controller that was killed takes the written one again and goes on.
//
// A run number names one incarnation of a job. It is raised, in the store,
// before a task is started or restored, and everything that carries an older one
// is destroyed when it is met. A new run begins only after each task of the old
// one was confirmed destroyed, or its node's lease has certainly run out: an
// agent freezes its tasks when its lease ends, and asks before it thaws.
//
// The write of a checkpoint's signed manifest is what makes it durable. Before
// it, any failure thaws the job and leaves older checkpoints alone; after it,
// nothing is undone.
package controller
