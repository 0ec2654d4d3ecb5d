package e2e

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"dormouse/api"
)

// refusals are the words by which each row that cannot be carried must be named.
var refusals = map[string]string{
	"alg":                "AF_ALG",
	"backlog":            "accept",
	"bpf_map":            "BPF",
	"io_uring":           "io_uring",
	"landlock":           "landlock",
	"memfd_secret":       "memfd_secret",
	"mptcp":              "MPTCP",
	"mqueue":             "message queue",
	"nested_ipc":         "nested ipc namespace",
	"nested_pid":         "nested pid namespace",
	"nested_user":        "nested user namespace",
	"nested_uts":         "nested uts namespace",
	"perf_event":         "perf event",
	"proc_self":          "/proc/",
	"ptraced":            "traced",
	"unix_outside":       "outside of the job",
	"unix_outside_dgram": "outside of the job",
	"userfaultfd":        "userfaultfd",
	"vsock":              "vsock",
}

// row is one program of e2e/programs/matrix.
type row struct {
	name, fate string
	caps       []string
}

func matrixRows(t *testing.T) []row {
	t.Helper()
	var rows []row
	for _, line := range strings.Split(strings.TrimSpace(undisturbed(t, program("matrix"), "list")), "\n") {
		fields := strings.Fields(line)
		r := row{name: fields[0], fate: fields[1]}
		if fields[2] != "-" {
			r.caps = strings.Split(fields[2], ",")
		}
		rows = append(rows, r)
	}
	return rows
}

// start submits the row's program and waits until it has checked itself; it
// returns no job when this kernel cannot make the feature at all.
func (r row) start(p *platform, argument string) (job string) {
	p.t.Helper()
	var args []string
	for _, capability := range r.caps {
		args = append(args, "--cap-add", capability)
	}
	dir := "/var/tmp/matrix"
	if argument != "" {
		args = append(args, "--volume", filepath.Dir(argument)+":/outside")
		argument = "/outside/" + filepath.Base(argument)
	}
	args = append(args, "--", program("matrix"), r.name, dir)
	if argument != "" {
		args = append(args, argument)
	}
	job = p.submit(args...)
	p.until(job, "it is ready or cannot be", func() bool {
		out := p.output(job)
		return strings.Contains(out, "ok 2\n") || strings.HasPrefix(out, "unavailable")
	})
	if out := p.output(job); strings.HasPrefix(out, "unavailable") {
		if r.fate == "carried" {
			p.t.Fatalf("%s", out)
		}
		p.t.Logf("nothing to refuse here: %s", strings.TrimSpace(out))
		return ""
	}
	return job
}

// TestCarriedAcrossARestore takes a program of every kind that CRIU can carry
// from one cloud to the other and, a generation later, back.
func TestCarriedAcrossARestore(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for _, r := range matrixRows(t) {
		if r.fate != "carried" {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			job := r.start(p, "")
			for range 2 {
				p.checkpoint(job)
				p.moves(job) // the program must also survive being left running
				p.run("restart", job, "--cloud", p.otherCloud(job))
				p.moves(job)
			}
		})
	}
}

// TestRefusedByName checks that what CRIU cannot carry is named before the job
// is frozen, and that the job goes on.
func TestRefusedByName(t *testing.T) {
	if unavailable != "" {
		t.Skip(unavailable)
	}
	for _, r := range matrixRows(t) {
		if r.fate != "refused" {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			p := onShared(t)
			word, ok := refusals[r.name]
			if !ok {
				t.Fatalf("the row %s has no word to be refused by", r.name)
			}
			job := r.start(p, outside(t, r.name))
			if job == "" {
				return
			}
			for _, verb := range []string{"checkpoint", "suspend"} {
				got := p.try(verb, job)
				if got.status != refused {
					t.Fatalf("%s: exit status %d, expected %d: %s%s", verb, got.status, refused, got.stdout, got.stderr)
				}
				if !strings.Contains(strings.ToLower(got.stderr), strings.ToLower(word)) {
					t.Errorf("%s was refused by %q, expected a sentence with %q", verb, got.stderr, word)
				}
			}
			p.moves(job)
			if detail := p.inspect(job); detail.Phase != api.PhaseRunning {
				t.Errorf("after the refusals the job is %s", p.phase(job))
			}
			for _, c := range decode[[]api.Checkpoint](p, "checkpoints", job) {
				if c.State != api.CheckpointFailed || c.PauseMS != 0 {
					t.Errorf("checkpoint %s is %s after a pause of %v ms, expected failed and none", c.ID, c.State, c.PauseMS)
				}
			}
		})
	}
}

// outside makes the socket that a row connects to from within its job.
func outside(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(directory(t), "outside.sock")
	switch name {
	case "unix_outside":
		listener, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go drain(listener)
	case "unix_outside_dgram":
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
	default:
		return ""
	}
	return path
}

// drain reads what comes until the listener is closed.
func drain(listener net.Listener) {
	conn, err := listener.Accept()
	if err != nil {
		return
	}
	defer conn.Close()
	buffer := make([]byte, 4096)
	for {
		if _, err := conn.Read(buffer); err != nil {
			return
		}
	}
}
