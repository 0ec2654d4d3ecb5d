package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// apps answers the programs of the task: on a socket (dormouse-ctl) and from a
// fifo. What they ask for is passed on to the agent, over whichever connection
// the agent listens on, and waits here for its answer. All of that is memory of
// this process, so requests are in every checkpoint: a restored copy finds them
// there and is told what it was restored from.
type apps struct {
	socket *os.File
	fifo   *os.File

	mu      sync.Mutex
	changed *sync.Cond // a request came, or a listener is to stop
	calls   int        // connections
	run     int64
	from    string
	last    uint64
	pending map[uint64]*appRequest // by the order in which they came
}

// appRequest waits for its answer.
type appRequest struct {
	pid1.AppRequest
	answer chan pid1.Answer
}

// callTime is how long a program may take to say what it wants.
const callTime = time.Minute

// maxControlLog bounds ControlLog, in bytes.
const maxControlLog = 1 << 20

func listenApps(run int64) (*apps, error) {
	socket, err := listenUnix(inside(pid1.AppSocket), 0o666)
	if err != nil {
		return nil, err
	}
	fifo, err := openFifo(inside(pid1.ControlFifo))
	if err != nil {
		return nil, err
	}
	a := &apps{socket: socket, fifo: fifo, run: run, pending: map[uint64]*appRequest{}}
	a.changed = sync.NewCond(&a.mu)
	return a, nil
}

// openFifo makes a fifo that everyone may write to.
func openFifo(path string) (*os.File, error) {
	err := syscall.Mkfifo(path, 0o622)
	if err == nil {
		err = os.Chmod(path, 0o622) // the mode given was cut by the umask
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make the fifo %s: %w", path, err)
	}
	// fifo(7): opened for both, it has no end of file when a writer goes.
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the fifo %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// serve answers programs for the life of the process.
func (a *apps) serve() {
	acceptAll(a.socket, func(link *conn) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.calls == pid1.MaxApps {
			_ = link.file.Close()
			return
		}
		a.calls++
		go a.call(link)
	})
}

func (a *apps) call(link *conn) {
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.calls--
	}()
	defer link.file.Close()
	answer, err := a.do(link)
	if err != nil {
		_ = link.sendJSON(pid1.FrameFailure, failureOf(err))
		return
	}
	_ = link.sendJSON(pid1.FrameOK, answer)
}

// do carries out one call.
func (a *apps) do(link *conn) (any, error) {
	link.limit = pid1.MaxAppCall
	if err := link.file.SetDeadline(time.Now().Add(callTime)); err != nil {
		return nil, err
	}
	payload, err := link.want(pid1.FrameRequest)
	if err != nil {
		return nil, err
	}
	if err := link.file.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	var call pid1.AppCall
	if err := json.Unmarshal(payload, &call); err != nil {
		return nil, pid1.Refuse("the call cannot be understood: %v", err)
	}
	switch call.Op {
	case pid1.AppStatus:
		return a.status(), nil
	case pid1.AppCheckpoint:
		return a.checkpoint(link, call.Label)
	}
	return nil, pid1.Refuse("pid 1 of this sandbox does not know the call %.64q", call.Op)
}

func (a *apps) status() pid1.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return pid1.Status{Run: a.run, From: a.from}
}

// checkpoint asks for one and waits for the answer, or until the asker is gone.
func (a *apps) checkpoint(link *conn, label string) (*pid1.Answer, error) {
	number, request, err := a.ask(label)
	if err != nil {
		return nil, err
	}
	defer a.withdraw(number)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _, _ = link.read() // it has nothing to say: this is its end
	}()
	select {
	case answer := <-request.answer:
		return &answer, nil
	case <-gone:
		return nil, io.EOF
	}
}

// ask enters a request.
func (a *apps) ask(label string) (uint64, *appRequest, error) {
	if len(label) > pid1.MaxLabel || !utf8.ValidString(label) || strings.ContainsFunc(label, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return 0, nil, pid1.Refuse("a label is UTF-8 text of at most %d bytes without control characters", pid1.MaxLabel)
	}
	id := make([]byte, 16)
	if _, err := unix.Getrandom(id, 0); err != nil {
		return 0, nil, fmt.Errorf("cannot name the request: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.pending) >= pid1.MaxApps {
		return 0, nil, fmt.Errorf("%d requests wait for a checkpoint already", pid1.MaxApps)
	}
	request := &appRequest{pid1.AppRequest{ID: hex.EncodeToString(id), Label: label}, make(chan pid1.Answer, 1)}
	a.last++
	a.pending[a.last] = request
	a.changed.Broadcast()
	return a.last, request, nil
}

func (a *apps) withdraw(number uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.pending, number)
}

