package main

import "github.com/spf13/cobra"

func (c *cli) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a completion script for a shell",
		Long:  "Print a script that lets a shell complete commands, flags, and the ids of jobs,\ncheckpoints and nodes.",
		Example: `  source <(dormouse completion bash)
  dormouse completion zsh > "${fpath[1]}/_dormouse"
  dormouse completion fish > ~/.config/fish/completions/dormouse.fish`,
		Args:              exactly("SHELL"),
		ValidArgsFunction: firstArgument(fixed("bash", "zsh", "fish")),
		RunE: func(command *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return command.Root().GenBashCompletionV2(c.out, true)
			case "zsh":
				return command.Root().GenZshCompletion(c.out)
			case "fish":
				return command.Root().GenFishCompletion(c.out, true)
			}
			return usagef("%q is not one of the shells bash, zsh and fish", args[0])
		},
	}
}
