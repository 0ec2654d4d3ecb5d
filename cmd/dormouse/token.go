package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func (c *cli) tokenCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "token COMMAND",
		Short: "Make, list and revoke tokens",
		Long: `Whoever uses a controller shows a token. Its role says what it may do: admin
everything, operator everything about jobs and nodes, user what belongs to one user.
` + "`dormouse up`" + ` and ` + "`dormouse controller`" + ` make one for the admin of their machine, in a file
that only its owner may read; all others are made here, by an admin.`,
		Example: `  dormouse token create alice-laptop --role user --user alice --expires 720h
  dormouse token revoke alice-laptop`,
	}
	addGrouped(command, "", c.tokenCreateCommand(), c.tokenListCommand(), c.tokenRevokeCommand())
	onlyCommands(command)
	return command
}

func (c *cli) tokenCreateCommand() *cobra.Command {
	ask, role, expires := api.TokenRequest{}, "", time.Duration(0)
	command := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a token and print its secret",
		Long: `Make a token and print its secret, which is told this once: the controller keeps
only a hash of it. The bearer sets DORMOUSE_TOKEN to it.

The jobs of a token of the role user run as that user, whose numbers are looked up on
the controller's machine; give NAME:UID:GID for a user that it does not know. They
never run as root, unless --allow-root says that they may.`,
		Example: `  dormouse token create alice-laptop --role user --user alice --expires 720h
  dormouse token create night-shift --role operator`,
		Args: exactly("NAME"),
		RunE: func(command *cobra.Command, args []string) error {
			if expires < 0 || command.Flags().Changed("expires") && expires == 0 {
				return usagef("--expires must be greater than 0, got %s", expires)
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			ask.Name, ask.Role, ask.ExpiresMS = args[0], api.Role(role), expires.Milliseconds()
			token, err := controller.CreateToken(command.Context(), ask)
			if err != nil {
				return err
			}
			if token.Secret == "" {
				return errors.New("the token was made, but its secret was lost with the controller's answer: revoke it with `dormouse token revoke " + token.ID + "` and make another")
			}
			return c.show(token, "%s", token.Secret)
		},
	}
	command.Flags().StringVar(&role, "role", string(api.RoleUser), "`role`: admin, operator or user")
	command.Flags().StringVar(&ask.User, "user", "", "`user` of the role user: NAME or NAME:UID:GID")
	command.Flags().DurationVar(&expires, "expires", 0, "for how long it is valid, such as 720h (default: until it is revoked)")
	command.Flags().BoolVar(&ask.AllowRoot, "allow-root", false, "let the user's jobs run as root, inside their sandboxes")
	mustComplete(command, "role", fixed("admin", "operator", "user"))
	return command
}

func (c *cli) tokenListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List tokens",
		Long:    "List the tokens, also those revoked or expired in the last 90 days. Their secrets are known to nobody but their bearers.",
		Example: `  dormouse token ls`,
		Args:    cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			tokens, err := controller.Tokens(command.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(tokens)
			}
			rows := [][]string{}
			for _, t := range tokens {
				rows = append(rows, []string{t.ID, t.Name, string(t.Role), t.User, c.tokenState(t), c.age(t.Created)})
			}
			return c.printTable([]string{"ID", "NAME", "ROLE", "USER", "STATE", "AGE"}, rows)
		},
	}
}

func (c *cli) tokenState(t api.Token) string {
	switch {
	case t.Revoked != nil:
		return "revoked"
	case t.Expires == nil:
		return "valid"
	case c.now().After(*t.Expires):
		return "expired"
	}
	return "until " + t.Expires.UTC().Format(time.RFC3339)
}

func (c *cli) tokenRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "revoke TOKEN",
		Short:   "Revoke a token, by its id or name",
		Long:    "Revoke a token. Nothing more is answered to it, and what it has open, such as a stream of events, ends.",
		Example: `  dormouse token revoke alice-laptop`,
		Args:    exactly("TOKEN"),
		RunE: func(command *cobra.Command, args []string) error {
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if err := controller.RevokeToken(command.Context(), args[0]); err != nil {
				return err
			}
			return c.show(map[string]string{"token": args[0], "state": "revoked"}, "%s revoked", args[0])
		},
	}
}

func (c *cli) auditCommand() *cobra.Command {
	since, limit := time.Duration(0), 100
	command := &cobra.Command{
		Use:   "audit",
		Short: "Show who did what",
		Long: `Show the audit log, oldest first: every request that changed something, and every
one that was refused. Only admins may. How many entries are kept is the
configuration's (access.audit_keep).`,
		Example: `  dormouse audit --since 24h
  dormouse audit -n 1000 -o json`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if limit < 1 || since < 0 {
				return usagef("--limit and --since must be greater than 0")
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			from := time.Time{}
			if since > 0 {
				from = c.now().Add(-since)
			}
			entries, err := controller.Audit(command.Context(), from, limit)
			if err != nil {
				return err
			}
			if c.json() {
				return c.printDocument(entries)
			}
			rows := [][]string{}
			for _, e := range entries {
				rows = append(rows, []string{
					e.Time.UTC().Format(time.RFC3339), firstOf(e.Name, "-"), e.Address, e.Method + " " + e.Path,
					strings.TrimSpace(fmt.Sprintf("%d %s", e.Status, e.Target)), e.Detail,
				})
			}
			return c.printTable([]string{"TIME", "TOKEN", "FROM", "REQUEST", "ANSWER", "DETAIL"}, rows)
		},
	}
	command.Flags().DurationVar(&since, "since", 0, "only the last `duration`, such as 24h")
	command.Flags().IntVarP(&limit, "limit", "n", limit, "only so `many`, the newest")
	return command
}
