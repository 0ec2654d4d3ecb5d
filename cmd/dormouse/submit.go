package main

import (
	"context"
	"maps"
	"os/user"

	"github.com/spf13/cobra"

	"dormouse/api"
	"dormouse/client"
)

// What a task is given when nothing is said.
const (
	defaultCPUs = 1.0
	defaultMem  = 512 << 20
)

// submitFlags are the values of submit's flags.
type submitFlags struct {
	file                  string
	spec                  api.JobSpec
	env, volumes, publish []string
	constraints           []string
	healthCommand         string
	health                api.HealthCheck
}

func (c *cli) submitCommand() *cobra.Command {
	flags := submitFlags{}
	command := &cobra.Command{
		Use:   "submit [flags] -- COMMAND [ARG...]",
		Short: "Submit a job and print its id",
		Long: `Submit a job and print its id.

The command runs in a sandbox on a node, as the user who submits it. By default
the sandbox sees the node's own file tree below a private, writable layer; what
the job changes travels with its checkpoints. /tmp is private too. A volume is a
directory of the node that the job shares with it; it is never checkpointed.

A job of several tasks (--tasks) gets a network of its own, on which its tasks are
called task-0, task-1 and so on; they may be on different nodes, and all start
together or none does. Each runs the command, and finds its number and the others
in DORMOUSE_TASK, DORMOUSE_TASKS and DORMOUSE_HOSTS; but mpirun and mpiexec run in
task 0 only and start the ranks in all of them (see --launch). A job reaches the
outside; the outside reaches what the job publishes, on the node of the task.

A job is checkpointed by itself with --checkpoint-every; ` + "`dormouse inspect`" + ` says when
and why. What --keep, --keep-hourly and --keep-daily do not keep is removed after each
checkpoint; the newest and those with a label always stay.

A job that is kept from working, by a lack of CPU, memory or I/O or because it is
stopped, is suspended and comes back by itself, unless --on-starvation says otherwise.
Tasks that report their progress (--progress-regex, or ` + "`dormouse-ctl progress N`" + ` inside)
are judged by it. A task whose health check fails (--health-cmd, --health-http) has
failed; --max-restarts recovers it.

A job file (-f) is YAML or JSON with the fields that ` + "`dormouse inspect -o json`" + ` shows
under "spec"; publish may list texts as for --publish. Flags override the file.`,
		Example: `  dormouse submit -- sleep 600
  dormouse submit --name db --cpus 2 --mem 4G --cloud east -- redis-server --save ''
  dormouse submit --env SEED=7 --volume /srv/data:/data:ro --dir /data -- ./simulate
  dormouse submit --tasks 4 --cpus 1 -- mpirun ./program
  dormouse submit --tasks 2 -- sh -c 'if [ $DORMOUSE_TASK = 0 ]; then ./server; else ./client task-0; fi'
  dormouse submit --priority 10 --constraint disk=ssd -- ./urgent
  dormouse submit --publish 8080:80 --connections close -- ./webserver
  dormouse submit --checkpoint-every auto --keep 3 --keep-daily 7 --max-restarts 10 -- ./simulate
  dormouse submit --health-http :8080/healthz --health-start-delay 30s --max-restarts 5 -- ./server
  dormouse submit --progress-regex 'step ([0-9]+)' --on-starvation migrate -- ./train
  dormouse submit --root oci:./python.tar -- python3 -m http.server
  dormouse submit -f job.yaml`,
		RunE: func(command *cobra.Command, args []string) error {
			spec, err := c.jobSpec(command, flags, args)
			if err != nil {
				return err
			}
			controller, err := c.connect()
			if err != nil {
				return err
			}
			defer controller.Close()
			if err := defaultUser(command.Context(), controller, &spec); err != nil {
				return err
			}
			job, err := controller.Submit(command.Context(), spec)
			if err != nil {
				return err
			}
			return c.show(job, "%s", job.ID)
		},
	}
	set := command.Flags()
	set.StringVarP(&flags.file, "file", "f", "", "read the job from a YAML or JSON `file` (-: standard input)")
	set.StringVar(&flags.spec.Name, "name", "", "`name` by which the job can be called instead of its id")
	set.IntVar(&flags.spec.Tasks, "tasks", 1, "`number` of tasks")
	set.Float64Var(&flags.spec.CPUs, "cpus", defaultCPUs, "processors per task (`number`, 0.5 is half of one)")
	flags.spec.MemBytes = defaultMem
	set.Var(sizeFlag{&flags.spec.MemBytes}, "mem", "memory per task, such as 512M or 2G")
	set.IntVar(&flags.spec.Priority, "priority", 0, "`priority`: higher goes first, and makes lower ones give way")
	set.StringVar(&flags.spec.Cloud, "cloud", "", "run only in this `cloud`")
	set.StringArrayVar(&flags.constraints, "constraint", nil, "run only on nodes with this label, `KEY=VALUE`; see `dormouse node label` (may be repeated)")
	set.StringVar(&flags.spec.Placement, "placement", "", "`spread|pack`: each task on the least loaded node, or all on as few nodes as possible (default spread)")
	set.StringVar(&flags.spec.Root, "root", "", "`root` file system: host, dir:PATH, oci:PATH or oci:REFERENCE (default host)")
	set.StringArrayVarP(&flags.env, "env", "e", nil, "environment variable `NAME=VALUE`, or NAME to pass on yours (may be repeated)")
	set.StringVarP(&flags.spec.Dir, "dir", "w", "", "working `directory` in the sandbox")
	set.StringVar(&flags.spec.Dir, "workdir", "", "the same as --dir")
	set.StringArrayVarP(&flags.volumes, "volume", "v", nil, "directory of the node to share with the job, `SRC:DST[:ro]` (may be repeated)")
	set.StringVarP(&flags.spec.User, "user", "u", "", "`user` to run as: NAME, UID, NAME:GROUP or UID:GID (default: you)")
	set.StringArrayVar(&flags.spec.CapAdd, "cap-add", nil, "Linux `capability` beyond the default set of containers (may be repeated)")
	set.StringArrayVarP(&flags.publish, "publish", "p", nil, "let the outside reach a port through the task's node, `[TASK:]PORT[:TARGET][/udp]`: PORT of the node leads to TARGET of the task (may be repeated)")
	set.StringVar(&flags.spec.Launch, "launch", "", "where the command runs: in `each|first` task, or auto: in the first for mpirun and its like, otherwise in each (default auto)")
	set.StringVar(&flags.spec.Connections, "connections", "", "what a checkpoint does about TCP connections that leave the job: `refuse|close|keep` (default refuse, which names them)")
	set.StringVar(&flags.spec.CPUBaseline, "cpu-baseline", "", "processor `level` that libraries may use: native, x86-64-v2, x86-64-v3 or x86-64-v4")
	set.StringVar(&flags.spec.CheckpointEvery, "checkpoint-every", "", "checkpoint by itself: `10m`, a cron line in UTC such as \"0 * * * *\", or auto, the interval that loses least")
	set.IntVar(&flags.spec.Keep, "keep", 0, "`number` of durable checkpoints to keep (0: all, unless hours or days are given)")
	set.IntVar(&flags.spec.KeepHourly, "keep-hourly", 0, "keep the newest checkpoint of each of the last so many hours (`number`)")
	set.IntVar(&flags.spec.KeepDaily, "keep-daily", 0, "keep the newest checkpoint of each of the last so many days (`number`)")
	set.IntVar(&flags.spec.DrillEvery, "drill-every", 0, "restore one in so many checkpoints on trial (`number`; 0: none)")
	set.Var(durationFlag{&flags.spec.WalltimeMS}, "walltime", "checkpoint and suspend the job after running so long, such as 2h")
	set.IntVar(&flags.spec.MaxRestarts, "max-restarts", 0, "`times` in a row the job is recovered by itself after it failed or its node was lost; 0: never")
	set.StringVar(&flags.healthCommand, "health-cmd", "", "`command` that a shell in the sandbox runs to ask how a task is: status 0 is well")
	set.StringVar(&flags.health.HTTP, "health-http", "", "HTTP request that asks a task how it is, `[:PORT]/PATH`: status 2xx or 3xx is well")
	set.Var(durationFlag{&flags.health.PeriodMS}, "health-period", "how often that is asked (default 10s)")
	set.Var(durationFlag{&flags.health.TimeoutMS}, "health-timeout", "how long an answer may take (default 5s)")
	set.Var(durationFlag{&flags.health.StartDelayMS}, "health-start-delay", "how long after its start a task need not be well yet")
	set.IntVar(&flags.health.Retries, "health-retries", 0, "`failures` in a row that make a task unhealthy, and the job failed (default 3)")
	set.StringVar(&flags.spec.OnStarvation, "on-starvation", "", "what to do with the job when it is kept from working: `suspend|migrate|notify|ignore` (default suspend, unless the platform has another: it comes back by itself)")
	set.Var(durationFlag{&flags.spec.StarvationPeriodMS}, "starvation-period", "how often each task is measured (default 10s); a verdict takes two or three")
	set.StringVar(&flags.spec.ProgressRegex, "progress-regex", "", "`expression` that finds a task's progress in its output: the number that its first group matches, or else each match is one step")
	set.StringVar(&flags.spec.Webhook, "webhook", "", "http or https `address` that findings about the job are posted to")
	set.Lookup("workdir").Hidden = true
	mustComplete(command, "cloud", c.clouds())
	mustComplete(command, "cpu-baseline", fixed(cpuBaselines...))
	mustComplete(command, "checkpoint-every", fixed("10m", "auto", "@hourly"))
	mustComplete(command, "placement", fixed(placements...))
	mustComplete(command, "launch", fixed(launches...))
	mustComplete(command, "connections", fixed(connections...))
	mustComplete(command, "on-starvation", fixed(api.StarvationPolicies()...))
	mustComplete(command, "root", fixed("host", "dir:", "oci:"))
	return command
}

