package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"dormouse/controller"
	"dormouse/controller/store/archive"
)

// backupReport is what backup and restore print with -o json.
type backupReport struct {
	File    string    `json:"file"`
	Schema  int       `json:"schema"`
	Created time.Time `json:"created"`
	Version string    `json:"version"` // of the dormouse that wrote it
}

func (c *cli) backupCommand() *cobra.Command {
	file := ""
	command := &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy the controller's store and keys into a file",
		Long: `Copy the controller's records, as of one moment, and the keys of its state
directory into a file that only its owner may read. The controller goes on
meanwhile. Whoever has the file can act as the controller: keep it as you keep the
state directory. Checkpoints are not in it; they are in the repository.

With --config the store is read without a controller: that of one that is stopped,
or an etcd.`,
		Example: `  dormouse controller backup /backup/dormouse-$(date +%F)
  dormouse controller backup --config /etc/dormouse/controller.yaml /backup/dormouse`,
		Args: exactly("FILE"),
		RunE: func(command *cobra.Command, args []string) error {
			take := func(ctx context.Context, w io.Writer) error {
				asked, err := c.connect()
				if err != nil {
					return err
				}
				defer asked.Close()
				return asked.Backup(ctx, w)
			}
			if file != "" {
				config, err := controller.ReadConfig(file)
				if err != nil {
					return usagef("%v", err)
				}
				take = func(ctx context.Context, w io.Writer) error { return controller.BackupOf(ctx, w, config, version) }
			}
			return c.backup(command.Context(), args[0], take)
		},
	}
	command.Flags().StringVar(&file, "config", "", "read the store that this configuration `file` names")
	return command
}

// backup writes to a file beside the one that is asked for, reads it again, and
// only then gives it its name.
func (c *cli) backup(ctx context.Context, file string, take func(context.Context, io.Writer) error) (err error) {
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is there already: name another file", file)
	}
	partial := file + ".partial"
	out, err := os.OpenFile(partial, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make the back-up: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(partial)
		}
	}()
	if err := errors.Join(take(ctx, out), out.Sync(), out.Close()); err != nil {
		return err
	}
	header, err := archive.Check(partial)
	if err != nil {
		return err
	}
	if err := os.Rename(partial, file); err != nil {
		return fmt.Errorf("make the back-up: %w", err)
	}
	return c.show(reportOf(file, header), "wrote %s, of schema %d", file, header.Schema)
}

func reportOf(file string, header archive.Header) backupReport {
	return backupReport{File: file, Schema: header.Schema, Created: header.Created, Version: header.Dormouse}
}

func (c *cli) restoreCommand() *cobra.Command {
	file, state, force := "", "", false
	command := &cobra.Command{
		Use:   "restore FILE",
		Short: "Put a back-up in place of the controller's store and keys",
		Long: `Put what "dormouse controller backup" wrote in place of a controller's store and
keys. No controller may run on that store. A store that is not empty, and keys that
are others, are refused without --force; with it, the files that are replaced are
kept beside the new ones, and what is in an etcd is lost.

A back-up of an older dormouse is upgraded. When the controller runs again, the
nodes' agents come back by themselves; tasks that the back-up does not know are
ended.`,
		Example: `  dormouse controller restore --config /etc/dormouse/controller.yaml /backup/dormouse-2026-11-21
  sudo dormouse controller restore --state /var/lib/dormouse /backup/dormouse-2026-11-21`,
		Args: exactly("FILE"),
		RunE: func(command *cobra.Command, args []string) error {
			config := controller.Config{State: state}
			switch {
			case (file == "") == (state == ""):
				return usagef("name the store to restore: either a controller's --config, or the --state directory of `dormouse up`")
			case file != "":
				read, err := controller.ReadConfig(file)
				if err != nil {
					return usagef("%v", err)
				}
				config = read
			}
			header, err := controller.Restore(command.Context(), config, args[0], force, c.daemonLogger())
			if err != nil {
				return err
			}
			return c.show(reportOf(args[0], header), "restored %s, taken on %s", args[0], header.Created.Format(time.RFC3339))
		},
	}
	set := command.Flags()
	set.StringVar(&file, "config", "", "restore into the store that this configuration `file` names")
	set.StringVar(&state, "state", "", "restore into this state `directory` of `dormouse up`")
	set.BoolVar(&force, "force", false, "replace what is there")
	return command
}

func (c *cli) controllersCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "controllers",
		Short:   "List the controllers and which of them leads",
		Long:    `List the controllers that share a store. One leads: it alone writes, and talks to the agents. The others answer what the store tells and hand everything else on to it.`,
		Example: `  dormouse controllers`,
		Args:    exactly(),
		RunE: func(command *cobra.Command, _ []string) error {
			asked, err := c.connect()
			if err != nil {
				return err
			}
			defer asked.Close()
			all, err := asked.Controllers(command.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(all)
			}
			rows := [][]string{}
			for _, one := range all {
				role := "follower"
				if one.Leads {
					role = "leader"
				}
				rows = append(rows, []string{one.Name, role, one.URL, one.Version})
			}
			return c.printTable([]string{"NAME", "ROLE", "URL", "VERSION"}, rows)
		},
	}
}
