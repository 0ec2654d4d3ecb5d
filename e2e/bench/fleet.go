package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"dormouse/api"
	"dormouse/e2e/fleet"
	"dormouse/internal/child"
)

// What `-fleet` measures: one real controller on a bbolt store against simulated
// agents, ten jobs to each.
const (
	jobsPerAgent = 10
	submitters   = 32 // clients that submit, each one job after the other
	readers      = 4  // clients that read while the others submit, in their own process
	// readPause is between two reads of a reader: people and scripts look now and then.
	readPause  = 50 * time.Millisecond
	quietTime  = 10 * time.Second // of heartbeats only
	fleetCloud = "fleet"
	serverName = "localhost" // in the certificate of every controller
)

// fleetRow is what was measured with one size of fleet.
type fleetRow struct {
	Agents int `json:"agents"`
	Jobs   int `json:"jobs"`
	// Rate is how many submissions a second there were to be; 0: as many as are taken.
	Rate int `json:"rate"`
	// JoinMS is from the fleet's start until all agents were welcomed.
	JoinMS float64 `json:"join_ms"`
	// Submissions per second, sustained over all jobs.
	Submissions float64 `json:"submissions_per_s"`
	// ControllerMS is the controller's CPU time for one job, from its submission to
	// its start, with all reads, looks and heartbeats meanwhile. SimulatorMS is what
	// the clients and agents take for it on the same processors.
	ControllerMS float64 `json:"controller_cpu_ms_per_job"`
	SimulatorMS  float64 `json:"simulator_cpu_ms_per_job"`
	// Submit, and Reads by kind, are what the client waited, while jobs were
	// submitted; QuietReads when all of them ran.
	Submit     latency            `json:"submit"`
	Reads      map[string]latency `json:"reads"`
	QuietReads map[string]latency `json:"quiet_reads"`
	// ToStart is from the begin of the request to the arrival of the start command.
	ToStart latency `json:"submit_to_start"`
	// AllRunningMS is from the first submission until every job is told to start.
	AllRunningMS float64 `json:"all_started_ms"`
	PeakBytes    int64   `json:"peak_resident_bytes"`
	StoreBytes   int64   `json:"store_bytes"`
	// HeartbeatUS is the controller's CPU time for one heartbeat, everything that
	// it does meanwhile included.
	HeartbeatUS float64 `json:"cpu_us_per_heartbeat"`
	// RestartMS is from the start of a new controller, after kill -9, until reads are
	// served, ReconnectMS until all agents are welcomed as well.
	RestartMS   float64 `json:"restart_reads_ms"`
	ReconnectMS float64 `json:"restart_full_ms"`
}

// latency is a distribution in milliseconds.
type latency struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50_ms"`
	P99   float64 `json:"p99_ms"`
	Max   float64 `json:"max_ms"`
}