// jobSpec merges the job file, the flags that were given and the command.
func (c *cli) jobSpec(command *cobra.Command, flags submitFlags, args []string) (api.JobSpec, error) {
	spec := api.JobSpec{}
	if flags.file != "" {
		read, publish, err := readJobFile(flags.file, c.in)
		if err != nil {
			return spec, err
		}
		spec, flags.publish = read, append(publish, flags.publish...)
	}
	if len(args) > 0 {
		spec.Command = args
	}
	overrideSpec(command, &spec, flags.spec)
	if err := overrideHealth(command, &spec, flags); err != nil {
		return spec, err
	}
	if err := c.addLists(&spec, flags); err != nil {
		return spec, usagef("%v", err)
	}
	if err := defaultSpec(command, &spec); err != nil {
		return spec, err
	}
	return spec, checkSpec(spec)
}

// overrideSpec takes over what was given as flags.
func overrideSpec(command *cobra.Command, spec *api.JobSpec, given api.JobSpec) {
	changed := command.Flags().Changed
	override(changed("name"), &spec.Name, given.Name)
	override(changed("tasks"), &spec.Tasks, given.Tasks)
	override(changed("cpus"), &spec.CPUs, given.CPUs)
	override(changed("mem"), &spec.MemBytes, given.MemBytes)
	override(changed("priority"), &spec.Priority, given.Priority)
	override(changed("cloud"), &spec.Cloud, given.Cloud)
	override(changed("placement"), &spec.Placement, given.Placement)
	override(changed("root"), &spec.Root, given.Root)
	override(changed("dir") || changed("workdir"), &spec.Dir, given.Dir)
	override(changed("user"), &spec.User, given.User)
	override(changed("cap-add"), &spec.CapAdd, given.CapAdd)
	override(changed("launch"), &spec.Launch, given.Launch)
	override(changed("connections"), &spec.Connections, given.Connections)
	override(changed("cpu-baseline"), &spec.CPUBaseline, given.CPUBaseline)
	override(changed("checkpoint-every"), &spec.CheckpointEvery, given.CheckpointEvery)
	override(changed("keep"), &spec.Keep, given.Keep)
	override(changed("keep-hourly"), &spec.KeepHourly, given.KeepHourly)
	override(changed("keep-daily"), &spec.KeepDaily, given.KeepDaily)
	override(changed("drill-every"), &spec.DrillEvery, given.DrillEvery)
	override(changed("walltime"), &spec.WalltimeMS, given.WalltimeMS)
	override(changed("max-restarts"), &spec.MaxRestarts, given.MaxRestarts)
	override(changed("on-starvation"), &spec.OnStarvation, given.OnStarvation)
	override(changed("starvation-period"), &spec.StarvationPeriodMS, given.StarvationPeriodMS)
	override(changed("progress-regex"), &spec.ProgressRegex, given.ProgressRegex)
	override(changed("webhook"), &spec.Webhook, given.Webhook)
}