// answer ends a request. One that is not there was withdrawn.
func (a *apps) answer(id string, o *pid1.Outcome) error {
	if o == nil {
		return pid1.Refuse("the answer has no outcome")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for number, request := range a.pending {
		if request.ID == id {
			request.answer <- pid1.Answer{Label: request.Label, Checkpoint: o.Checkpoint, Run: a.run, Error: o.Failure, Refused: o.Refused}
			delete(a.pending, number)
		}
	}
	return nil
}

// restored makes this the copy that was restored as the given run: what was
// asked for in the captured one is answered by that. Repeated, it does nothing.
func (a *apps) restored(run int64, o *pid1.Outcome) error {
	if o == nil {
		return pid1.Refuse("the restore names no checkpoint")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if run <= a.run {
		return nil
	}
	a.run, a.from = run, o.Checkpoint
	for number, request := range a.pending {
		request.answer <- pid1.Answer{Label: request.Label, Checkpoint: o.Checkpoint, Restored: true, Run: run}
		delete(a.pending, number)
	}
	return nil
}

// tell serves an agent that listens, until it quiesces or is gone.
func (a *apps) tell(link *conn) {
	stopped := make(chan stop, 1)
	go func() {
		stopped <- awaitQuiesce(link) // at the latest when link is closed
		a.mu.Lock()
		defer a.mu.Unlock()
		a.changed.Broadcast()
	}()
	if err := link.sendJSON(pid1.FrameOK, pid1.OK{}); err != nil {
		return
	}
	for told := uint64(0); ; {
		request, number := a.next(told, func() bool { return len(stopped) > 0 })
		if request == nil {
			break
		}
		if err := link.sendJSON(pid1.FrameApp, request); err != nil {
			return
		}
		told = number
	}
	if <-stopped == stopQuiesce {
		_ = link.send(pid1.FrameDetached, nil)
	}
}

// next waits for the first request after number told, or until stopped: then
// there is none.
func (a *apps) next(told uint64, stopped func() bool) (*pid1.AppRequest, uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for !stopped() {
		for told < a.last {
			told++
			if request := a.pending[told]; request != nil {
				return &request.AppRequest, told
			}
		}
		a.changed.Wait()
	}
	return nil, told
}

func awaitQuiesce(link *conn) stop {
	for {
		kind, _, err := link.read()
		if err != nil {
			return stopLost
		}
		if kind == pid1.FrameQuiesce {
			return stopQuiesce
		}
	}
}

// readFifo takes requests from the fifo: lines of `checkpoint [LABEL]`. They are
// answered in ControlLog.
func (a *apps) readFifo() {
	lines := bufio.NewReaderSize(a.fifo, 1024)
	for {
		line, tooLong, err := lines.ReadLine()
		if err != nil {
			fmt.Fprintln(os.Stderr, "the control fifo failed:", err)
			return
		}
		text := string(line)
		for tooLong && err == nil {
			_, tooLong, err = lines.ReadLine()
			text = "a line that is too long"
		}
		if text = strings.TrimSpace(text); text != "" {
			a.takeLine(text)
		}
	}
}

func (a *apps) takeLine(line string) {
	word, label, _ := strings.Cut(line, " ")
	err := error(pid1.Refuse("a line written to this fifo is `checkpoint [LABEL]`"))
	if word == string(pid1.AppCheckpoint) {
		var request *appRequest
		if _, request, err = a.ask(strings.TrimSpace(label)); err == nil {
			go func() { a.logAnswer(<-request.answer) }()
			return
		}
	}
	a.logAnswer(pid1.Answer{Run: a.status().Run, Error: err.Error(), Refused: true})
}

// logAnswer appends to ControlLog. Nobody can be told when that fails, and a
// full disk is no reason to end.
func (a *apps) logAnswer(answer pid1.Answer) {
	content, err := json.Marshal(answer)
	if err != nil {
		return
	}
	path := inside(pid1.ControlLog)
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if info, err := os.Stat(path); err == nil && info.Size() > maxControlLog {
		flags |= os.O_TRUNC
	}
	file, err := os.OpenFile(path, flags, 0o644)
	if err == nil {
		_, err = file.Write(append(content, '\n'))
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot answer in the control log:", err)
	}
}
