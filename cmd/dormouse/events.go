package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) eventsCommand() *cobra.Command {
	follow := false
	command := &cobra.Command{
		Use:   "events [JOB]",
		Short: "Print the history of a job or of everything",
		Example: `  dormouse events counter
  dormouse events -f -o json`,
		Args:              atMostOne,
		ValidArgsFunction: firstArgument(c.jobs()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			err = controller.Events(command.Context(), argument(args), follow, c.printEvent)
			if follow && errors.Is(err, context.Canceled) {
				return nil // Ctrl-C is how one stops following
			}
			return err
		},
	}
	command.Flags().BoolVarP(&follow, "follow", "f", false, "go on with later events")
	return command
}

func (c *cli) printEvent(event api.Event) error {
	if c.json() {
		return c.printLine(event)
	}
	_, err := fmt.Fprintf(c.out, "%s  %-12s  %-22s  %s\n", event.Time.Local().Format(time.DateTime), firstOf(event.Job, event.Node, "-"), event.Type, event.Message)
	return err
}