// overrideHealth takes over what was given as flags. What is asked by flag takes
// the place of what the file asks.
func overrideHealth(command *cobra.Command, spec *api.JobSpec, flags submitFlags) error {
	any := false
	changed := func(name string) bool {
		given := command.Flags().Changed("health-" + name)
		any = any || given
		return given
	}
	h := api.HealthCheck{}
	if spec.Health != nil {
		h = *spec.Health
	}
	byCommand, byHTTP := changed("cmd"), changed("http")
	if byCommand || byHTTP {
		h.Command, h.HTTP = nil, flags.health.HTTP
	}
	if byCommand && flags.healthCommand == "" || byHTTP && flags.health.HTTP == "" {
		return usagef("the health check asks nothing: give --health-cmd a command, or --health-http a path")
	}
	if byCommand {
		h.Command = []string{"/bin/sh", "-c", flags.healthCommand}
	}
	override(changed("period"), &h.PeriodMS, flags.health.PeriodMS)
	override(changed("timeout"), &h.TimeoutMS, flags.health.TimeoutMS)
	override(changed("start-delay"), &h.StartDelayMS, flags.health.StartDelayMS)
	override(changed("retries"), &h.Retries, flags.health.Retries)
	if any {
		spec.Health = &h
	}
	return nil
}

