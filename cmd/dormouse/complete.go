package main

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dormouse/client"
)

// completionTimeout bounds how long pressing the tab key may take.
const completionTimeout = 2 * time.Second

// completer proposes the words that a shell completes to.
type completer = cobra.CompletionFunc

func fixed(words ...string) completer {
	return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
}

// firstArgument completes only the first argument.
func firstArgument(complete completer) completer {
	return func(command *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(command, args, begun)
	}
}

// either completes to what any of several propose.
func either(all ...completer) completer {
	return func(command *cobra.Command, args []string, begun string) (words []string, _ cobra.ShellCompDirective) {
		for _, complete := range all {
			some, _ := complete(command, args, begun)
			words = append(words, some...)
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}

// known completes to what the controller knows now; a controller that is away
// completes to nothing.
func (c *cli) known(list func(context.Context, *client.Client) ([]string, error)) completer {
	return func(command *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		controller, err := c.connect()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer controller.Close()
		words, err := list(ctx, controller)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		fitting := words[:0]
		for _, word := range words {
			if strings.HasPrefix(word, begun) {
				fitting = append(fitting, word)
			}
		}
		return fitting, cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *cli) jobs() completer {
	return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
		jobs, err := controller.Jobs(ctx, true)
		words := []string{}
		for _, job := range jobs {
			words = append(words, cobra.CompletionWithDesc(job.ID, strings.TrimSpace(job.Name+" "+string(job.Phase))))
			if job.Name != "" {
				words = append(words, cobra.CompletionWithDesc(job.Name, string(job.Phase)))
			}
		}
		return words, err
	})
}

// tasks completes to the tasks of the job that was named already.
func (c *cli) tasks() completer {
	return func(command *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
			job, err := controller.Job(ctx, args[0])
			if err != nil {
				return nil, err
			}
			words := []string{}
			for _, task := range job.TaskStatus {
				words = append(words, cobra.CompletionWithDesc(strconv.Itoa(task.Index), strings.TrimSpace(task.Node+" "+string(task.Phase))))
			}
			return words, nil
		})(command, args, begun)
	}
}

func (c *cli) checkpoints() completer {
	return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
		checkpoints, err := controller.Checkpoints(ctx, "")
		words := []string{}
		for _, checkpoint := range checkpoints {
			words = append(words, cobra.CompletionWithDesc(checkpoint.ID, checkpoint.Job+" "+string(checkpoint.State)))
		}
		return words, err
	})
}

func (c *cli) nodes() completer {
	return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
		nodes, err := controller.Nodes(ctx)
		words := []string{}
		for _, node := range nodes {
			words = append(words, cobra.CompletionWithDesc(node.Name, string(node.State)))
		}
		return words, err
	})
}

func (c *cli) clouds() completer {
	return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
		clouds, err := controller.Clouds(ctx)
		words := []string{}
		for _, cloud := range clouds {
			words = append(words, cobra.CompletionWithDesc(cloud.Name, cloud.Driver))
		}
		return words, err
	})
}

func (c *cli) operationIDs() completer {
	return c.known(func(ctx context.Context, controller *client.Client) ([]string, error) {
		operations, err := controller.Operations(ctx)
		words := []string{}
		for _, operation := range operations {
			words = append(words, cobra.CompletionWithDesc(operation.ID, string(operation.Kind)+" "+operation.Job))
		}
		return words, err
	})
}

// mustComplete binds a completion to a flag that was just defined; it can only
// fail when the flag is misspelt here.
func mustComplete(command *cobra.Command, flag string, complete completer) {
	if err := command.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err)
	}
}
