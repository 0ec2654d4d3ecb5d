// Package cluster runs a whole Dormouse for the demonstration, the benchmarks
// and the end-to-end tests: the real binary, as a user starts it.
//
// Start runs `dormouse up` in the background with a state directory of its own
// and waits for the line `ready URL`. Every command goes through the command
// line. Stop ends it as Ctrl-C would and Leftovers tells what it did not clean up.
package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"dormouse/internal/child"
)

// Options say what to start.
type Options struct {
	Binary string   // path of bin/dormouse
	State  string   // state directory, made by the caller
	Args   []string // of `dormouse up`, such as --cloud east=2
	Config string   // configuration file: run `dormouse controller` with it instead
	Env    []string // added to the environment of `up`
	Log    io.Writer
}

// Cluster is a running `dormouse up`.
type Cluster struct {
	binary string
	env    []string
	up     *exec.Cmd
	exited chan struct{} // closed after up was waited for
	state  string
	id     string // of this cluster; names its cgroups
}

// ExitError is a command that ended with another status than 0.
type ExitError struct {
	Args   []string
	Status int
	Stderr string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("dormouse %s: exit status %d: %s", strings.Join(e.Args, " "), e.Status, strings.TrimSpace(e.Stderr))
}

// idLength is how much of a cluster's id its cgroups bear.
const idLength = 8

// Start runs `dormouse up` and returns when jobs can be submitted.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	c := &Cluster{binary: o.Binary, state: o.State, exited: make(chan struct{})}
	c.up = exec.Command(o.Binary, append([]string{"up", "--state", o.State}, o.Args...)...)
	if o.Config != "" {
		c.up = exec.Command(o.Binary, "controller", "--config", o.Config)
	}
	c.up.Env = append(os.Environ(), o.Env...)
	c.up.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C at the terminal is ours to pass on
	log := &tail{to: o.Log}
	c.up.Stderr = log
	stdout, err := c.up.StdoutPipe()
	if err != nil {
		return nil, err
	}
	// Told to end, `up` ends its jobs as well.
	if err := child.Start(c.up, syscall.SIGTERM); err != nil {
		return nil, fmt.Errorf("start %s up: %w", o.Binary, err)
	}
	ready := make(chan string, 1)
	go func() {
		defer close(c.exited)
		ready <- scanReady(stdout, log)
		io.Copy(log, stdout)
		c.up.Wait()
	}()
	url := ""
	select {
	case url = <-ready:
		if url == "" {
			<-c.exited
			return nil, fmt.Errorf("`dormouse up` ended before it was ready: %s", log)
		}
	case <-ctx.Done():
		c.up.Process.Signal(syscall.SIGTERM)
		<-c.exited
		return nil, fmt.Errorf("`dormouse up` was not ready in time: %s", log)
	}
	id, err := os.ReadFile(filepath.Join(o.State, "id"))
	if err != nil {
		return nil, fmt.Errorf("`dormouse up` is ready and has no id: %w", err)
	}
	if len(id) < idLength {
		return nil, fmt.Errorf("the cluster's id %q is too short", id)
	}
	c.id = "dormouse-" + strings.ToLower(string(id[:idLength]))
	if o.Config != "" {
		return c, c.readState(url)
	}
	return c, c.readEnv(ctx)
}

// Reach returns a Cluster that somebody else runs: its commands have env. It never
// exits, and leaves nothing of its own.
func Reach(binary string, env []string) *Cluster {
	return &Cluster{binary: binary, env: append(os.Environ(), env...), exited: make(chan struct{})}
}

// scanReady reads lines until `ready URL` and returns the URL; empty when it did
// not come.
func scanReady(stdout io.Reader, log io.Writer) string {
	lines := bufio.NewReader(stdout)
	for {
		line, err := lines.ReadString('\n')
		fmt.Fprint(log, line)
		if url, ok := strings.CutPrefix(line, "ready "); ok {
			return strings.TrimSpace(url)
		}
		if err != nil {
			return ""
		}
	}
}

// readState learns from a controller's files how to reach it.
func (c *Cluster) readState(url string) error {
	token, err := os.ReadFile(filepath.Join(c.state, "admin.token"))
	c.env = append(os.Environ(), "DORMOUSE_CONTROLLER="+url, "DORMOUSE_TOKEN="+strings.TrimSpace(string(token)),
		"DORMOUSE_CA="+filepath.Join(c.state, "pki", "ca.pem"))
	return err
}

