package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/internal/lazyregexp"
	"dormouse/monitor/policy"
)

// What a task may at least be given; less cannot hold a program.
const (
	minCPUs = 0.01
	minMem  = 4 << 20
	// More than any machine has: a slip of the keyboard.
	maxCPUs  = 1 << 16
	maxMem   = 1 << 50
	maxTasks = 1 << 16
)

// jobName is what a job may be called: it appears in host names, files, tables.
var jobName = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

var cpuBaselines = []string{"native", "x86-64-v2", "x86-64-v3", "x86-64-v4"}

var placements = []string{api.PlacementSpread, api.PlacementPack}

// readJobFile reads a job from YAML (of which JSON is a part). Its fields have
// the names of the API; a size may be text such as 2G, a volume SRC:DST[:ro].
// Published ports that are texts are returned as such: what they mean depends on
// the number of tasks.
func readJobFile(name string, stdin io.Reader) (spec api.JobSpec, publish []string, err error) {
	content, err := readFileOrStdin(name, stdin)
	if err != nil {
		return spec, nil, usagef("read the job file: %v", err)
	}
	spec, publish, err = parseJobFile(content)
	if err != nil {
		return spec, nil, usagef("the job file %s: %v", name, err)
	}
	return spec, publish, nil
}

func readFileOrStdin(name string, stdin io.Reader) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(name)
}

