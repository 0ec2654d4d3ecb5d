package tree

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"dormouse/api/agentpb"
)

// maxLevels bounds what is taken for a depth.
const maxLevels = 64

// Proto is the assignment on the wire.
func (a Assignment) Proto() *agentpb.TreeAssignment {
	return &agentpb.TreeAssignment{
		Epoch: a.Epoch, Number: int32(a.Number), Parent: a.Parent, ParentAddress: a.ParentAddress,
		Depth: int32(a.Depth), Levels: int32(a.Levels), Children: a.Children, PeriodMs: a.Period.Milliseconds(),
	}
}

// AssignmentFrom reads an assignment, and refuses one that cannot be.
func AssignmentFrom(p *agentpb.TreeAssignment) (Assignment, error) {
	a := Assignment{
		Epoch: p.GetEpoch(), Number: int(p.GetNumber()), Parent: p.GetParent(), ParentAddress: p.GetParentAddress(),
		Depth: int(p.GetDepth()), Levels: int(p.GetLevels()), Children: p.GetChildren(),
		Period: time.Duration(p.GetPeriodMs()) * time.Millisecond,
	}
	if a.Number < 0 || a.Depth < 0 || a.Depth > a.Levels || a.Levels > maxLevels || a.Period <= 0 || a.Period > 24*time.Hour {
		return Assignment{}, fmt.Errorf("place %d at depth %d of %d with a period of %s is none in a tree: controller and agent are of different versions", a.Number, a.Depth, a.Levels, a.Period)
	}
	return a, nil
}

// Proto is the report on the wire.
func (r Report) Proto() *agentpb.TreeReport {
	p := &agentpb.TreeReport{
		Round: r.Round, Depth: int32(r.Depth), OrphanOf: r.Orphan, Refused: r.Refused, Summary: r.Summary.proto(),
	}
	for _, v := range r.Verdicts {
		p.Verdicts = append(p.Verdicts, v.proto())
	}
	return p
}

// ReportFrom reads a report, and refuses one that is out of bounds.
func ReportFrom(p *agentpb.TreeReport) (Report, error) {
	r := Report{
		Round: p.GetRound(), Depth: int(p.GetDepth()), Orphan: p.GetOrphanOf(), Refused: p.GetRefused(),
		Summary: summaryFrom(p.GetSummary()),
	}
	if size := proto.Size(p); size > MaxReport {
		return Report{}, fmt.Errorf("a report has %d bytes, at most %d are allowed", size, MaxReport)
	}
	if err := r.Summary.Check(); err != nil {
		return Report{}, err
	}
	for _, v := range p.GetVerdicts() {
		if len(v.GetBody()) > MaxBody {
			return Report{}, fmt.Errorf("verdict %d of %s has %d bytes, at most %d are allowed", v.GetSeq(), v.GetNode(), len(v.GetBody()), MaxBody)
		}
		r.Verdicts = append(r.Verdicts, Verdict{Position{v.GetNode(), v.GetStream(), v.GetSeq()}, v.GetBody()})
	}
	return r, nil
}

// Proto is the answer on the wire.
func (a Ack) Proto() *agentpb.TreeAck {
	p := &agentpb.TreeAck{Round: a.Round, Refused: a.Refused}
	for _, s := range a.Stored {
		p.Stored = append(p.Stored, &agentpb.TreePosition{Node: s.Node, Stream: s.Stream, Seq: s.Seq})
	}
	return p
}

// AckFrom reads an answer.
func AckFrom(p *agentpb.TreeAck) Ack {
	a := Ack{Round: p.GetRound(), Refused: p.GetRefused()}
	for _, s := range p.GetStored() {
		a.Stored = append(a.Stored, Position{s.GetNode(), s.GetStream(), s.GetSeq()})
	}
	return a
}

func (v Verdict) proto() *agentpb.TreeVerdict {
	return &agentpb.TreeVerdict{Node: v.Node, Stream: v.Stream, Seq: v.Seq, Body: v.Body}
}

// size is what the verdict adds to a report.
func (v Verdict) size() int {
	return protowire.SizeTag(6) + protowire.SizeBytes(proto.Size(v.proto()))
}

func (s Summary) proto() *agentpb.TreeSummary {
	p := &agentpb.TreeSummary{Nodes: s.Nodes}
	for _, t := range s.Tables {
		table := &agentpb.TreeTable{Rest: t.Rest, Floor: t.Floor}
		for _, r := range t.Rows {
			table.Rows = append(table.Rows, &agentpb.TreeRow{Key: r.Key, Values: r.Values})
		}
		p.Tables = append(p.Tables, table)
	}
	for _, h := range s.Histograms {
		p.Histograms = append(p.Histograms, &agentpb.TreeHistogram{Counts: h.Counts})
	}
	return p
}

func summaryFrom(p *agentpb.TreeSummary) Summary {
	s := Summary{Nodes: p.GetNodes()}
	for _, t := range p.GetTables() {
		table := Table{Rest: t.GetRest(), Floor: t.GetFloor()}
		for _, r := range t.GetRows() {
			table.Rows = append(table.Rows, Row{Key: r.GetKey(), Values: r.GetValues()})
		}
		s.Tables = append(s.Tables, table)
	}
	for _, h := range p.GetHistograms() {
		s.Histograms = append(s.Histograms, Histogram{Counts: h.GetCounts()})
	}
	return s
}