// readEnv learns from `dormouse env` how another shell reaches this cluster.
func (c *Cluster) readEnv(ctx context.Context) error {
	out, err := c.Run(ctx, "env", "--state", c.state)
	if err != nil {
		return err
	}
	c.env = os.Environ()
	for _, line := range strings.Split(out, "\n") {
		pair, ok := strings.CutPrefix(strings.TrimSpace(line), "export ")
		if !ok {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		c.env = append(c.env, name+"="+strings.Trim(value, `'"`))
	}
	return nil
}

// Command returns a command of this cluster that is ready to run.
func (c *Cluster) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.binary, args...)
	cmd.Env = c.env
	return cmd
}

// Run runs one command and returns its standard output.
func (c *Cluster) Run(ctx context.Context, args ...string) (string, error) {
	return c.RunInput(ctx, nil, args...)
}

// RunInput is Run with something on standard input.
func (c *Cluster) RunInput(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := c.Command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return stdout.String(), &ExitError{Args: args, Status: exit.ExitCode(), Stderr: stderr.String()}
	}
	return stdout.String(), err
}

// JSON runs one command with -o json and decodes what it prints.
func (c *Cluster) JSON(ctx context.Context, into any, args ...string) error {
	args = append([]string{"-o", "json"}, args...)
	out, err := c.Run(ctx, args...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("dormouse %s: %w in %q", strings.Join(args, " "), err, out)
	}
	return nil
}

// Up returns the process of `dormouse up`, for tests that kill it.
func (c *Cluster) Up() *os.Process { return c.up.Process }

// Exited is closed when `dormouse up` has ended.
func (c *Cluster) Exited() <-chan struct{} { return c.exited }

// Stop ends `dormouse up` as Ctrl-C does and waits for it.
func (c *Cluster) Stop(ctx context.Context) error {
	c.up.Process.Signal(syscall.SIGINT)
	select {
	case <-c.exited:
	case <-ctx.Done():
		return fmt.Errorf("`dormouse up` did not end: %w", ctx.Err())
	}
	if status := c.up.ProcessState.ExitCode(); status != 0 {
		return fmt.Errorf("`dormouse up` ended with status %d", status)
	}
	return nil
}

// Leftovers names what this cluster still has on the machine: processes,
// mounts, cgroups and network devices. Other clusters may run beside it, so what counts is what
// bears the path of its state directory or its own id.
func (c *Cluster) Leftovers() ([]string, error) {
	var left []string
	ours := func(text string) bool { return strings.Contains(text, c.state) || strings.Contains(text, c.id) }
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Split(string(mounts), "\n") {
		if ours(line) {
			left = append(left, "mount: "+line)
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, process := range processes {
		cgroups, _ := os.ReadFile(filepath.Join(process, "cgroup"))
		command, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		if filepath.Base(process) == fmt.Sprint(os.Getpid()) || len(command) == 0 {
			continue // ended: its status waits for the machine's init
		}
		if ours(string(cgroups)) || ours(string(command)) {
			left = append(left, fmt.Sprintf("process %s: %q", filepath.Base(process), command))
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/dormouse*", "/sys/fs/cgroup/*/dormouse*"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			if ours(path) {
				left = append(left, path)
			}
		}
	}
	devices, err := c.devices()
	return append(left, devices...), err
}

// devices names what is left of the network between the nodes.
func (c *Cluster) devices() ([]string, error) {
	var plan struct{ Bridge string }
	raw, err := os.ReadFile(filepath.Join(c.state, "fabric.json"))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &plan); err != nil {
		return nil, fmt.Errorf("the plan of the nodes' network: %w", err)
	}
	if plan.Bridge == "" {
		return nil, errors.New("the plan of the nodes' network names no bridge")
	}
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var left []string
	for _, device := range all {
		if strings.HasPrefix(device.Name, plan.Bridge) {
			left = append(left, "network device: "+device.Name)
		}
	}
	return left, nil
}

// tail keeps the last bytes written, for error messages, and passes all on.
type tail struct {
	mu   sync.Mutex
	to   io.Writer
	last []byte
}

const tailBytes = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	if over := len(t.last) - tailBytes; over > 0 {
		t.last = t.last[over:]
	}
	if t.to != nil {
		return t.to.Write(p)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.last))
}

// WaitFor polls condition, which looks at something outside of this process,
// until it is true, fails or ctx ends.
func WaitFor(ctx context.Context, what string, condition func() (bool, error)) error {
	for {
		ok, err := condition()
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// State is the state directory of `dormouse up`.
func (c *Cluster) State() string { return c.state }
