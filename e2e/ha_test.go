package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
	"dormouse/controller/store/etcd/etcdtest"
	"dormouse/e2e/cluster"
	"dormouse/internal/child"
)

// trio is three real controllers on one real etcd, each behind a network of its
// own to it, and a real agent that knows them all.
type trio struct {
	*platform
	dir     string
	bin     string
	env     []string // of the daemons
	token   string
	etcd    *etcdtest.Server
	members []*daemon
	agent   *daemon
	node    string
}

// daemon is a process of the trio.
type daemon struct {
	name, url string
	network   *etcdtest.Proxy // to etcd
	args      []string
	log       string
	command   *exec.Cmd
	exited    chan struct{}
}

func newTrio(t *testing.T, bin string, env []string) *trio {
	t.Helper()
	if unavailable != "" {
		t.Skip(unavailable)
	}
	h := &trio{platform: &platform{t: t}, dir: directory(t), bin: bin, env: env, etcd: etcdtest.Start(t)}
	h.node = "ha-" + filepath.Base(h.dir)[len("test-"):]
	secret := filepath.Join(h.dir, "secret")
	h.write(secret, strings.Repeat("not guessed ", 4))
	for i := range 3 {
		name := fmt.Sprintf("c%d", i)
		network, address := etcdtest.NewProxy(t, h.etcd), freeAddress()
		config := filepath.Join(h.dir, name+".yaml")
		h.write(config, fmt.Sprintf(`name: %s
listen: %s
state: %s
repository: {path: %s}
lease: 25s
on_starvation: ignore
store: {backend: etcd, endpoints: ["%s"], secret_file: %s}
clouds: [{name: metal, driver: static}]
`, name, address, filepath.Join(h.dir, name), filepath.Join(h.dir, "repository"), network.URL, secret))
		h.members = append(h.members, &daemon{name: name, url: "https://" + address, network: network, args: []string{"controller", "--config", config}})
		h.start(h.members[i])
	}
	first := filepath.Join(h.dir, "c0")
	token, err := os.ReadFile(filepath.Join(first, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	h.token = strings.TrimSpace(string(token))
	var urls []string
	for _, m := range h.members {
		urls = append(urls, m.url)
	}
	h.agent = &daemon{name: "agent", args: []string{"agent", "--join", strings.Join(urls, ","), "--token-file", filepath.Join(first, "join.token"),
		"--ca", filepath.Join(first, "pki/ca.pem"), "--cloud", "metal", "--node", h.node, "--state", filepath.Join(h.dir, "agent")}}
	t.Cleanup(h.removeCgroups) // after the agent has ended
	h.start(h.agent)
	h.by(h.members[0])
	h.await("the node is ready", func() bool {
		nodes := decode[[]api.Node](h.platform, "nodes")
		return len(nodes) == 1 && nodes[0].State == api.NodeReady
	})
	return h
}

func (h *trio) write(file, text string) {
	h.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// start runs a daemon; of a controller, until it is ready. It ends with the test.
func (h *trio) start(d *daemon) {
	h.t.Helper()
	d.log = filepath.Join(h.dir, d.name+".log")
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	command := exec.Command(h.bin+"/dormouse", d.args...)
	command.Env = append(os.Environ(), h.env...)
	command.Stderr = log
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := command.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := child.Start(command, syscall.SIGTERM); err != nil {
		h.t.Fatal(err)
	}
	d.command, d.exited = command, make(chan struct{})
	ready, exited := make(chan bool, 1), d.exited
	go func() {
		lines := bufio.NewScanner(stdout)
		ready <- lines.Scan() && strings.HasPrefix(lines.Text(), "ready ")
		for lines.Scan() { // until it ends
		}
		command.Wait()
		close(exited)
	}()
	h.t.Cleanup(func() {
		command.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(30 * time.Second):
			h.t.Errorf("%s does not end", d.name)
			command.Process.Kill()
			<-exited
		}
		if h.t.Failed() {
			text, _ := os.ReadFile(d.log)
			h.t.Logf("log of %s:\n%s", d.name, tail(string(text), 40))
		}
	})
	if d.url != "" && !<-ready {
		text, _ := os.ReadFile(d.log)
		h.t.Fatalf("%s is not ready: %s", d.name, text)
	}
}

func (h *trio) kill(d *daemon) {
	h.t.Helper()
	if err := d.command.Process.Kill(); err != nil {
		h.t.Fatal(err)
	}
	<-d.exited
}

// by has the commands that follow go to one of the controllers.
func (h *trio) by(d *daemon) {
	h.c = cluster.Reach(h.bin+"/dormouse", []string{
		"DORMOUSE_CONTROLLER=" + d.url, "DORMOUSE_TOKEN=" + h.token, "DORMOUSE_CA=" + filepath.Join(h.dir, "c0", "pki/ca.pem"),
	})
}

// leader asks who leads, by way of one that lives.
func (h *trio) leader() *daemon {
	h.t.Helper()
	var leader *daemon
	h.await("a controller leads", func() bool {
		got := h.try("-o", "json", "controllers")
		var all []api.Controller
		if got.status != 0 || json.Unmarshal([]byte(got.stdout), &all) != nil || len(all) == 0 {
			return false
		}
		for _, d := range h.members {
			if d.url == all[0].URL {
				leader = d
			}
		}
		return leader != nil
	})
	return leader
}

// others are the controllers but one.
func (h *trio) others(than *daemon) (others []*daemon) {
	for _, d := range h.members {
		if d != than {
			others = append(others, d)
		}
	}
	return others
}

// replaced waits until another controller leads than the one that is gone, and
// acts: it answers what only a leader can.
func (h *trio) replaced(gone *daemon, since time.Time, job string) {
	h.t.Helper()
	h.by(h.others(gone)[0])
	h.await("another controller leads", func() bool { return h.leader() != gone })
	h.t.Logf("after %s another controller leads", time.Since(since).Round(time.Millisecond))
	h.await("the node is ready again", func() bool { return h.try("logs", job).status == 0 })
}

// await polls a state that nobody announces.
func (h *trio) await(what string, condition func() bool) {
	h.t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// removeCgroups takes away what an agent leaves for the next one.
func (h *trio) removeCgroups() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := removeCgroups(ctx, h.node); err != nil {
		h.t.Errorf("left behind: %v", err)
	}
}

// TestLeadershipMoves: whatever becomes of the leader, of its network or of etcd,
// another controller leads in time, and a running job notices nothing.
func TestLeadershipMoves(t *testing.T) {
	h := newTrio(t, built.bin, nil)
	job := h.submit(append([]string{"--mem", "64M", "--env", "MARK=" + h.dir}, counter...)...)
	h.waitLines(job, 5)
	before := h.inspect(job).TaskStatus[0].Pid
	unnoticed := func() {
		t.Helper()
		h.moves(job)
		if now := h.inspect(job); now.Phase != api.PhaseRunning || now.TaskStatus[0].Pid != before || now.Restarts != 0 {
			t.Errorf("the job is %s with pid %d, and was running with %d", now.Phase, now.TaskStatus[0].Pid, before)
		}
		counts(t, h.output(job))
	}
	for range 2 {
		old := h.leader()
		h.kill(old)
		h.replaced(old, time.Now(), job)
		unnoticed()
		h.start(old) // it follows
	}
	old := h.leader()
	old.network.Cut()
	h.replaced(old, time.Now(), job)
	unnoticed()
	h.checkpoint(job)
	old.network.Mend()
	h.by(old)
	h.await("the old leader follows", func() bool { return h.try("ps").status == 0 })
	unnoticed()
	h.etcd.Kill()
	h.etcd.Restart(t)
	h.leader()
	h.await("the node is ready again", func() bool { return h.try("logs", job).status == 0 })
	unnoticed()
	h.checkpoint(job)
	h.run("suspend", job)
	h.run("resume", job)
	unnoticedAnew(t, h, job)
}

// unnoticedAnew checks a job that was restored: nothing of its output is missing.
func unnoticedAnew(t *testing.T, h *trio, job string) {
	t.Helper()
	h.moves(job)
	counts(t, h.output(job))
	if marks := marked("MARK=" + h.dir); marks == 0 {
		t.Error("nothing of the job runs")
	}
}

// TestTheNextLeaderFinishesWhatTheLastBegan: the leader dies at a step of an
// operation, and the next one takes it again.
func TestTheNextLeaderFinishesWhatTheLastBegan(t *testing.T) {
	for _, c := range []struct {
		step, verb string
		phase      api.Phase
	}{
		{"controller.checkpoint.capture", "checkpoint", api.PhaseRunning},
		{"controller.checkpoint.publish", "checkpoint", api.PhaseRunning},
		{"controller.suspend.destroy", "suspend", api.PhaseSuspended},
		{"controller.restart.restore", "restart", api.PhaseRunning},
	} {
		t.Run(c.step, func(t *testing.T) {
			t.Parallel()
			once := filepath.Join(directory(t), "once")
			h := newTrio(t, built.killable, []string{"DORMOUSE_FAILPOINT=" + c.step + "=kill", "DORMOUSE_FAILPOINT_ONCE=" + once})
			tree := script("python3", "tree.py")
			job := h.submit(slices.Concat([]string{"--mem", "64M", "--env", "MARK=" + h.dir}, untilAsked, []string{"--"}, tree(forever, pace))...)
			h.waitLines(job, 5)
			if c.verb == "restart" {
				h.checkpoint(job)
			}
			old := h.leader()
			h.by(h.others(old)[0])
			h.try(c.verb, job) // its leader dies of it; whoever asked need not know
			<-old.exited
			h.await("the operation has ended", func() bool {
				got := h.try("-o", "json", "inspect", job)
				var now api.JobDetail
				return got.status == 0 && json.Unmarshal([]byte(got.stdout), &now) == nil && now.Phase == c.phase && now.Operation == ""
			})
			if list := decode[[]api.Checkpoint](h.platform, "checkpoints", job); len(list) != 1 || list[0].State != api.CheckpointDurable {
				t.Errorf("want one durable checkpoint, got %+v", list)
			}
			if c.phase == api.PhaseSuspended {
				h.run("resume", job)
			}
			h.alone(job, h.dir)
			h.endsAsSeen(job, tree)
			h.run("verify")
		})
	}
}