func parseJobFile(content []byte) (spec api.JobSpec, publish []string, err error) {
	fields := map[string]any{}
	if err := yaml.Unmarshal(content, &fields); err != nil {
		return spec, nil, fmt.Errorf("is not YAML: %w", err)
	}
	if text, ok := fields["mem_bytes"].(string); ok {
		if fields["mem_bytes"], err = parseSize(text); err != nil {
			return spec, nil, err
		}
	}
	health, _ := fields["health"].(map[string]any)
	for _, in := range []struct {
		fields map[string]any
		names  []string
	}{{fields, []string{"walltime_ms", "starvation_period_ms"}}, {health, []string{"period_ms", "timeout_ms", "start_delay_ms"}}} {
		if err := parseDurations(in.fields, in.names); err != nil {
			return spec, nil, err
		}
	}
	if volumes, ok := fields["volumes"].([]any); ok {
		if err := parseVolumes(volumes); err != nil {
			return spec, nil, err
		}
	}
	if ports, ok := fields["publish"].([]any); ok {
		fields["publish"], publish = splitTexts(ports)
	}
	// Through JSON, so that the API's own field names hold, and a misspelt one
	// is refused.
	encoded, err := json.Marshal(fields)
	if err != nil {
		return spec, nil, fmt.Errorf("holds what a job cannot: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(encoded))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&spec); err != nil {
		return api.JobSpec{}, nil, fieldError(err)
	}
	return spec, publish, nil
}

// parseDurations replaces the durations that are texts by their milliseconds.
func parseDurations(fields map[string]any, names []string) (err error) {
	for _, name := range names {
		if text, ok := fields[name].(string); ok {
			if fields[name], err = parseMilliseconds(text); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseVolumes replaces the volumes that are texts by what they mean.
func parseVolumes(volumes []any) error {
	for i := range volumes {
		text, ok := volumes[i].(string)
		if !ok {
			continue
		}
		volume, err := parseVolume(text)
		if err != nil {
			return err
		}
		volumes[i] = volume
	}
	return nil
}

// splitTexts separates texts, and numbers as texts, from the rest.
func splitTexts(all []any) (rest []any, texts []string) {
	for _, one := range all {
		switch value := one.(type) {
		case string:
			texts = append(texts, value)
		case int:
			texts = append(texts, strconv.Itoa(value))
		default:
			rest = append(rest, one)
		}
	}
	return rest, texts
}

func fieldError(err error) error {
	var kind *json.UnmarshalTypeError
	if errors.As(err, &kind) {
		return fmt.Errorf("the field %s cannot be a %s", kind.Field, kind.Value)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return fmt.Errorf("there is no field %s", name)
	}
	return err
}

// parseVolume reads SRC:DST[:ro|:rw].
func parseVolume(text string) (api.Volume, error) {
	parts := strings.Split(text, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return api.Volume{}, fmt.Errorf("the volume %q is not SRC:DST or SRC:DST:ro", text)
	}
	volume := api.Volume{Source: parts[0], Destination: parts[1]}
	if len(parts) == 3 {
		switch parts[2] {
		case "ro":
			volume.ReadOnly = true
		case "rw":
		default:
			return api.Volume{}, fmt.Errorf("the volume %q ends in %q, but only ro or rw may stand there", text, parts[2])
		}
	}
	return volume, nil
}

// parseEnv reads K=V, or K alone for a variable of the caller's environment.
func parseEnv(text string, getenv func(string) string) (key, value string, err error) {
	key, value, given := strings.Cut(text, "=")
	if !given {
		value = getenv(key)
	}
	if key == "" || strings.ContainsAny(key, " \t\n\x00") {
		return "", "", fmt.Errorf("the environment variable %q is not NAME=VALUE", text)
	}
	return key, value, nil
}

// parseRoot makes paths in a root absolute: they are read on the node, where the
// caller's working directory means nothing.
func parseRoot(text string) (string, error) {
	kind, rest, tagged := strings.Cut(text, ":")
	switch {
	case text == "" || text == string(api.RootHost):
		return text, nil
	case tagged && kind == string(api.RootDir):
		return absolute(kind+":", rest)
	case tagged && kind == string(api.RootOCI) && (strings.HasPrefix(rest, ".") || fileExists(rest)):
		return absolute(kind+":", rest)
	case tagged && kind == string(api.RootOCI) && rest != "":
		return text, nil
	case strings.HasPrefix(text, "/") || strings.HasPrefix(text, "."):
		return absolute("", text)
	}
	return "", fmt.Errorf("the root %q is not host, dir:PATH, oci:PATH, oci:REFERENCE or a path", text)
}

func absolute(prefix, name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("the root %q names no path", prefix)
	}
	full, err := filepath.Abs(name)
	if err != nil {
		return "", fmt.Errorf("find the root %s: %w", name, err)
	}
	return prefix + full, nil
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// checkSpec refuses what no controller would accept.
func checkSpec(spec api.JobSpec) error {
	switch {
	case len(spec.Command) == 0 || spec.Command[0] == "":
		return usagef("there is no command: give it after --, as in `dormouse submit -- sleep 60`")
	case spec.Name != "" && !jobName.MatchString(spec.Name):
		return badName(spec.Name)
	case spec.Tasks < 1 || spec.Tasks > maxTasks:
		return usagef("a job has at least 1 task and at most %d, not %d", maxTasks, spec.Tasks)
	case !(spec.CPUs >= minCPUs && spec.CPUs <= maxCPUs):
		return usagef("%s processors cannot be given to a task: it takes at least %v and at most %d", strconv.FormatFloat(spec.CPUs, 'f', -1, 64), minCPUs, maxCPUs)
	case spec.MemBytes < minMem:
		return usagef("%s of memory hold no program: a task takes at least %s", humanSize(spec.MemBytes), humanSize(minMem))
	case spec.MemBytes > maxMem:
		return usagef("no machine has %s of memory", humanSize(spec.MemBytes))
	case spec.Priority > math.MaxInt32 || spec.Priority < math.MinInt32:
		return usagef("the priority %d does not fit into 32 bits", spec.Priority)
	case min(spec.Keep, spec.KeepHourly, spec.KeepDaily) < 0:
		return usagef("%d checkpoints cannot be kept: --keep, --keep-hourly and --keep-daily are 0 or more", min(spec.Keep, spec.KeepHourly, spec.KeepDaily))
	case spec.DrillEvery < 0:
		return usagef("one in %d checkpoints cannot be tried: --drill-every is 0 (none) or more", spec.DrillEvery)
	case spec.MaxRestarts < 0:
		return usagef("%d restarts cannot be allowed: --max-restarts is 0 or more", spec.MaxRestarts)
	case spec.CPUBaseline != "" && !slices.Contains(cpuBaselines, spec.CPUBaseline):
		return usagef("the CPU baseline %q is not one of %s", spec.CPUBaseline, strings.Join(cpuBaselines, ", "))
	case spec.Placement != "" && !slices.Contains(placements, spec.Placement):
		return usagef("the placement %q is not one of %s", spec.Placement, strings.Join(placements, ", "))
	case spec.Dir != "" && !path.IsAbs(spec.Dir):
		return usagef("the working directory %q is not absolute: it is one inside the sandbox, such as /data", spec.Dir)
	}
	if _, err := interval.Parse(spec.CheckpointEvery); err != nil {
		return usagef("--checkpoint-every: %v", err)
	}
	if err := checkParallel(spec); err != nil {
		return err
	}
	if err := policy.Check(spec); err != nil {
		return usagef("%v", err)
	}
	return checkVolumes(spec.Volumes)
}

func badName(name string) error {
	return usagef("the name %q is not made of at most 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit", name)
}

func checkVolumes(volumes []api.Volume) error {
	taken := map[string]bool{}
	for _, volume := range volumes {
		destination := path.Clean(volume.Destination)
		switch {
		case !path.IsAbs(volume.Source):
			return usagef("the volume's source %q is not an absolute path on the node", volume.Source)
		case !path.IsAbs(volume.Destination) || destination == "/":
			return usagef("the volume's destination %q is not an absolute path below / in the sandbox", volume.Destination)
		case taken[destination]:
			return usagef("two volumes have the destination %s", destination)
		}
		taken[destination] = true
	}
	return nil
}
