package sandbox_test

import (
	"context"
	"io"
	"strings"
	"testing"

	"dormouse/agent/sandbox"
)

// ear listens to a sandbox's requests.
type ear struct {
	t      *testing.T
	heard  chan sandbox.AppRequest
	cancel context.CancelFunc
	ended  chan error
}

func (b *bench) listen(s *sandbox.Sandbox) *ear {
	ctx, cancel := context.WithCancel(b.context())
	e := &ear{t: b.t, heard: make(chan sandbox.AppRequest, 1000), cancel: cancel, ended: make(chan error, 1)}
	go func() { e.ended <- s.Listen(ctx, func(r sandbox.AppRequest) { e.heard <- r }) }()
	b.t.Cleanup(func() {
		cancel()
		if err, ok := <-e.ended; ok && err != nil {
			b.t.Errorf("Listen: %v", err)
		}
	})
	return e
}

// next waits for a request.
func (e *ear) next(b *bench) sandbox.AppRequest {
	e.t.Helper()
	select {
	case r := <-e.heard:
		return r
	case <-b.context().Done():
		e.t.Fatal("no request came")
		panic("unreachable")
	}
}

func TestAProgramAsksForACheckpoint(t *testing.T) {
	b := newBench(t)
	for _, user := range []string{"", "daemon"} {
		cfg := b.config(`dormouse-ctl checkpoint --label 'step 1'; echo $?; dormouse-ctl checkpoint -o json; dormouse-ctl status`)
		cfg.Run, cfg.User = 4, user
		s := b.start(cfg)
		e := b.listen(s)
		first := e.next(b)
		if first.Label != "step 1" || len(first.ID) < 16 {
			t.Errorf("got %+v, want the label step 1", first)
		}
		if err := s.Answer(b.context(), first.ID, sandbox.Outcome{Checkpoint: "c-one"}); err != nil {
			t.Fatal(err)
		}
		second := e.next(b)
		if second.ID == first.ID || second.Label != "" {
			t.Errorf("the second request is %+v after %+v", second, first)
		}
		for range 2 { // an answer may be repeated
			if err := s.Answer(b.context(), second.ID, sandbox.Outcome{Checkpoint: "c-two"}); err != nil {
				t.Fatal(err)
			}
		}
		b.wait(s)
		expect(t, "stdout", b.log(s, "stdout"), "checkpointed c-one\n0\n{\"checkpoint\":\"c-two\",\"restored\":false,\"run\":4}\nrun 4, from the start\n")
	}
}

func TestAProgramLearnsWhyThereIsNoCheckpoint(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config(`
dormouse-ctl checkpoint; echo $?
dormouse-ctl checkpoint; echo $?
dormouse-ctl checkpoint --timeout 500ms; echo $?
dormouse-ctl checkpoint --label "$(head -c 300 /dev/zero | tr '\0' a)"; echo $?
dormouse-ctl nonsense; echo $?
dormouse-ctl status --label x; echo $?`))
	e := b.listen(s)
	for _, o := range []sandbox.Outcome{{Failure: "the disk is full"}, {Failure: "a socket leaves the job", Refused: true}} {
		if err := s.Answer(b.context(), e.next(b).ID, o); err != nil {
			t.Fatal(err)
		}
	}
	late := e.next(b)
	b.wait(s)
	expect(t, "stdout", b.log(s, "stdout"), "1\n4\n5\n4\n2\n2\n")
	for _, words := range []string{"the disk is full", "a socket leaves the job", "no answer after 500ms", "at most 256 bytes"} {
		contains(t, "stderr", b.log(s, "stderr"), words)
	}
	if late.ID == "" {
		t.Error("the request that timed out had not come")
	}
}

func TestUnansweredRequestsComeAgain(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config(`dormouse-ctl checkpoint --label x`))
	e := b.listen(s)
	first := e.next(b)
	if err := s.Quiesce(b.context()); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-e.heard:
		t.Errorf("%+v came while quiesced", r)
	default:
	}
	if err := s.Unquiesce(b.context()); err != nil {
		t.Fatal(err)
	}
	if again := e.next(b); again != first {
		t.Errorf("after a quiesce: %+v, want %+v", again, first)
	}
	e.cancel()
	if err := <-e.ended; err != nil {
		t.Errorf("Listen: %v", err)
	}
	close(e.ended)
	// The next agent.
	opened, err := b.newRuntime().Open(b.context(), s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if again := b.listen(opened).next(b); again != first {
		t.Errorf("after a restart of the agent: %+v, want %+v", again, first)
	}
	if err := opened.Answer(b.context(), first.ID, sandbox.Outcome{Checkpoint: "c-x"}); err != nil {
		t.Fatal(err)
	}
	b.wait(s)
	expect(t, "stdout", b.log(s, "stdout"), "checkpointed c-x\n")
}

