// Command dormouse is the command line, the controller, the agent and `up`, all
// in one binary.
//
// main hands the outside world (streams, environment, paths) to run as a cli;
// each verb is one file with one constructor that returns its cobra.Command.
// The verbs talk to the controller through package client and nothing else;
// only up, controller, agent and doctor touch the machine. A verb returns an
// error and never exits: exit.go alone decides the exit status from it.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	c := &cli{
		in:       os.Stdin,
		out:      os.Stdout,
		err:      os.Stderr,
		getenv:   os.Getenv,
		now:      time.Now,
		runDir:   defaultRunDir,
		terminal: term.IsTerminal(int(os.Stderr.Fd())),
	}
	status := run(ctx, c, os.Args[1:])
	stop()
	os.Exit(status)
}
