// Package failure decides when a node counts as lost and what to do with a job
// that failed. It is pure: no clock, no I/O; times come in, judgements go out.
//
// # Is the node gone?
//
// Accrual is the phi-accrual failure detector of Hayashibara, Défago, Yared and
// Katayama ("The phi accrual failure detector", SRDS 2004). It keeps the times
// between the last heartbeats, takes them as normally distributed, and turns the
// present silence t into
//
//	phi(t) = -log10 P(the next heartbeat comes later than t)
//
// so that phi 1 is wrong once in ten silences, phi 8 once in a hundred million.
// A node whose heartbeats come regularly is thus missed soon, one on a bad line
// late, without anyone setting a time-out for either. Four bounds keep the
// estimate sane:
//
//   - the deviation is at least a quarter of the mean, so that a perfectly regular
//     node is not suspected for one late packet;
//   - silence below Min is never suspect, silence beyond Max always is, whatever
//     was learned;
//   - a gap enters the history as at most the silence that was just becoming
//     suspect, so that one long absence does not blind the detector, yet a line
//     that has slowed for good is learned, a little at each heartbeat;
//   - until some gaps are known, the configured interval stands for the mean.
//
// # What now?
//
// Next decides, from a job's policy and its past runs, whether it is started
// again, from what and when. Three questions, in this order:
//
//  1. Is there an attempt left? Every failure uses one up, that of a node too: a
//     job may well be what kills its nodes. A run that held for ResetAfter gives
//     all attempts back.
//  2. From what? The newest checkpoint that has not failed QuickLimit times in
//     a row soon after it was restored. A checkpoint that did is poisoned (it
//     was taken when the failure was already inevitable) and an older one is
//     taken, in the end a start from nothing; when that fails as quickly the job
//     is in a crash loop and left failed. The loss of a node soon after a start
//     says nothing of the checkpoint: many nodes may go at once.
//  3. When? After a delay that doubles with every failure in a row, up to a
//     bound, and starts anew after a run that held. After the first loss of a
//     node, at once.
package failure
