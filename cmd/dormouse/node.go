package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

const (
	// nodeTimeout bounds how long a node may take to lose or get its power.
	nodeTimeout = time.Minute
	nodePoll    = 100 * time.Millisecond
)

func (c *cli) nodeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "node COMMAND",
		Short: "Label a node, or cut and restore the power of a virtual one",
		Example: `  dormouse node kill east-0
  dormouse node start east-0
  dormouse node label east-0 disk=ssd`,
	}
	kill := c.nodeVerb("kill", "Cut the power of a virtual node",
		"Cut the power of a virtual node of `dormouse up`: its agent and every process of\nits tasks are gone at once, as when a machine loses its power.", api.NodeLost, (*client.Client).KillNode)
	start := c.nodeVerb("start", "Bring a virtual node back",
		"Bring a virtual node of `dormouse up` back after its power was cut. It comes back\nempty: what ran on it is gone. Waits until jobs can run on it.", api.NodeReady, (*client.Client).StartNode)
	command.AddCommand(kill, start, c.nodeLabelCommand())
	onlyCommands(command)
	return command
}

func (c *cli) nodeVerb(verb, short, long string, want api.NodeState, act func(*client.Client, context.Context, string) error) *cobra.Command {
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
			node, err := waitNode(command.Context(), controller, args[0], want)
			if err != nil {
				return err
			}
			return c.show(node, "%s %s", node.Name, node.State)
		},
	}
}

// waitNode asks again and again, as nodes have no long poll, until a node is in
// a state.
func waitNode(ctx context.Context, controller *client.Client, name string, want api.NodeState) (*api.Node, error) {
	bounded, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		node, err := findNode(bounded, controller, name)
		if err == nil && node.State == want {
			return node, nil
		}
		if err == nil {
			select {
			case <-bounded.Done():
				err = context.Cause(bounded)
			case <-time.After(nodePoll):
				continue
			}
		}
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return nil, &timeoutError{fmt.Sprintf("%s is not %s after %s: `dormouse nodes` shows it", name, want, nodeTimeout)}
		}
		return nil, err
	}
}

func findNode(ctx context.Context, controller *client.Client, name string) (*api.Node, error) {
	nodes, err := controller.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		if nodes[i].Name == name || nodes[i].ID == name {
			return &nodes[i], nil
		}
	}
	return nil, fmt.Errorf("the node %s is no longer known to the controller", name)
}
