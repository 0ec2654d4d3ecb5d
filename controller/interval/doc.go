// Package interval decides when a job is checkpointed by itself.
//
// It is pure: a policy, what was measured of the job and its nodes, and the
// time come in; a Plan with the next time and all its reasons goes out.
//
// A Policy is a fixed interval, a cron line (UTC), or auto. The interval of auto
// is the one that makes the expected loss smallest:
//
//	cost   the median over the newest checkpoints of the job's pause plus the
//	       share of the node that storing took meanwhile
//	rate   how often one of the job's nodes is lost: losses over node time, both
//	       forgotten within a month, starting from a presumption; what was seen of
//	       the cloud is presumed of the node. The job needs all of its nodes,
//	       so their rates add
//	best   Daly's formula of cost and 1/rate (2006), bounded
//
// The interval runs from the newest durable checkpoint, whoever asked for it,
// or from when the present run began. An attempt that failed is repeated after
// an eighth of the interval, then a quarter, a half, and then the whole.
//
// Many jobs must not be due in one second. Each has a fixed number in [0, 1)
// of its own, from its id. The first checkpoint of a run with an interval is
// due that much earlier, by half an interval at the most; one with a cron line
// always comes that much later, by a twentieth of the time until the line's next
// time, and five minutes at the most; and what was due while nobody looked
// is spread likewise over the minute after. However long that was, one checkpoint
// makes up for all that were missed.
//
// References: Young, A first order approximation to the optimum checkpoint
// interval, CACM 17(9), 1974. Daly, A higher order estimate of the optimum
// checkpoint interval for restart dumps, FGCS 22(3), 2006. Vaidya, Impact of
// checkpoint latency on overhead ratio of a checkpointing scheme, IEEE Trans.
// Computers 46(8), 1997. Schroeder and Gibson, A large-scale study of failures in
// high-performance computing systems, IEEE TDSC 7(4), 2010.
package interval
