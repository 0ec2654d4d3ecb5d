package tree

import (
	"fmt"
	"time"
)

// MaxReport bounds a report on the wire, in bytes. What does not fit is told to
// the controller by the node it is from.
const MaxReport = 256 << 10

// MaxBody bounds a verdict, in bytes.
const MaxBody = 4 << 10

// Assignment is a node's place in the tree. It holds from the node's next round
// on.
type Assignment struct {
	Epoch         int64 // of the tree
	Number        int   // the node's, in a Summary
	Parent        string
	ParentAddress string
	Depth         int
	Levels        int
	Children      []string // the only nodes whose reports it takes
	Period        time.Duration
}

// Report is what a node tells its parent, or the controller, in one round.
type Report struct {
	Round int64
	Depth int // of the sender
	// Orphan is the parent that did not answer, when the controller is told
	// instead; Refused is set when it answered and refused.
	Orphan  string
	Refused bool

	Summary  Summary
	Verdicts []Verdict
}

// Verdict is something that the controller must get to know. What is in it is
// agreed between those who raise and those who read it.
type Verdict struct {
	Position
	Body []byte
}

// Position names a verdict of a node, or all up to one.
type Position struct {
	Node string `json:"node"`
	// Stream tells a node's numbering from an earlier one whose record it lost: it
	// is higher.
	Stream int64  `json:"stream"`
	Seq    uint64 `json:"seq"` // from 1
}

// Ack answers a report: it has arrived at the controller, or was refused.
type Ack struct {
	Round   int64
	Refused bool
	// Stored names, for each node of whose verdicts there were some in the report,
	// the last up to which all are stored.
	Stored []Position
}

// Outbox is the verdicts of a node that the controller is not known to have.
type Outbox struct {
	Stream  int64     `json:"stream"`
	Last    uint64    `json:"last"` // the seq given last
	Pending []Verdict `json:"pending,omitempty"`
}

// drop removes what is stored, and reports whether something was.
func (o *Outbox) drop(stored Position) bool {
	n := 0
	for n < len(o.Pending) && o.Pending[n].Stream == stored.Stream && o.Pending[n].Seq <= stored.Seq {
		n++
	}
	o.Pending = o.Pending[n:]
	return n > 0
}

// add numbers a verdict.
func (o *Outbox) add(node string, body []byte) error {
	if len(body) > MaxBody {
		return fmt.Errorf("a verdict of %d bytes cannot be sent, at most %d are allowed: shorten it", len(body), MaxBody)
	}
	o.Last++
	o.Pending = append(o.Pending, Verdict{Position{node, o.Stream, o.Last}, body})
	return nil
}

// schedule is when what happens in a round. It begins at a multiple of the
// period on the controller's clock and is cut into slots:
//
//	0                    all take their sample
//	1                    the deepest report, at the latest
//	Levels-depth+1       those at depth report, at the latest
//	Levels+2             a root that has no answer repeats its report
//	Levels+2+depth       those at depth that have none tell the controller:
//	                     a slot after their parent did, if it was not at fault
//	2*Levels+4           the controller closes the round
//	2*Levels+6           the next begins, with what was assigned meanwhile
//
// A slot is time enough for a message, its answer, and what clocks differ.
type schedule struct {
	period time.Duration
	levels int
}

func (s schedule) slot() time.Duration { return s.period / time.Duration(2*s.levels+6) }

func (s schedule) round(now time.Time) int64 { return now.UnixNano() / int64(s.period) }

// at is so many slots after the beginning of a round.
func (s schedule) at(round int64, slots int) time.Time {
	return time.Unix(0, round*int64(s.period)).Add(time.Duration(slots) * s.slot())
}

func (s schedule) reportBy(round int64, depth int) time.Time {
	return s.at(round, s.levels-depth+1)
}

func (s schedule) answerBy(round int64, depth int) time.Time {
	return s.at(round, s.levels+2+depth)
}

func (s schedule) closes(round int64) time.Time { return s.at(round, 2*s.levels+4) }

// spread is when a node reports that has neither parent nor children: where all
// nodes are such, they must not all call at one instant.
func (s schedule) spread(round int64, number int) time.Time {
	const parts = 64
	return s.at(round, 0).Add(time.Duration(s.levels+1) * s.slot() * time.Duration(number%parts) / parts)
}
