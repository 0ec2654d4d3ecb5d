package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"
)

// Exit statuses of dormouse-ctl, which are those of dormouse.
const (
	ctlDone     = 0
	ctlFailed   = 1
	ctlUsage    = 2
	ctlRefused  = 4
	ctlTimedOut = 5
)

const ctlHelp = `dormouse-ctl asks the Dormouse that runs this task.

  dormouse-ctl checkpoint [--label TEXT] [--timeout DURATION] [-o json]

      Takes a checkpoint of the whole job and returns when it is durable. Prints

          checkpointed CHECKPOINT    in the run that asked, which goes on
          restored CHECKPOINT        in a run that was restored from a checkpoint
                                     taken meanwhile, and goes on from here

      Example: dormouse-ctl checkpoint --label "step $i" --timeout 10m

  dormouse-ctl status [-o json]

      Prints which run of the job this is, and the checkpoint it was restored from.

  dormouse-ctl progress NUMBER

      Says how far the task has come, in units of its own. The monitor compares the
      rate with that of earlier; it need not be called more than once a second.
      Writing the number to the file /.dormouse/progress does the same.

Exit status: 0 done, 1 failed, 2 usage, 4 refused, 5 timed out.
`

// ctlCall is a command line of dormouse-ctl.
type ctlCall struct {
	pid1.AppCall
	timeout time.Duration // 0: for ever
	json    bool
	help    bool
	// progress is set when that is to be said, which needs nobody's answer.
	progress string
}

// controller is dormouse-ctl.
func controller(args []string) int {
	beCapturable(pid1.Controller)
	call, err := parseCtl(args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n%s", pid1.Controller, err, ctlHelp)
		return ctlUsage
	}
	if call.help {
		fmt.Print(ctlHelp)
		return ctlDone
	}
	run := call.run
	if call.progress != "" {
		run = call.sayProgress
	}
	code, err := run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", pid1.Controller, err)
	}
	return code
}

func parseCtl(args []string) (*ctlCall, error) {
	call := &ctlCall{}
	for len(args) > 0 {
		name, value, inline := strings.Cut(args[0], "=")
		args = args[1:]
		if strings.HasPrefix(name, "-o") && len(name) > 2 {
			name, value, inline = "-o", name[2:], true
		}
		switch name {
		case "-h", "--help", "help":
			call.help = true
			return call, nil
		case string(pid1.AppCheckpoint), string(pid1.AppStatus):
			if call.Op != "" || inline {
				return nil, errors.New("one command is given at a time")
			}
			call.Op = pid1.AppOp(name)
			continue
		case progressWord:
			if call.Op != "" || inline || len(args) != 1 {
				return nil, errors.New("progress is followed by one number")
			}
			return call, call.setProgress(args[0])
		case "--label", "--timeout", "-o", "--output":
		default:
			return nil, fmt.Errorf("there is no %q", name)
		}
		if !inline {
			if len(args) == 0 {
				return nil, fmt.Errorf("%s needs a value", name)
			}
			value, args = args[0], args[1:]
		}
		if err := call.set(name, value); err != nil {
			return nil, err
		}
	}
	if call.Op == "" {
		return nil, errors.New("no command was given")
	}
	if call.Op != pid1.AppCheckpoint && (call.Label != "" || call.timeout != 0) {
		return nil, errors.New("--label and --timeout belong to checkpoint")
	}
	return call, nil
}

// progressWord is the command that says how far the task has come.
const progressWord = "progress"

func (c *ctlCall) setProgress(text string) error {
	value, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(value) || math.IsInf(value, 0) {
		return fmt.Errorf("progress is a number, not %q", text)
	}
	c.progress = text
	return nil
}

// sayProgress writes the progress file. Whoever reads it meanwhile sees nothing
// or all of it.
func (c *ctlCall) sayProgress() (int, error) {
	path := inside(pid1.ProgressFile)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return ctlFailed, fmt.Errorf("there is no %s: this is no Dormouse task, or was started by a version without progress", path)
	}
	if err == nil {
		_, err = file.WriteString(c.progress + "\n")
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return ctlFailed, fmt.Errorf("cannot say how far the task has come: %w", err)
	}
	return ctlDone, nil
}

func (c *ctlCall) set(option, value string) (err error) {
	switch option {
	case "--label":
		c.Label = value
	case "--timeout":
		if c.timeout, err = time.ParseDuration(value); err != nil || c.timeout <= 0 {
			return fmt.Errorf("--timeout is a duration such as 90s or 10m, not %q", value)
		}
	default:
		if value != "json" {
			return fmt.Errorf("-o knows json only, not %q", value)
		}
		c.json = true
	}
	return nil
}

// run makes the call and prints its answer.
func (c *ctlCall) run() (int, error) {
	payload, err := c.ask()
	var failure *pid1.Failure
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctlTimedOut, fmt.Errorf("there is no answer after %v; the checkpoint may still be taken", c.timeout)
	case errors.As(err, &failure) && failure.Kind == pid1.KindRequest:
		return ctlRefused, err
	case err != nil:
		return ctlFailed, err
	case c.Op == pid1.AppStatus:
		return c.printStatus(payload)
	}
	return c.printAnswer(payload)
}

// ask returns what pid 1 answers.
func (c *ctlCall) ask() ([]byte, error) {
	path := inside(pid1.AppSocket)
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket: %w", err)
	}
	err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
	if err == nil {
		err = syscall.SetNonblock(fd, true)
	}
	link := &conn{file: os.NewFile(uintptr(fd), path), limit: pid1.MaxFrame}
	defer link.file.Close()
	if err != nil {
		return nil, fmt.Errorf("cannot reach the pid 1 of a Dormouse task at %s: %w", path, err)
	}
	if c.timeout > 0 {
		if err := link.file.SetDeadline(time.Now().Add(c.timeout)); err != nil {
			return nil, err
		}
	}
	if err := link.sendJSON(pid1.FrameRequest, c.AppCall); err != nil {
		return nil, fmt.Errorf("cannot ask pid 1: %w", err)
	}
	kind, payload, err := link.read()
	switch {
	case err != nil:
		return nil, fmt.Errorf("pid 1 did not answer: %w", err)
	case kind == pid1.FrameFailure:
		return nil, failureIn(payload)
	case kind != pid1.FrameOK:
		return nil, fmt.Errorf("pid 1 answered with frame %d", kind)
	}
	return payload, nil
}

func (c *ctlCall) printStatus(payload []byte) (int, error) {
	var status pid1.Status
	if err := json.Unmarshal(payload, &status); err != nil {
		return ctlFailed, fmt.Errorf("the answer cannot be understood: %w", err)
	}
	switch {
	case c.json:
		fmt.Printf("%s\n", payload)
	case status.From != "":
		fmt.Printf("run %d, restored from %s\n", status.Run, status.From)
	default:
		fmt.Printf("run %d, from the start\n", status.Run)
	}
	return ctlDone, nil
}

func (c *ctlCall) printAnswer(payload []byte) (int, error) {
	var answer pid1.Answer
	if err := json.Unmarshal(payload, &answer); err != nil {
		return ctlFailed, fmt.Errorf("the answer cannot be understood: %w", err)
	}
	if c.json {
		fmt.Printf("%s\n", payload)
	}
	switch {
	case answer.Refused:
		return ctlRefused, errors.New(answer.Error)
	case answer.Error != "":
		return ctlFailed, errors.New(answer.Error)
	case c.json:
	case answer.Restored:
		fmt.Println("restored", answer.Checkpoint)
	default:
		fmt.Println("checkpointed", answer.Checkpoint)
	}
	return ctlDone, nil
}