func TestListenEndsWithTheSandbox(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config("exec sleep 1000"))
	e := b.listen(s)
	if err := s.Quiesce(b.context()); err != nil { // ends also while it waits
		t.Fatal(err)
	}
	if err := s.Destroy(b.context(), sandbox.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := <-e.ended; err != nil {
		t.Errorf("Listen: %v", err)
	}
	close(e.ended)
}

func TestTheCopyKnowsThatItWasRestored(t *testing.T) {
	engine := newEngine(t)
	b := newBench(t)
	cfg := b.config(`dormouse-ctl checkpoint; dormouse-ctl status; echo checkpoint by file > /.dormouse/control; until grep file /.dormouse/control.log; do sleep 0.01; done; dormouse-ctl checkpoint -o json`)
	cfg.Run = 1
	original := b.start(cfg)
	e := b.listen(original)
	request := e.next(b)
	saved := image{images: t.TempDir(), upper: b.dir + "/saved", config: original.Config()}
	if err := b.dump(engine, original, saved); err != nil {
		t.Fatal(err)
	}
	if again := e.next(b); again != request {
		t.Errorf("after the checkpoint %+v came, want %+v", again, request)
	}
	if err := original.Answer(b.context(), request.ID, sandbox.Outcome{Checkpoint: "c-one"}); err != nil {
		t.Fatal(err)
	}
	b.logs(original, "checkpointed c-one\nrun 1, from the start\n")

	restored := b.resume(engine, saved)
	for range 2 { // it may be repeated
		if err := restored.Restored(b.context(), "c-one", 2); err != nil {
			t.Fatal(err)
		}
	}
	ear := b.listen(restored)
	byFile := ear.next(b)
	if byFile.Label != "by file" || byFile.ID == request.ID {
		t.Errorf("the copy asks %+v, want a new request by file", byFile)
	}
	third := b.resume(engine, b.suspend(engine, restored))
	if err := third.Restored(b.context(), "c-two", 5); err != nil {
		t.Fatal(err)
	}
	last := b.listen(third).next(b)
	if err := third.Answer(b.context(), last.ID, sandbox.Outcome{Checkpoint: "c-three"}); err != nil {
		t.Fatal(err)
	}
	b.wait(third)
	expect(t, "stdout", b.log(third, "stdout"), `restored c-one
run 2, restored from c-one
{"label":"by file","checkpoint":"c-two","restored":true,"run":5}
{"checkpoint":"c-three","restored":false,"run":5}
`)
}

func TestTheControlFifoAnswersInItsLog(t *testing.T) {
	b := newBench(t)
	cfg := b.config(`
head -c 5000 /dev/zero | tr '\0' a > /.dormouse/control
echo > /.dormouse/control
echo nonsense > /.dormouse/control
printf 'checkpoint   a label  \n' > /.dormouse/control
until test "$(wc -l < /.dormouse/control.log)" = 3; do sleep 0.01; done
cat /.dormouse/control.log`)
	cfg.User, cfg.Run = "daemon", 1
	s := b.start(cfg)
	request := b.listen(s).next(b)
	expect(t, "label", request.Label, "a label")
	if err := s.Answer(b.context(), request.ID, sandbox.Outcome{Checkpoint: "c-file"}); err != nil {
		t.Fatal(err)
	}
	b.wait(s)
	lines := strings.Split(b.log(s, "stdout"), "\n")
	if len(lines) != 4 {
		t.Fatalf("the log has %d lines: %q", len(lines)-1, lines)
	}
	contains(t, "a line that is too long", lines[0], `"refused":true`)
	contains(t, "a line without meaning", lines[1], `"refused":true`)
	expect(t, "the request", lines[2], `{"label":"a label","checkpoint":"c-file","restored":false,"run":1}`)
}

func TestTooManyRequestsAreRefused(t *testing.T) {
	b := newBench(t)
	s := b.start(b.config(`
for i in $(seq 70); do (dormouse-ctl checkpoint --label $i > /tmp/$i 2>&1; echo $? >> /tmp/$i) & done
wait
cat /tmp/[0-9]* | sort | uniq -c | sort -rn`))
	e := b.listen(s)
	for range 64 {
		e.next(b)
	}
	b.eventually("the rest is refused", func() bool {
		_, out, _ := b.exec(s, "cat /tmp/[0-9]* | grep -c '^1$'")
		return strings.TrimSpace(out) == "6"
	})
	if err := s.Restored(b.context(), "c-all", 1); err != nil {
		t.Fatal(err)
	}
	b.wait(s)
	contains(t, "stdout", b.log(s, "stdout"), "64 restored c-all")
}

func TestAProgramSaysHowFarItHasCome(t *testing.T) {
	b := newBench(t)
	cfg := b.config(`dormouse-ctl progress 12345; echo $?; read x < /.dormouse/progress; echo $x; dormouse-ctl progress 7; dormouse-ctl progress all; echo $?`)
	cfg.User = "daemon"
	s := b.start(cfg)
	b.wait(s)
	expect(t, "stdout", b.log(s, "stdout"), "0\n12345\n2\n")
	file, err := s.OpenProgress()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	said, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "progress", string(said), "7\n")
}
