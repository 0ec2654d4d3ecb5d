package main

import (
	"github.com/spf13/cobra"

	"dormouse/agent/network"
)

// networkHolderCommand is the process that an agent starts for each job's
// WireGuard tunnel where the kernel has none.
func (c *cli) networkHolderCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "network-holder MTU",
		Short:  "Run a job's tunnel; started by the agent",
		Hidden: true,
		RunE:   func(_ *cobra.Command, args []string) error { return network.RunHolder(args) },
	}
}
