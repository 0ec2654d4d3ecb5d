package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"dormouse/agent/sandbox/pid1"
)

// What the tasks of a job know of each other. A launcher such as mpirun in one
// task starts its daemons in the others with dormouse-rsh, which talks to the
// pid 1 there; host files and the environment tell the launchers so, and a
// program runs unmodified.

// taskName is a task's host name, on every node and in every run.
func taskName(index int) string { return "task-" + strconv.Itoa(index) }

// tasks is how many the job has.
func (c *Config) tasks() int { return max(1, c.Tasks) }

// slots is how many processes of a parallel program a task has room for.
func (c *Config) slots() int {
	if c.Slots > 0 {
		return c.Slots
	}
	return max(1, int(math.Floor(c.CPUs)))
}

// jobEnv is what every program of a job is told.
func (c *Config) jobEnv() map[string]string {
	if c.Job == "" {
		return nil
	}
	names := make([]string, c.tasks())
	for i := range names {
		names[i] = taskName(i)
	}
	return map[string]string{
		"DORMOUSE_JOB":   c.Job,
		"DORMOUSE_TASK":  strconv.Itoa(c.Task),
		"DORMOUSE_TASKS": strconv.Itoa(c.tasks()),
		"DORMOUSE_HOSTS": strings.Join(names, ","),
	}
}

// launcherEnv is what makes the launchers of MPI programs, and the programs,
// use the job's tasks and its network.
func (c *Config) launcherEnv() map[string]string {
	if c.tasks() == 1 {
		return nil
	}
	inside := func(name string) string { return filepath.Join(pid1.Directory, name) }
	rsh := inside(filepath.Join(pid1.BinDir, pid1.RemoteShell))
	device := "eth0"
	env := map[string]string{
		// What remote commands are given to, also for a user whose account names no
		// shell: launchers write for the shell they find here.
		"SHELL": "/bin/sh",
		// Open MPI 4: mpirun(1), "MCA parameters" by environment.
		"OMPI_MCA_plm_rsh_agent":         rsh,
		"OMPI_MCA_plm_rsh_no_tree_spawn": "1",
		"OMPI_MCA_orte_default_hostfile": inside(pid1.OpenMPIHosts),
		"OMPI_MCA_oob_tcp_if_include":    device,
		// Open MPI 5 starts through PRRTE.
		"PRTE_MCA_plm_ssh_agent":         rsh,
		"PRTE_MCA_plm_ssh_no_tree_spawn": "1",
		"PRTE_MCA_prte_default_hostfile": inside(pid1.OpenMPIHosts),
		"PRTE_MCA_prte_if_include":       device,
		// Both.
		"OMPI_MCA_btl_tcp_if_include": device,
		// MPICH and others with Hydra.
		"HYDRA_LAUNCHER":      "ssh",
		"HYDRA_LAUNCHER_EXEC": rsh,
		"HYDRA_HOST_FILE":     inside(pid1.HydraHosts),
		"HYDRA_IFACE":         device,
		"UCX_NET_DEVICES":     device,
	}
	// Tasks share their nodes' processors, and each believes that it has them
	// for itself: bound ranks of two tasks would pile up on the first ones.
	maps.Copy(env, map[string]string{
		"OMPI_MCA_hwloc_base_binding_policy":    "none",
		"PRTE_MCA_hwloc_default_binding_policy": "none",
	})
	return env
}

// rootEnv is for programs that refuse to be run by root unless told so: in a
// sandbox root is the user that a job gets unless it asks for another.
func (c *Config) rootEnv() []string {
	if c.tasks() == 1 {
		return nil
	}
	return []string{
		"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
		"PRTE_ALLOW_RUN_AS_ROOT=1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1",
	}
}

// writeHostFiles puts the host files of a job with several tasks where
// launcherEnv says.
func (s *Sandbox) writeHostFiles() error {
	cfg := &s.state.Config
	if cfg.tasks() == 1 {
		return nil
	}
	for name, format := range map[string]string{pid1.OpenMPIHosts: "%s slots=%d\n", pid1.HydraHosts: "%s:%d\n"} {
		var content strings.Builder
		for i := range cfg.tasks() {
			fmt.Fprintf(&content, format, taskName(i), cfg.slots())
		}
		path := filepath.Join(s.UpperDir(), pid1.Directory, name)
		if err := errors.Join(os.WriteFile(path, []byte(content.String()), 0o600), os.Chmod(path, 0o644)); err != nil {
			return fmt.Errorf("cannot write a host file: %w", err)
		}
	}
	return nil
}