func latencyOf(samples []time.Duration) latency {
	if len(samples) == 0 {
		return latency{}
	}
	slices.Sort(samples)
	at := func(q float64) float64 { return ms(samples[int(q*float64(len(samples)-1))]) }
	return latency{Count: len(samples), P50: at(0.5), P99: at(0.99), Max: at(1)}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func runFleet(ctx context.Context, sizes string, rate int, file, binary string) error {
	var rows []fleetRow
	for _, size := range strings.Split(sizes, ",") {
		agents, err := strconv.Atoi(size)
		if err != nil || agents <= 0 {
			return fmt.Errorf("-agents: %q is not a number of agents", size)
		}
		fmt.Fprintf(os.Stderr, "%d agents, %d jobs\n", agents, agents*jobsPerAgent)
		row, err := measureFleet(ctx, binary, agents, rate)
		if err != nil {
			return fmt.Errorf("%d agents: %w", agents, err)
		}
		rows = append(rows, row)
	}
	printFleet(rows)
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// measureFleet measures one size, with a controller and a store of its own.
func measureFleet(ctx context.Context, binary string, agents, rate int) (row fleetRow, err error) {
	dir, err := os.MkdirTemp("/var/tmp", "dormouse-fleet-")
	if err != nil {
		return row, err
	}
	defer os.RemoveAll(dir)
	s := &server{binary: binary, dir: dir}
	if err := s.start(ctx); err != nil {
		return row, err
	}
	defer s.kill()
	b := &fleetBench{server: s, starts: make(map[string]time.Time)}
	if err := b.trust(); err != nil {
		return row, err
	}
	row.Agents, row.Jobs, row.Rate = agents, agents*jobsPerAgent, rate
	begin := time.Now()
	f, err := b.join(ctx, agents)
	if err != nil {
		return row, err
	}
	defer f.Stop()
	row.JoinMS = ms(time.Since(begin))
	if err := b.load(ctx, &row); err != nil {
		return row, err
	}
	if err := b.quiet(ctx, f, &row); err != nil {
		return row, err
	}
	return row, b.restart(ctx, f, &row)
}

// fleetBench is one controller and those who talk to it.
type fleetBench struct {
	*client
	server *server

	mu     sync.Mutex
	starts map[string]time.Time // by job: when its agent was told to start it
	ids    []string
}

// trust reads how to reach the controller.
func (b *fleetBench) trust() error {
	ca, err := os.ReadFile(filepath.Join(b.server.state(), "pki", "ca.pem"))
	if err != nil {
		return err
	}
	token, err := os.ReadFile(filepath.Join(b.server.state(), "admin.token"))
	if err != nil {
		return err
	}
	b.client = &client{URL: b.server.url(), Token: strings.TrimSpace(string(token)), CA: ca}
	return b.open()
}

func (b *fleetBench) join(ctx context.Context, agents int) (*fleet.Fleet, error) {
	token, err := os.ReadFile(filepath.Join(b.server.state(), "join.token"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return fleet.Start(ctx, fleet.Options{
		Address: b.server.address, ServerName: serverName, CA: b.roots, Token: strings.TrimSpace(string(token)), Cloud: fleetCloud,
		Agents: agents, CPUs: jobsPerAgent + 2, MemBytes: 64 << 30, Started: b.started,
	})
}

func (b *fleetBench) started(job string, at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.starts[job] = at
}

// load submits all jobs while others read, and waits until all have started.
func (b *fleetBench) load(ctx context.Context, row *fleetRow) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	controller, simulator, err := b.cpu()
	if err != nil {
		return err
	}
	reading, err := startReading(b.client)
	if err != nil {
		return err
	}
	begin := time.Now()
	asked, waits, err := b.submit(ctx, row.Jobs, row.Rate, reading)
	row.Submissions = float64(row.Jobs) / time.Since(begin).Seconds()
	waited, readers, readErr := reading.end()
	if err := errors.Join(err, readErr); err != nil {
		return err
	}
	row.Submit, row.Reads = latencyOf(waits), waited
	if err := b.allStarted(ctx, row.Jobs); err != nil {
		return err
	}
	controllerAfter, simulatorAfter, err := b.cpu()
	if err != nil {
		return err
	}
	row.ControllerMS = ms(controllerAfter-controller) / float64(row.Jobs)
	row.SimulatorMS = ms(simulatorAfter-simulator+readers) / float64(row.Jobs)
	var toStart []time.Duration
	last := begin
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, at := range asked {
		toStart = append(toStart, b.starts[id].Sub(at))
		if b.starts[id].After(last) {
			last = b.starts[id]
		}
	}
	row.ToStart, row.AllRunningMS = latencyOf(toStart), ms(last.Sub(begin))
	return nil
}

// cpu is the processor time that the controller, and this process, have used.
func (b *fleetBench) cpu() (controller, simulator time.Duration, err error) {
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		return 0, 0, err
	}
	controller, err = b.server.cpu()
	return controller, time.Duration(own.Utime.Nano() + own.Stime.Nano()), err
}

// due are the moments at which n jobs are to be submitted: rate in a second, or the
// zero time of all.
func due(ctx context.Context, n, rate int) <-chan time.Time {
	moments := make(chan time.Time, n)
	if rate == 0 {
		for range n {
			moments <- time.Time{}
		}
		close(moments)
		return moments
	}
	begin := time.Now()
	go func() {
		defer close(moments)
		for i := range n {
			at := begin.Add(time.Duration(i) * time.Second / time.Duration(rate))
			select {
			case <-time.After(time.Until(at)):
				moments <- at
			case <-ctx.Done():
				return
			}
		}
	}()
	return moments
}

// submit submits n jobs, tells those who read of them, and returns when each was
// asked for and how long it took. One that was due before a client was free for it
// is counted from when it was due.
func (b *fleetBench) submit(ctx context.Context, n, rate int, reading *reading) (asked map[string]time.Time, waits []time.Duration, err error) {
	spec, err := json.Marshal(api.JobSpec{Command: []string{"sleep", "3600"}, Tasks: 1, CPUs: 1, MemBytes: 1 << 30})
	if err != nil {
		return nil, nil, err
	}
	asked = make(map[string]time.Time, n)
	var mu sync.Mutex
	var clients sync.WaitGroup
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	moments := due(ctx, n, rate)
	for range submitters {
		clients.Go(func() {
			for at := range moments {
				if at.IsZero() {
					at = time.Now()
				}
				text, err := b.call(ctx, http.MethodPost, "/v1/jobs", spec)
				took := time.Since(at)
				var job api.Job
				if err == nil {
					err = json.Unmarshal(text, &job)
				}
				if err == nil {
					err = reading.know(job.ID)
				}
				if err != nil {
					cancel(err)
					return
				}
				mu.Lock()
				asked[job.ID] = at
				waits = append(waits, took)
				mu.Unlock()
				b.mu.Lock()
				b.ids = append(b.ids, job.ID)
				b.mu.Unlock()
			}
		})
	}
	clients.Wait()
	return asked, waits, context.Cause(ctx)
}

func (b *fleetBench) allStarted(ctx context.Context, n int) error {
	for {
		b.mu.Lock()
		started := len(b.starts)
		b.mu.Unlock()
		if started == n {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond): // nobody tells
		case <-ctx.Done():
			return fmt.Errorf("%d of %d jobs were started: %w", started, n, ctx.Err())
		}
	}
}

// quiet measures what it costs that all runs and nothing happens.
func (b *fleetBench) quiet(ctx context.Context, f *fleet.Fleet, row *fleetRow) error {
	if err := b.settled(ctx); err != nil {
		return err
	}
	beats := f.Heartbeats()
	before, err := b.server.cpu()
	if err != nil {
		return err
	}
	select {
	case <-time.After(quietTime):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := b.server.cpu()
	if err != nil {
		return err
	}
	row.HeartbeatUS = float64((after - before).Microseconds()) / float64(max(1, f.Heartbeats()-beats))
	if row.QuietReads, err = b.readQuietly(ctx); err != nil {
		return err
	}
	if row.PeakBytes, err = b.server.peak(); err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(b.server.state(), "controller.db"))
	if err == nil {
		row.StoreBytes = info.Size()
	}
	return err
}

// readQuietly has all kinds read while nothing else happens.
func (b *fleetBench) readQuietly(ctx context.Context) (map[string]latency, error) {
	reading, err := startReading(b.client)
	if err != nil {
		return nil, err
	}
	for _, id := range b.ids {
		err = errors.Join(err, reading.know(id))
	}
	select {
	case <-time.After(quietTime / 2):
	case <-ctx.Done():
		err = errors.Join(err, ctx.Err())
	}
	waited, _, ended := reading.end()
	return waited, errors.Join(err, ended)
}

// settled waits until no operation is under way.
func (b *fleetBench) settled(ctx context.Context) error {
	for {
		text, err := b.call(ctx, http.MethodGet, "/v1/jobs", nil)
		if err != nil {
			return err
		}
		var jobs []api.Job
		if err := json.Unmarshal(text, &jobs); err != nil {
			return err
		}
		running := func(j api.Job) bool { return j.Phase == api.PhaseRunning }
		if !slices.ContainsFunc(jobs, func(j api.Job) bool { return !running(j) }) {
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// restart kills the controller and measures how soon another one serves.
func (b *fleetBench) restart(ctx context.Context, f *fleet.Fleet, row *fleetRow) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	b.server.kill()
	b.http.CloseIdleConnections()
	begin := time.Now()
	if err := b.server.start(ctx); err != nil {
		return err
	}
	if _, err := b.call(ctx, http.MethodGet, "/v1/jobs/"+b.ids[0], nil); err != nil {
		return err
	}
	row.RestartMS = ms(time.Since(begin))
	if err := f.Welcomed(ctx, row.Agents); err != nil {
		return err
	}
	row.ReconnectMS = ms(time.Since(begin))
	if alive := f.Tasks(); alive != row.Jobs {
		return fmt.Errorf("%d of %d tasks are alive after the controller's restart", alive, row.Jobs)
	}
	return nil
}

func printFleet(rows []fleetRow) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	line := func(what string, value func(fleetRow) string) {
		fmt.Fprint(table, what)
		for _, r := range rows {
			fmt.Fprint(table, "\t", value(r))
		}
		fmt.Fprintln(table)
	}
	number := func(what, format string, value func(fleetRow) float64) {
		line(what, func(r fleetRow) string { return fmt.Sprintf(format, value(r)) })
	}
	both := func(what string, value func(fleetRow) latency) {
		line(what+": p50, p99, ms", func(r fleetRow) string { l := value(r); return fmt.Sprintf("%.1f, %.1f", l.P50, l.P99) })
	}
	number("agents", "%.0f", func(r fleetRow) float64 { return float64(r.Agents) })
	number("jobs", "%.0f", func(r fleetRow) float64 { return float64(r.Jobs) })
	number("submissions/s wanted (0: all that are taken)", "%.0f", func(r fleetRow) float64 { return float64(r.Rate) })
	number("all agents joined, s", "%.2f", func(r fleetRow) float64 { return r.JoinMS / 1000 })
	number("submissions/s", "%.0f", func(r fleetRow) float64 { return r.Submissions })
	number("controller CPU, ms per job", "%.2f", func(r fleetRow) float64 { return r.ControllerMS })
	number("simulator CPU, ms per job", "%.2f", func(r fleetRow) float64 { return r.SimulatorMS })
	both("submit", func(r fleetRow) latency { return r.Submit })
	for _, kind := range []string{"one job", "jobs, a page of 100", "nodes, a page of 100", "operations, a page of 100"} {
		both("read under load, "+kind, func(r fleetRow) latency { return r.Reads[kind] })
		both("read, all running, "+kind, func(r fleetRow) latency { return r.QuietReads[kind] })
	}
	both("submit to start command", func(r fleetRow) latency { return r.ToStart })
	number("all jobs started, s", "%.2f", func(r fleetRow) float64 { return r.AllRunningMS / 1000 })
	number("peak resident memory, MiB", "%.0f", func(r fleetRow) float64 { return float64(r.PeakBytes) / (1 << 20) })
	number("store, MiB", "%.1f", func(r fleetRow) float64 { return float64(r.StoreBytes) / (1 << 20) })
	number("CPU per heartbeat, µs", "%.0f", func(r fleetRow) float64 { return r.HeartbeatUS })
	number("restart until reads are served, s", "%.2f", func(r fleetRow) float64 { return r.RestartMS / 1000 })
	number("restart until all agents are back, s", "%.2f", func(r fleetRow) float64 { return r.ReconnectMS / 1000 })
	table.Flush()
}

// server is a real controller process.
type server struct {
	binary  string
	dir     string
	address string
	process *exec.Cmd
	log     *os.File
}

func (s *server) state() string { return filepath.Join(s.dir, "state") }
func (s *server) url() string   { return "https://" + s.address }

// start starts the controller, at its first start on a free port, and returns
// when it is ready.
func (s *server) start(ctx context.Context) error {
	if err := s.configure(); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	s.log = log
	s.process = exec.Command(s.binary, "controller", "--config", filepath.Join(s.dir, "controller.yaml"))
	s.process.Stderr = log
	stdout, err := s.process.StdoutPipe()
	if err != nil {
		return err
	}
	if err := child.Start(s.process, syscall.SIGKILL); err != nil {
		return err
	}
	ready := make(chan error, 1)
	go func() {
		line := make([]byte, 256)
		n, err := stdout.Read(line)
		if address, ok := strings.CutPrefix(strings.TrimSpace(string(line[:n])), "ready https://"); ok {
			s.address = address
			ready <- nil
			return
		}
		ready <- fmt.Errorf("the controller said %q instead of ready URL (%w)", line[:n], err)
	}()
	select {
	case err = <-ready:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		s.kill()
		text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
		return fmt.Errorf("%w: %s", err, text)
	}
	return nil
}

func (s *server) configure() error {
	text := fmt.Sprintf("listen: %s\nstate: %s\nclouds:\n- name: %s\n  driver: static\n", cmp.Or(s.address, "127.0.0.1:0"), s.state(), fleetCloud)
	return os.WriteFile(filepath.Join(s.dir, "controller.yaml"), []byte(text), 0o600)
}

// kill ends the controller as a power cut would.
func (s *server) kill() {
	if s.process == nil {
		return
	}
	s.process.Process.Kill()
	s.process.Wait()
	s.log.Close()
	s.process = nil
}

// cpu is the processor time that the controller has used.
func (s *server) cpu() (time.Duration, error) { return cpuOf(s.process.Process.Pid) }

// cpuOf is the processor time that a process has used, proc(5).
func cpuOf(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	ticks := int64(0)
	for _, field := range fields[11:13] { // utime, stime
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100, nil // USER_HZ
}

// peak is the most memory the controller had resident.
func (s *server) peak() (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.process.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "VmHWM:")
	fields := strings.Fields(after)
	if len(fields) == 0 {
		return 0, errors.New("the kernel does not tell VmHWM")
	}
	kib, err := strconv.ParseInt(fields[0], 10, 64)
	return kib << 10, err
}
