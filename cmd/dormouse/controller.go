package main

import (
	"context"
	"errors"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"dormouse/controller"
)

func (c *cli) controllerCommand() *cobra.Command {
	file := ""
	command := &cobra.Command{
		Use:   "controller",
		Short: "Run a controller for agents on other machines",
		Long: `Run the controller that agents join and the other commands talk to. It prints
"ready URL" when it answers, and runs until it is interrupted; jobs go on without
it for as long as their lease lasts, then they are frozen until it is back.
Several may share an etcd: one leads, and another takes over when it is gone.

The configuration is described in docs/install.md.`,
		Example: `  dormouse controller --config /etc/dormouse/controller.yaml`,
		Args:    exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			if file == "" {
				return usagef("there is no configuration: name its file with --config")
			}
			config, err := controller.ReadConfig(file)
			if err != nil {
				return usagef("%v", err)
			}
			return c.runController(command.Context(), config)
		},
	}
	command.Flags().StringVar(&file, "config", "", "YAML `file` with the configuration")
	command.AddCommand(c.backupCommand(), c.restoreCommand())
	return command
}

// tuneRuntime sets how the controller's process shares the processors.
//
// Go lets a goroutine run for up to 10 ms before another gets its processor, so
// that a short question would wait behind long answers; the kernel shares more
// finely among more threads than there are processors. Who sets GOMAXPROCS
// decides otherwise.
//
// It has the heap grow to five times what is in use, instead of twice, before
// garbage is collected: most of what a controller has is its image of the store and
// its streams to agents, and while these are gone through again every request that
// needs memory has to help, and is late. Who sets GOGC decides otherwise.
func tuneRuntime() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 4)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}

func (c *cli) runController(ctx context.Context, config controller.Config) (err error) {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	outliveReaders()
	tuneRuntime()
	daemon, err := controller.Start(ctx, config, controller.Env{
		Logger: c.daemonLogger(), Version: version,
		AgentCommand: func(config string) []string { return []string{program, "agent", "--config", config} },
		HoldCommand:  holdCommand(program),
	})
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err = errors.Join(err, daemon.Close(closing))
	}()
	if err := c.showReady(daemon.URL()); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case <-daemon.Done():
		return daemon.Err()
	}
}
