package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"dormouse/client"
)

func (c *cli) logsCommand() *cobra.Command {
	options := client.LogOptions{Task: client.AllTasks}
	command := &cobra.Command{
		Use:   "logs JOB",
		Short: "Print what a job has written",
		Long: `Print what a job's tasks have written: standard output to standard output,
standard error to standard error. Of several tasks, each line begins with its
task, as in "task 1 | ", unless --task chooses one.

With -o json, one document per line: task, stream and data (base64).`,
		Example: `  dormouse logs counter
  dormouse logs -f --task 0 counter`,
		Args:              exactly("JOB"),
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			if command.Flags().Changed("task") && options.Task < 0 {
				return usagef("tasks are numbered from 0, so there is no task %d", options.Task)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			job, err := controller.Job(command.Context(), args[0])
			if err != nil {
				return err
			}
			printer := &logPrinter{cli: c, prefixed: job.Tasks > 1 && options.Task == client.AllTasks}
			err = controller.Logs(command.Context(), job.ID, options, printer.print)
			if options.Follow && errors.Is(err, context.Canceled) {
				err = nil // Ctrl-C is how one stops following
			}
			return errors.Join(err, printer.flush())
		},
	}
	command.Flags().BoolVarP(&options.Follow, "follow", "f", false, "go on until the job is over")
	command.Flags().IntVar(&options.Task, "task", client.AllTasks, "only the task of this `number`")
	command.Flags().Lookup("task").DefValue = ""
	mustComplete(command, "task", c.tasks())
	return command
}

// logPrinter writes log chunks as they come; lines of several tasks are written
// whole, so that they do not tear each other.
type logPrinter struct {
	cli      *cli
	prefixed bool
	begun    map[logSource][]byte // lines without their end yet
	order    []logSource
}

type logSource struct {
	task   int
	stream string
}

func (p *logPrinter) print(chunk client.LogChunk) error {
	if p.cli.json() {
		return p.cli.printLine(chunk)
	}
	source := logSource{chunk.Task, chunk.Stream}
	if !p.prefixed {
		_, err := p.writer(source).Write(chunk.Data)
		return err
	}
	if p.begun == nil {
		p.begun = map[logSource][]byte{}
	}
	if _, known := p.begun[source]; !known {
		p.order = append(p.order, source)
	}
	text := append(p.begun[source], chunk.Data...)
	for {
		line, rest, whole := bytes.Cut(text, []byte("\n"))
		if !whole {
			break
		}
		if err := p.line(source, line); err != nil {
			return err
		}
		text = rest
	}
	p.begun[source] = text
	return nil
}

// flush writes what did not end in a line end.
func (p *logPrinter) flush() error {
	for _, source := range p.order {
		if rest := p.begun[source]; len(rest) > 0 {
			if err := p.line(source, rest); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *logPrinter) line(source logSource, line []byte) error {
	_, err := fmt.Fprintf(p.writer(source), "task %d | %s\n", source.task, line)
	return err
}

func (p *logPrinter) writer(source logSource) io.Writer {
	if source.stream == "stderr" {
		return p.cli.err
	}
	return p.cli.out
}
