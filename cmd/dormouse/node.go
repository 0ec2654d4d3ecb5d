package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"dormouse/client"
)

func (c *cli) nodeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "node COMMAND",
		Short: "Cut or restore the power of a virtual node",
		Example: `  dormouse node kill east-0
  dormouse node start east-0`,
	}
	kill := c.nodeVerb("kill", "Cut the power of a virtual node",
		"Cut the power of a virtual node of `dormouse up`: its agent and every process of\nits tasks are gone at once, as when a machine loses its power.", (*client.Client).KillNode)
	start := c.nodeVerb("start", "Bring a virtual node back",
		"Bring a virtual node of `dormouse up` back after its power was cut. It comes back\nempty: what ran on it is gone.", (*client.Client).StartNode)
	command.AddCommand(kill, start)
	onlyCommands(command)
	return command
}

func (c *cli) nodeVerb(verb, short, long string, act func(*client.Client, context.Context, string) error) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " NODE",
		Short:             short,
		Long:              long,
		Example:           fmt.Sprintf("  dormouse node %s east-0", verb),
		Args:              exactly("NODE"),
		ValidArgsFunction: firstArgument(c.nodes()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if err := act(controller, command.Context(), args[0]); err != nil {
				return err
			}
			nodes, err := controller.Nodes(command.Context())
			if err != nil {
				return err
			}
			for _, node := range nodes {
				if node.Name == args[0] || node.ID == args[0] {
					return c.show(node, "%s %s", node.Name, node.State)
				}
			}
			return fmt.Errorf("the node %s is no longer known to the controller", args[0])
		},
	}
}
