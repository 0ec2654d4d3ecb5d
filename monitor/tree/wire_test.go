package tree

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"dormouse/api/agentpb"
)

func TestMessagesSurviveTheWire(t *testing.T) {
	r := Report{Round: 7, Depth: 2, Orphan: "p", Refused: true,
		Summary: Summary{Nodes: SetOf(1, 9), Tables: []Table{{Rows: []Row{{"j", []uint64{1, 2}}}, Rest: []uint64{3}, Floor: 4}},
			Histograms: []Histogram{{Counts: []uint64{5, 0, 6}}}},
		Verdicts: []Verdict{{Position{"n", 8, 9}, []byte("starved")}},
	}
	if got, err := ReportFrom(sent(t, r.Proto(), &agentpb.TreeReport{})); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("a report comes as %+v (%v), want %+v", got, err, r)
	}
	a := Ack{Round: 7, Refused: true, Stored: []Position{{"n", 8, 9}}}
	if got := AckFrom(sent(t, a.Proto(), &agentpb.TreeAck{})); !reflect.DeepEqual(got, a) {
		t.Errorf("an answer comes as %+v, want %+v", got, a)
	}
	p := Assignment{Epoch: 1, Number: 2, Parent: "p", ParentAddress: "10.0.0.1:7", Depth: 3, Levels: 4, Children: []string{"c"}, Period: 5 * time.Second}
	if got, err := AssignmentFrom(sent(t, p.Proto(), &agentpb.TreeAssignment{})); err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("a place comes as %+v (%v), want %+v", got, err, p)
	}
}

func sent[M proto.Message](t *testing.T, from, to M) M {
	t.Helper()
	b, err := proto.Marshal(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, to); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestPlacesThatCannotBeAreRefused(t *testing.T) {
	good := Assignment{Depth: 1, Levels: 2, Period: time.Second}
	for name, spoil := range map[string]func(*Assignment){
		"number": func(a *Assignment) { a.Number = -1 },
		"depth":  func(a *Assignment) { a.Depth = 3 },
		"above":  func(a *Assignment) { a.Depth = -1 },
		"levels": func(a *Assignment) { a.Levels = maxLevels + 1 },
		"period": func(a *Assignment) { a.Period = 0 },
	} {
		bad := good
		spoil(&bad)
		if _, err := AssignmentFrom(bad.Proto()); err == nil {
			t.Errorf("%s: %+v is taken", name, bad)
		}
	}
}

// fullSummary has everything there may be in one, as large as it can be.
func fullSummary(nodes int) Summary {
	var s Summary
	values := make([]uint64, MaxValues)
	for i := range values {
		values[i] = math.MaxUint64
	}
	for range MaxTables {
		t := Table{Rest: values, Floor: math.MaxUint64}
		for row := range MaxRows {
			t.Rows = append(t.Rows, Row{Key: fmt.Sprintf("%03d%s", row, strings.Repeat("k", MaxKey-3)), Values: values})
		}
		s.Tables = append(s.Tables, t)
	}
	for range MaxHistograms {
		h := Histogram{Counts: make([]uint64, maxBuckets)}
		for i := range h.Counts {
			h.Counts[i] = math.MaxUint64
		}
		s.Histograms = append(s.Histograms, h)
	}
	all := make([]int, nodes)
	for i := range all {
		all[i] = i
	}
	s.Nodes = SetOf(all...)
	return s
}

func TestTheLargestSummaryLeavesRoomForVerdicts(t *testing.T) {
	s := fullSummary(10000)
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	if size := proto.Size(s.proto()); size > 128<<10+10000/8 {
		t.Errorf("it has %d bytes, more than MaxRows says", size)
	}
}

func TestReportsOutOfBoundsAreRefused(t *testing.T) {
	for name, r := range map[string]Report{
		"summary": {Summary: Summary{Tables: make([]Table, MaxTables+1)}},
		"verdict": {Verdicts: []Verdict{{Body: make([]byte, MaxBody+1)}}},
		"size":    {Verdicts: make([]Verdict, MaxReport)},
	} {
		if _, err := ReportFrom(r.Proto()); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}

// Whatever a peer sends is refused or can be merged with a full summary and
// still be sent on.
func FuzzReportFrom(f *testing.F) {
	full := fullSummary(9)
	small := Summary{Nodes: SetOf(3), Tables: []Table{Rows(map[string][]uint64{"n": {1, 2}})}, Histograms: []Histogram{{Counts: []uint64{0, 1}}}}
	for _, r := range []Report{{}, {Summary: small, Verdicts: []Verdict{{Position{"n", 1, 1}, []byte("x")}}}} {
		b, err := proto.Marshal(r.Proto())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p agentpb.TreeReport
		if proto.Unmarshal(b, &p) != nil {
			return
		}
		r, err := ReportFrom(&p)
		if err != nil {
			return
		}
		merged := r.Summary.Merge(full)
		if err := merged.Check(); err != nil {
			t.Fatal(err)
		}
	})
}
