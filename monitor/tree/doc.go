// Package tree carries what nodes measure and find up a tree of nodes, so that
// what the controller hears grows with the number of clouds, not of nodes. It
// does no I/O: what happens is told to a Node or to the Collector, which answer
// with what is to be done. docs/design/monitoring-tree.md says why it is so.
//
// The controller runs the Collector:
//
//	Members           ->  Write: the new tree; Written ->  Assign: a place for each node that moves
//	Connected         ->  Assign: a node's place again
//	Report            ->  Write: its verdicts; Written ->  Send: the answer
//	Tick              ->  Rounds: what a round has brought; and a new tree, if it is time
//
// Each agent runs a Node:
//
//	Assign            ->  nothing until the next round
//	Raise             ->  Store: the verdict is in the outbox
//	Tick              ->  Sample: a round begins; Observe takes the sample
//	Report of a child ->  Send: to the parent, once all children have reported or time is up
//	Ack               ->  Send: the answer to each child; what is stored leaves the outbox
//	Tick, Unreachable ->  Send: to the controller, as no answer came
//
// The answer to a report comes from the controller, down the tree. A node that
// has none when its time is up sends the same report to the controller. A parent
// that was not at fault has done so one slot before and has the answer for its
// children in time, so of all below a dead node only its own children do it.
//
// A report names the nodes that are in it, so the controller counts none twice
// when both a parent and its child have told it. A verdict is repeated by the node
// that raised it until the controller has stored it; no node in between remembers
// any beyond the round.
package tree
