package main

import (
	"runtime"

	"github.com/spf13/cobra"

	"dormouse/api"
)

// version is the version this binary was built from; `make build` sets it with
// the linker (-X main.version=...).
var version = "dev"

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program",
		Example: `  dormouse version -o json`,
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			answer := api.Version{Version: version, Go: runtime.Version()}
			return c.show(answer, "dormouse %s (%s)", answer.Version, answer.Go)
		},
	}
}
