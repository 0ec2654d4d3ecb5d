package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) nodesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "nodes",
		Short: "List nodes",
		Long: `List nodes. ADDRESS is where other nodes reach a node, and where the ports are that
its jobs publish.`,
		Example: `  dormouse nodes
  dormouse nodes -o json`,
		Args: exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			nodes, err := controller.Nodes(command.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(nodes)
			}
			return c.printNodes(nodes)
		},
	}
}

func (c *cli) printNodes(nodes []api.Node) error {
	rows := [][]string{}
	for _, node := range nodes {
		rows = append(rows, []string{
			node.Name, node.Cloud, string(node.State), fmt.Sprintf("%v of %v", node.CPUsUsed, node.CPUs),
			fmt.Sprintf("%s of %s", humanSize(node.MemUsed), humanSize(node.MemBytes)), strconv.Itoa(node.Tasks), node.CRIUVersion, node.Underlay, labelsText(node.Labels), nodeReason(node),
		})
	}
	return c.printTable([]string{"NAME", "CLOUD", "STATE", "CPUS", "MEMORY", "TASKS", "CRIU", "ADDRESS", "LABELS", "REASON"}, rows)
}

// nodeReason is why a node is in its state, or gets no jobs in spite of it.
func nodeReason(node api.Node) string {
	if node.Trouble == nil {
		return node.Reason
	}
	return strings.TrimPrefix(node.Reason+"; gets no jobs: "+node.Trouble.Explanation, "; ")
}

// labelsText words labels as they are given.
func labelsText(labels map[string]string) string {
	var texts []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		texts = append(texts, key+"="+labels[key])
	}
	return strings.Join(texts, ",")
}
