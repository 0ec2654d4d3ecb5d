package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// An agent that is dead, or hangs, cannot freeze its tasks when the lease runs out,
// and the controller starts them elsewhere then. So a second, very small process
// watches the lease: when it runs out, the cgroup above all tasks is frozen; at once
// where there is no agent, and where there is one that does not say in time that it
// has frozen them itself.
// The guard outlives the agent; it ends when there is neither an agent nor a
// task. Whoever is newly started finds the guard of its predecessor.
//
// The guard is this same program, started with guardVariable set.
const guardVariable = "DORMOUSE_LEASE_GUARD"

const (
	guardLock = "guard.lock" // held by the guard
	// recheck is how soon a guard that has frozen the tasks sees a new lease.
	recheck = 100 * time.Millisecond
	// agentsShare of the lease's term is what a living agent has for freezing its
	// tasks. The controller waits for a third of the term before it starts them
	// elsewhere.
	agentsShare = 0.1
)

// guardDuty is what a guard must know, as JSON in guardVariable.
type guardDuty struct {
	State  string `json:"state"`
	Cgroup string `json:"cgroup"` // directory of the cgroup above all tasks
}

// A guard begins, and ends, here, before anything of the program has run.
func init() {
	text, ok := os.LookupEnv(guardVariable)
	if !ok {
		return
	}
	var duty guardDuty
	err := json.Unmarshal([]byte(text), &duty)
	if err == nil {
		err = duty.keep()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dormouse: lease guard:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startGuard starts a guard unless there is one. It is in a session and a
// cgroup of its own, so that it does not end with the agent.
func (a *Agent) startGuard() error {
	jobs := a.boxes.Cgroup()
	duty, err := json.Marshal(guardDuty{State: a.config.State, Cgroup: jobs})
	if err != nil {
		return err
	}
	home := filepath.Join(filepath.Dir(jobs), "guard")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return fmt.Errorf("a cgroup for the lease guard: %w", err)
	}
	dir, err := os.Open(home)
	if err != nil {
		return err
	}
	defer dir.Close()
	guard := exec.Command("/proc/self/exe")
	guard.Env = []string{guardVariable + "=" + string(duty)}
	guard.Dir = "/"
	guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := guard.Start(); err != nil {
		return fmt.Errorf("start the lease guard: %w", err)
	}
	go guard.Wait() // it ends at once when there is another, else after us
	return nil
}

// keep watches the lease until nobody needs it.
func (d *guardDuty) keep() error {
	lock, err := os.OpenFile(filepath.Join(d.State, guardLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil // there is another
	}
	if err != nil {
		return err
	}
	for !d.over() {
		left, fails, err := d.look()
		if err != nil {
			return err
		}
		if left > 0 || fails {
			if err := d.freeze(left <= 0); err != nil {
				return err
			}
		}
		time.Sleep(max(left, recheck))
	}
	return nil
}

// look returns how long the lease lasts, and whether the agent has failed to do what
// is to be done when it is over. A living agent freezes its tasks itself, and
// better: it knows where CRIU is at work. Without a lease there is nothing to guard
// yet.
func (d *guardDuty) look() (left time.Duration, fails bool, err error) {
	var stored storedLease
	err = readJSON(filepath.Join(d.State, leaseFile), &stored)
	if notExist(err) || err == nil && stored.Boot != bootID() {
		return time.Second, false, nil
	}
	left = stored.Until - bootTime()
	late := -left >= time.Duration(agentsShare*float64(stored.Term))
	return left, !d.agentLives() || late && !stored.Held, err
}

// freeze sets the state of the cgroup above all tasks: cgroups(7), v2.
func (d *guardDuty) freeze(on bool) error {
	err := freezeCgroup(d.Cgroup, on)
	if notExist(err) {
		return nil
	}
	return err
}

func freezeCgroup(dir string, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	path := filepath.Join(dir, "cgroup.freeze")
	have, err := os.ReadFile(path)
	if err != nil || strings.TrimSpace(string(have)) == value {
		return err
	}
	return os.WriteFile(path, []byte(value), 0)
}

// over reports whether there is neither an agent nor a task.
func (d *guardDuty) over() bool {
	events, err := os.ReadFile(filepath.Join(d.Cgroup, "cgroup.events"))
	if err == nil && strings.Contains(string(events), "populated 1") {
		return false
	}
	return !d.agentLives()
}

// agentLives reports whether an agent holds the state directory's lock.
func (d *guardDuty) agentLives() bool {
	lock, err := os.OpenFile(filepath.Join(d.State, lockFile), os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer lock.Close()
	return unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}