func override[T any](changed bool, field *T, given T) {
	if changed {
		*field = given
	}
}

// addLists adds --env, --volume, --publish and --constraint to what the file said.
func (c *cli) addLists(spec *api.JobSpec, flags submitFlags) error {
	for _, text := range flags.env {
		key, value, err := parseEnv(text, c.getenv)
		if err != nil {
			return err
		}
		if spec.Env == nil {
			spec.Env = map[string]string{}
		}
		spec.Env[key] = value
	}
	for _, text := range flags.volumes {
		volume, err := parseVolume(text)
		if err != nil {
			return err
		}
		spec.Volumes = append(spec.Volumes, volume)
	}
	for _, text := range flags.publish {
		publish, err := parsePublish(text, max(spec.Tasks, 1))
		if err != nil {
			return err
		}
		spec.Publish = append(spec.Publish, publish)
	}
	constraints, err := parseLabels(flags.constraints, false)
	if err != nil {
		return err
	}
	if spec.Constraints == nil {
		spec.Constraints = constraints
	}
	maps.Copy(spec.Constraints, constraints)
	root, err := parseRoot(spec.Root)
	spec.Root = root
	return err
}

// defaultSpec fills what neither the file nor the flags said. A zero that was
// given on purpose stays, to be refused.
func defaultSpec(command *cobra.Command, spec *api.JobSpec) error {
	changed := command.Flags().Changed
	if spec.Tasks == 0 && !changed("tasks") {
		spec.Tasks = 1
	}
	if spec.CPUs == 0 && !changed("cpus") {
		spec.CPUs = defaultCPUs
	}
	if spec.MemBytes == 0 && !changed("mem") {
		spec.MemBytes = defaultMem
	}
	return nil
}

// defaultUser has a job run as who submits it, where nothing else was said: the
// token's user, whom the controller knows, or else the caller's account.
func defaultUser(ctx context.Context, controller *client.Client, spec *api.JobSpec) error {
	if spec.User != "" {
		return nil
	}
	token, err := controller.WhoAmI(ctx)
	if err != nil && !client.IsNotFound(err) { // an older controller knows admins only
		return err
	}
	if err == nil && token.Role == api.RoleUser {
		return nil
	}
	me, err := user.Current()
	if err != nil {
		return usagef("find out who you are: %v; say it with --user", err)
	}
	// By name on the node's own tree, which gives supplementary groups; by
	// number elsewhere, where the name may be unknown or somebody else.
	spec.User = me.Username
	if spec.Root != "" && spec.Root != string(api.RootHost) {
		spec.User = me.Uid + ":" + me.Gid
	}
	return nil
}
