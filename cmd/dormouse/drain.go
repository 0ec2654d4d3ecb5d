package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) drainCommand() *cobra.Command {
	detach := false
	command := &cobra.Command{
		Use:   "drain NODE",
		Short: "Move everything off a node, and let nothing onto it",
		Long: `Cordon a node, so that no job is put there any more, and checkpoint every job that
has a task on it; each comes back by itself on other nodes as soon as there is room.
Waits until the node is empty and every job runs elsewhere or is known to wait for
room, and lists them. A job that cannot be checkpointed stays and runs on, and the
command says why; the node stays cordoned until ` + "`dormouse uncordon`" + `, which also ends a
drain that is under way.`,
		Example: `  dormouse drain east-0
  dormouse drain east-0 --detach`,
		Args:              exactly("NODE"),
		ValidArgsFunction: firstArgument(c.nodes()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			operation, err := controller.Drain(command.Context(), args[0])
			if err != nil {
				return err
			}
			if detach {
				return c.show(operation, "%s", operation.ID)
			}
			operation, err = c.follow(command.Context(), controller, operation)
			if err != nil {
				return err
			}
			return c.printDrain(operation)
		},
	}
	addDetach(command, &detach)
	return command
}

func (c *cli) printDrain(operation *api.Operation) error {
	if c.json() {
		return c.printDocument(operation)
	}
	var moved []api.DrainResult
	if err := json.Unmarshal(operation.Result, &moved); err != nil {
		return fmt.Errorf("node %s is drained, but the controller's list of jobs cannot be read: %w", operation.Node, err)
	}
	if len(moved) == 0 {
		fmt.Fprintf(c.out, "%s is empty\n", operation.Node)
		return nil
	}
	rows := [][]string{}
	for _, job := range moved {
		rows = append(rows, []string{job.Job, job.Name, string(job.Phase), strings.Join(job.Nodes, ", "), job.Reason})
	}
	return c.printTable([]string{"JOB", "NAME", "PHASE", "NODES", "REASON"}, rows)
}

func (c *cli) uncordonCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "uncordon NODE",
		Short:             "Let jobs onto a node again",
		Long:              "Let jobs onto a node again that was drained. A drain that is under way ends; jobs\nthat it has moved stay where they are.",
		Example:           `  dormouse uncordon east-0`,
		Args:              exactly("NODE"),
		ValidArgsFunction: firstArgument(c.nodes()),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if err := controller.Uncordon(command.Context(), args[0]); err != nil {
				return err
			}
			node, err := findNode(command.Context(), controller, args[0])
			if err != nil {
				return err
			}
			return c.show(node, "%s %s", node.Name, node.State)
		},
	}
}

func (c *cli) nodeLabelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "label NODE KEY=VALUE... [KEY-...]",
		Short: "Set or remove labels of a node",
		Long: `Set labels of a node, or remove them with KEY-. Jobs ask for them with
` + "`dormouse submit --constraint KEY=VALUE`" + `. Jobs that run there already stay. Every node
has the labels node and cloud, its own names.`,
		Example: `  dormouse node label east-0 disk=ssd
  dormouse node label east-0 disk-`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef("NODE and at least one KEY=VALUE or KEY- are needed")
			}
			return nil
		},
		ValidArgsFunction: firstArgument(c.nodes()),
		RunE: func(command *cobra.Command, args []string) error {
			labels, err := parseLabels(args[1:], true)
			if err != nil {
				return usagef("%v", err)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if err := controller.LabelNode(command.Context(), args[0], labels); err != nil {
				return err
			}
			node, err := findNode(command.Context(), controller, args[0])
			if err != nil {
				return err
			}
			return c.show(node, "%s %s", node.Name, labelsText(node.Labels))
		},
	}
}

// parseLabels reads KEY=VALUE texts, and KEY- for an empty value where that is
// allowed.
func parseLabels(texts []string, removing bool) (map[string]string, error) {
	labels := make(map[string]string, len(texts))
	for _, text := range texts {
		key, value, given := strings.Cut(text, "=")
		if removed, ends := strings.CutSuffix(key, "-"); removing && !given && ends {
			key, given = removed, true
		} else if value == "" {
			given = false
		}
		if !given || key == "" {
			return nil, fmt.Errorf("%q is not a label: KEY=VALUE", text)
		}
		labels[key] = value
	}
	return labels, nil
}
