package main

import (
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"dormouse/agent/sandbox/pid1"
)

func newApps() *apps {
	a := &apps{run: 1, pending: map[uint64]*appRequest{}}
	a.changed = sync.NewCond(&a.mu)
	return a
}

func TestARestoreAnswersWhatIsPendingOnce(t *testing.T) {
	a := newApps()
	_, before, err := a.ask("before")
	if err != nil {
		t.Fatal(err)
	}
	restored := &pid1.Outcome{Checkpoint: "c-one"}
	if err := a.restored(2, restored); err != nil {
		t.Fatal(err)
	}
	if got, want := <-before.answer, (pid1.Answer{Label: "before", Checkpoint: "c-one", Restored: true, Run: 2}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	_, after, err := a.ask("after")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.restored(2, restored); err != nil {
		t.Fatal(err)
	}
	if len(after.answer) != 0 {
		t.Error("a restore that was told twice answers what came between")
	}
	if err := a.answer(after.ID, &pid1.Outcome{Checkpoint: "c-two"}); err != nil {
		t.Fatal(err)
	}
	if got, want := <-after.answer, (pid1.Answer{Label: "after", Checkpoint: "c-two", Run: 2}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, want := a.status(), (pid1.Status{Run: 2, From: "c-one"}); got != want {
		t.Errorf("status %+v, want %+v", got, want)
	}
}

func TestRequestsComeInOrderAndWithdrawnOnesDoNot(t *testing.T) {
	a := newApps()
	var numbers []uint64
	for _, label := range []string{"a", "b", "c"} {
		number, _, err := a.ask(label)
		if err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, number)
	}
	a.withdraw(numbers[1])
	never := func() bool { return false }
	var labels string
	told := uint64(0)
	for range 2 {
		request, number := a.next(told, never)
		labels, told = labels+request.Label, number
	}
	if labels != "ac" {
		t.Errorf("the agent hears %q, want ac", labels)
	}
	if request, _ := a.next(told, func() bool { return true }); request != nil {
		t.Errorf("one that stops hears %+v", request)
	}
}

func FuzzLabel(f *testing.F) {
	f.Add("step 1")
	f.Add("a\nb")
	f.Fuzz(func(t *testing.T, label string) {
		_, request, err := newApps().ask(label)
		if err == nil && (len(request.Label) > pid1.MaxLabel || !utf8.ValidString(request.Label) || strings.ContainsAny(request.Label, "\n\r\x00\x1b")) {
			t.Errorf("the label %q was taken", label)
		}
	})
}
