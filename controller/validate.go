package controller

import (
	"encoding/json"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/internal/lazyregexp"
	"dormouse/monitor/policy"
)

// What a spec leaves out.
const (
	defaultCPUs = 1
	defaultMem  = 512 << 20
	leastMem    = 4 << 20 // less than any process tree needs
	// leastWalltime leaves time for the checkpoint before its end.
	leastWalltime = 10 * time.Second
	mostTasks     = 1<<(32-networkBits) - 3 // the addresses of a job's subnet, less those of networkBits
)

var (
	jobName    = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	labelText  = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$`)
	capName    = lazyregexp.New(`^(CAP_)?[A-Z_]+$`)
	userName   = lazyregexp.New(`^[A-Za-z0-9._-]+(:[A-Za-z0-9._-]+)?$`)
	baselines  = []string{"", "native", "x86-64-v2", "x86-64-v3", "x86-64-v4"}
	explicitly = []string{"cpus", "mem_bytes", "tasks"} // a zero that was written is not a default
)

// completeSpec checks what a user submitted, and fills in what was left out.
// raw is the request's body, which tells a zero from nothing.
func completeSpec(spec api.JobSpec, raw []byte) (api.JobSpec, error) {
	if err := refuseZeros(raw); err != nil {
		return spec, err
	}
	if spec.Tasks == 0 {
		spec.Tasks = 1
	}
	if spec.CPUs == 0 {
		spec.CPUs = defaultCPUs
	}
	if spec.MemBytes == 0 {
		spec.MemBytes = defaultMem
	}
	for _, check := range []func(*api.JobSpec) error{checkCommand, checkResources, checkRoot, checkPlaces, checkNames, checkLaunch, checkNetwork, checkPolicies, checkPlacement, checkMonitor} {
		if err := check(&spec); err != nil {
			return spec, err
		}
	}
	return spec, nil
}

func refuseZeros(raw []byte) error {
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		return nil // not JSON: decoded by someone else
	}
	for _, name := range explicitly {
		var n float64
		if value, given := fields[name]; given && json.Unmarshal(value, &n) == nil && n == 0 && string(value) != "null" {
			return invalid("%s must be greater than 0, got %s", name, value)
		}
	}
	return nil
}

func checkCommand(s *api.JobSpec) error {
	if len(s.Command) == 0 || s.Command[0] == "" {
		return invalid("the command is empty: name the program to run and its arguments")
	}
	for _, arg := range s.Command {
		if strings.ContainsRune(arg, 0) {
			return invalid("the command has an argument with a zero byte")
		}
	}
	return nil
}

func checkResources(s *api.JobSpec) error {
	switch {
	case s.CPUs < 0:
		return invalid("cpus must be greater than 0, got %g", s.CPUs)
	case s.MemBytes < 0:
		return invalid("mem_bytes must be greater than 0, got %d", s.MemBytes)
	case s.MemBytes < leastMem:
		return invalid("mem_bytes must be at least %d (4 MiB), got %d", leastMem, s.MemBytes)
	case s.Tasks < 0:
		return invalid("tasks must be greater than 0, got %d", s.Tasks)
	case s.Tasks > mostTasks:
		return invalid("tasks must be at most %d, got %d", mostTasks, s.Tasks)
	case s.MaxRestarts < 0:
		return invalid("max_restarts must be 0 or greater, got %d", s.MaxRestarts)
	}
	return nil
}

func checkRoot(s *api.JobSpec) error {
	kind, rest, _ := strings.Cut(s.Root, ":")
	switch {
	case s.Root == "" || s.Root == string(api.RootHost) || path.IsAbs(s.Root):
		return nil
	case kind == string(api.RootDir) && path.IsAbs(rest), kind == string(api.RootOCI) && rest != "":
		return nil
	case kind == string(api.RootDir):
		return invalid("the root %q needs an absolute path after dir:", s.Root)
	}
	return invalid("the root must be host, dir:PATH, oci:PATH, oci:REFERENCE or an absolute path, got %q", s.Root)
}

func checkPlaces(s *api.JobSpec) error {
	if s.Dir != "" && !path.IsAbs(s.Dir) {
		return invalid("dir must be an absolute path inside the sandbox, got %q", s.Dir)
	}
	for _, v := range s.Volumes {
		if !path.IsAbs(v.Source) || !path.IsAbs(v.Destination) || path.Clean(v.Destination) == "/" {
			return invalid("a volume needs two absolute paths, SRC:DST, and DST must not be /, got %q:%q", v.Source, v.Destination)
		}
	}
	return nil
}

func checkNames(s *api.JobSpec) error {
	if s.Name != "" && !jobName.MatchString(s.Name) {
		return invalid("the name must be up to 63 letters, digits, dots, dashes and underscores, got %q", s.Name)
	}
	for key := range s.Env {
		if key == "" || strings.ContainsAny(key, "=\x00") {
			return invalid("an environment variable cannot be named %q", key)
		}
	}
	if s.User != "" && !userName.MatchString(s.User) {
		return invalid("the user must be NAME, UID, NAME:GROUP or UID:GID, got %q", s.User)
	}
	for _, name := range s.CapAdd {
		if !capName.MatchString(name) {
			return invalid("%q is not the name of a capability, such as CAP_NET_RAW", name)
		}
	}
	if !slices.Contains(baselines, s.CPUBaseline) {
		return invalid("cpu_baseline must be native, x86-64-v2, x86-64-v3 or x86-64-v4, got %q", s.CPUBaseline)
	}
	return nil
}

// checkMonitor checks what is asked of the monitor, and fills in the rest.
func checkMonitor(s *api.JobSpec) error {
	if err := policy.Check(*s); err != nil {
		return invalid("%v", err)
	}
	policy.Fill(s)
	return nil
}

// checkPlacement checks where tasks may go.
func checkPlacement(s *api.JobSpec) error {
	if !slices.Contains([]string{"", api.PlacementSpread, api.PlacementPack}, s.Placement) {
		return invalid("placement must be spread or pack, got %q", s.Placement)
	}
	for key, value := range s.Constraints {
		if err := checkLabel(key, value); err != nil {
			return err
		}
		if value == "" {
			return invalid("the constraint %s needs a value, as in %s=VALUE", key, key)
		}
	}
	return nil
}

// checkLabel checks a label of a node. An empty value is none.
func checkLabel(key, value string) error {
	if !labelText.MatchString(key) || value != "" && !labelText.MatchString(value) {
		return invalid("a label and its value are up to 63 letters, digits, dots, dashes, slashes and underscores, got %q=%q", key, value)
	}
	return nil
}

// checkLaunch settles where the command runs.
func checkLaunch(s *api.JobSpec) error {
	switch s.Launch {
	case api.LaunchEach, api.LaunchFirst:
	case "", api.LaunchAuto:
		s.Launch = api.LaunchEach
		if s.Tasks > 1 && launcher.MatchString(path.Base(s.Command[0])) {
			s.Launch = api.LaunchFirst
		}
	default:
		return invalid("launch must be auto, each or first, got %q", s.Launch)
	}
	return nil
}

// launcher are the programs of the MPIs that start the others themselves.
var launcher = lazyregexp.New(`^(mpirun|mpiexec|orterun|oshrun|prterun)([.-][a-z0-9.]+)?$`)

// checkNetwork checks what the job's network lets in and out.
func checkNetwork(s *api.JobSpec) error {
	if !slices.Contains([]string{"", api.ConnectionsRefuse, api.ConnectionsClose, api.ConnectionsKeep}, s.Connections) {
		return invalid("connections must be refuse, close or keep, got %q", s.Connections)
	}
	for i := range s.Publish {
		p := &s.Publish[i]
		if p.Protocol == "" {
			p.Protocol = "tcp"
		}
		if p.Target == 0 {
			p.Target = p.Port
		}
		switch {
		case p.Protocol != "tcp" && p.Protocol != "udp":
			return invalid("a published port is tcp or udp, got %q", p.Protocol)
		case p.Task < 0 || p.Task >= s.Tasks:
			return invalid("there is no task %d to publish a port of: the job has %d, counted from 0", p.Task, s.Tasks)
		case p.Port < 1 || p.Port > 65535 || p.Target < 1 || p.Target > 65535:
			return invalid("a published port is from 1 to 65535, got %d:%d", p.Port, p.Target)
		}
		for _, q := range s.Publish[:i] {
			if p.Port == q.Port && p.Protocol == q.Protocol {
				return invalid("port %d/%s is published twice", p.Port, p.Protocol)
			}
		}
	}
	return nil
}

// checkPolicies checks when the job is checkpointed by itself, and what is kept.
func checkPolicies(s *api.JobSpec) error {
	for name, n := range map[string]int64{
		"keep": int64(s.Keep), "keep_hourly": int64(s.KeepHourly), "keep_daily": int64(s.KeepDaily), "drill_every": int64(s.DrillEvery),
	} {
		if n < 0 {
			return invalid("%s must be 0 or greater, got %d", name, n)
		}
	}
	if s.WalltimeMS != 0 && (s.WalltimeMS < leastWalltime.Milliseconds() || s.WalltimeMS > interval.Longest.Milliseconds()) {
		return invalid("walltime_ms must be from %d to %d, got %d", leastWalltime.Milliseconds(), interval.Longest.Milliseconds(), s.WalltimeMS)
	}
	if _, err := interval.Parse(s.CheckpointEvery); err != nil {
		return invalid("checkpoint_every: %v", err)
	}
	return nil
}

// parseSignal reads TERM, SIGTERM or 15; 0 for nothing.
func parseSignal(name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	const last = 64 // SIGRTMAX
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > last {
			return 0, invalid("a signal's number is from 1 to %d, got %d", last, n)
		}
		return n, nil
	}
	upper := strings.ToUpper(name)
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if n := unix.SignalNum(upper); n != syscall.Signal(0) {
		return int(n), nil
	}
	return 0, invalid("there is no signal %q: use a name such as TERM or a number", name)
}
