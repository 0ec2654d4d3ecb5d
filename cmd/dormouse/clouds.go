package main

import (
	"strconv"

	"github.com/spf13/cobra"
)

func (c *cli) cloudsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "clouds",
		Short:   "List clouds",
		Example: `  dormouse clouds`,
		Args:    exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			clouds, err := controller.Clouds(command.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(clouds)
			}
			rows := [][]string{}
			for _, cloud := range clouds {
				rows = append(rows, []string{cloud.Name, cloud.Driver, strconv.Itoa(cloud.Nodes)})
			}
			return c.printTable([]string{"NAME", "DRIVER", "NODES"}, rows)
		},
	}
}
