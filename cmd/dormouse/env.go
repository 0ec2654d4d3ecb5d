package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"dormouse/client"
)

func (c *cli) envCommand() *cobra.Command {
	state := ""
	command := &cobra.Command{
		Use:   "env",
		Short: "Print the export lines that reach this machine's `up`",
		Long:  "Print the lines by which another shell, or another machine that has the CA file,\nreaches the `dormouse up` of this machine.",
		Example: `  eval "$(sudo dormouse env)"
  eval "$(dormouse env --state /var/lib/dormouse/up)"`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			config, err := c.envConfig(state)
			if err != nil {
				return err
			}
			variables := [][2]string{{"DORMOUSE_CONTROLLER", config.URL}, {"DORMOUSE_TOKEN", config.Token}, {"DORMOUSE_CA", config.CAFile}}
			if c.json() {
				document := map[string]string{}
				for _, variable := range variables {
					document[variable[0]] = variable[1]
				}
				return c.printDocument(document)
			}
			for _, variable := range variables {
				fmt.Fprintf(c.out, "export %s=%s\n", variable[0], shellQuote(variable[1]))
			}
			return nil
		},
	}
	command.Flags().StringVar(&state, "state", "", "`directory` of the `up` to reach (default: the one of this machine)")
	return command
}

func (c *cli) envConfig(state string) (client.Config, error) {
	if state == "" {
		return c.localConfig()
	}
	found, err := readPointer(filepath.Join(state, pointerFile))
	if errors.Is(err, fs.ErrNotExist) {
		return client.Config{}, fmt.Errorf("no `dormouse up` runs with the state directory %s", state)
	}
	if err != nil {
		return client.Config{}, err
	}
	return found.config()
}

// shellQuote makes any text one word of a POSIX shell.
func shellQuote(text string) string {
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
