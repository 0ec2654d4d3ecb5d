package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"dormouse/api"
)

// release is the version of this source tree.
const release = "0.1.0"

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program",
		Example: `  dormouse version -o json`,
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			version := api.Version{Version: versionText(), Go: runtime.Version()}
			return c.show(version, "dormouse %s (%s)", version.Version, version.Go)
		},
	}
}

// versionText is the release, and the commit the binary was built from when the
// Go tool recorded one.
func versionText() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return release
	}
	commit, changed := "", ""
	for _, setting := range info.Settings {
		switch {
		case setting.Key == "vcs.revision" && len(setting.Value) >= 12:
			commit = "+" + setting.Value[:12]
		case setting.Key == "vcs.modified" && setting.Value == "true":
			changed = ".changed"
		}
	}
	if commit == "" {
		return release
	}
	return release + commit + changed
}
