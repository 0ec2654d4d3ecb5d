package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"dormouse/client"
)

func (c *cli) execCommand() *cobra.Command {
	request, interactive := client.ExecRequest{}, false
	env := []string{}
	command := &cobra.Command{
		Use:   "exec JOB [flags] -- COMMAND [ARG...]",
		Short: "Run a command inside a running job",
		Long: `Run a command in the sandbox of a running task, and exit with its status.

When standard input is a terminal, the command gets a terminal and your input.
Otherwise it gets your input only with -i.

A checkpoint captures the command with the job, and it goes on here; but once the
job was restored, what runs there has nobody to talk to: its terminal or its pipes
hang up.`,
		Example: `  dormouse exec counter -- ps aux
  dormouse exec counter -- bash
  dormouse exec solver --task 2 -- hostname
  dormouse exec -i db -- redis-cli --pipe < commands`,
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return usagef("JOB is missing")
			case len(args) == 1:
				return usagef("there is no command: give it after --, as in `dormouse exec %s -- ps`", args[0])
			case request.Task < 0:
				return usagef("tasks are numbered from 0, so there is no task %d", request.Task)
			}
			request.Command = args[1:]
			for _, text := range env {
				key, value, err := parseEnv(text, c.getenv)
				if err != nil {
					return usagef("%v", err)
				}
				request.Env = append(request.Env, key+"="+value)
			}
			return c.exec(command, args[0], request, interactive)
		},
	}
	set := command.Flags()
	set.IntVar(&request.Task, "task", 0, "`number` of the task to run in")
	mustComplete(command, "task", c.tasks())
	set.BoolVarP(&interactive, "interactive", "i", false, "pass on standard input")
	set.BoolVarP(&request.TTY, "tty", "t", false, "give the command a terminal")
	set.StringArrayVarP(&env, "env", "e", nil, "environment variable `NAME=VALUE`, or NAME to pass on yours (may be repeated)")
	return command
}

func (c *cli) exec(command *cobra.Command, job string, request client.ExecRequest, interactive bool) error {
	if c.json() {
		return usagef("exec passes on the command's own output, which -o json cannot hold")
	}
	screen := terminalOf(c.in, c.out)
	changed := command.Flags().Changed
	if screen != nil {
		interactive = interactive || !changed("interactive")
		request.TTY = request.TTY || !changed("tty")
	}
	if request.TTY && interactive && screen == nil {
		return usagef("standard input is not a terminal: leave out --tty")
	}
	ctx, cancel := context.WithCancel(command.Context())
	defer cancel()
	if request.TTY && screen != nil {
		request.Rows, request.Cols = screen.size()
		request.Env = append(request.Env, "TERM="+firstOf(c.getenv("TERM"), "xterm"))
	}
	controller, err := c.connect()
	if err != nil {
		return err
	}
	defer controller.Close()
	session, err := controller.Exec(ctx, job, request)
	if err != nil {
		return err
	}
	defer session.Close()
	stop := context.AfterFunc(ctx, func() { session.Close() })
	defer stop()
	if request.TTY && screen != nil {
		restore, err := screen.raw()
		if err != nil {
			return err
		}
		defer restore()
		defer screen.watch(session)()
	}
	status, err := c.relay(session, interactive)
	if command.Context().Err() != nil {
		return command.Context().Err()
	}
	if err != nil {
		return err
	}
	if status != 0 {
		return &statusError{status}
	}
	return nil
}

// relay carries input and output until the command has ended. A read of the
// input that still blocks then is left to end with the process.
func (c *cli) relay(session *client.Session, interactive bool) (int, error) {
	if interactive {
		go session.Input(c.in)
	} else if err := session.CloseInput(); err != nil {
		return 0, fmt.Errorf("close the command's input: %w", err)
	}
	return session.Output(c.out, c.err)
}

// screen is the terminal that a person sits at.
type screen struct{ file *os.File }

// terminalOf returns the terminal when both input and output are one.
func terminalOf(in io.Reader, out io.Writer) *screen {
	input, ok := in.(*os.File)
	if !ok || !term.IsTerminal(int(input.Fd())) {
		return nil
	}
	output, ok := out.(*os.File)
	if !ok || !term.IsTerminal(int(output.Fd())) {
		return nil
	}
	return &screen{input}
}

func (s *screen) size() (rows, cols uint16) {
	width, height, err := term.GetSize(int(s.file.Fd()))
	if err != nil {
		return 24, 80
	}
	return uint16(height), uint16(width)
}

// raw hands every key to the command, Ctrl-C too, until restore is called.
func (s *screen) raw() (restore func(), err error) {
	state, err := term.MakeRaw(int(s.file.Fd()))
	if err != nil {
		return nil, fmt.Errorf("switch the terminal to raw mode: %w", err)
	}
	return func() { term.Restore(int(s.file.Fd()), state) }, nil
}

// watch tells the session each new size of the terminal until stop is called.
func (s *screen) watch(session *client.Session) (stop func()) {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range changes {
			rows, cols := s.size()
			session.Resize(rows, cols)
		}
	}()
	return func() {
		signal.Stop(changes)
		close(changes)
		<-done
	}
}
