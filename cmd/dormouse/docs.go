package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

//go:generate go run . docs ../../docs/cli

// docsCommand writes the command line's reference. A test compares the pages in
// docs/cli with what it would write.
func (c *cli) docsCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "docs DIRECTORY",
		Short:  "Write the reference of all commands as Markdown",
		Hidden: true,
		Args:   exactly("DIRECTORY"),
		RunE: func(command *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("make the directory of the reference: %w", err)
			}
			for name, text := range reference(command.Root()) {
				if err := os.WriteFile(filepath.Join(args[0], name), []byte(text), 0o644); err != nil {
					return fmt.Errorf("write a page of the reference: %w", err)
				}
			}
			return nil
		},
	}
}

// reference returns the pages of the reference by their file names.
func reference(root *cobra.Command) map[string]string {
	pages := map[string]string{}
	index := &strings.Builder{}
	fmt.Fprintf(index, "# Commands\n\n<!-- written by `dormouse docs`; change the commands, then run `make generate` -->\n\n%s\n", root.Long)
	for _, group := range root.Groups() {
		fmt.Fprintf(index, "\n## %s\n\n", strings.TrimSuffix(group.Title, ":"))
		for _, command := range root.Commands() {
			if command.GroupID == group.ID && !command.Hidden {
				addPages(pages, index, command)
			}
		}
	}
	fmt.Fprintf(index, "\n## Flags of every command\n\n%s", fenced(root.PersistentFlags().FlagUsages()))
	pages["README.md"] = index.String()
	return pages
}

func addPages(pages map[string]string, index *strings.Builder, command *cobra.Command) {
	name := strings.ReplaceAll(command.CommandPath(), " ", "_") + ".md"
	pages[name] = page(command)
	fmt.Fprintf(index, "- [`%s`](%s): %s\n", command.CommandPath(), name, command.Short)
	for _, below := range command.Commands() {
		if !below.Hidden {
			addPages(pages, index, below)
		}
	}
}

func page(command *cobra.Command) string {
	text := &strings.Builder{}
	fmt.Fprintf(text, "# %s\n\n<!-- written by `dormouse docs`; change the command, then run `make generate` -->\n\n", command.CommandPath())
	fmt.Fprintf(text, "%s\n\n%s\n", firstOf(command.Long, command.Short+"."), fenced(command.UseLine()))
	fmt.Fprintf(text, "## Examples\n\n%s", fenced(command.Example))
	if flags := command.LocalFlags().FlagUsages(); flags != "" {
		fmt.Fprintf(text, "\n## Flags\n\n%s", fenced(flags))
	}
	fmt.Fprintf(text, "\nThe flags of every command are on [the first page](README.md).\n")
	return text.String()
}

func fenced(text string) string { return "```\n" + strings.Trim(text, "\n") + "\n```\n" }
