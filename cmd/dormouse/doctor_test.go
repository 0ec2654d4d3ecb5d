package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dormouse/agent/criu"
)

// forged is a machine whose /proc holds the given files.
func forged(t *testing.T, files map[string]string) *machine {
	t.Helper()
	proc := t.TempDir()
	for name, text := range files {
		file := filepath.Join(proc, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &machine{proc: proc, uid: 1000, state: t.TempDir(), beside: t.TempDir()}
}

func TestDoctorJudgesTheMachine(t *testing.T) {
	v1 := "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
	tests := []struct {
		name   string
		files  map[string]string
		check  func(*machine) finding
		want   verdict
		detail string
	}{
		{"no root", nil, (*machine).root, verdictFail, "runs as user 1000"},
		{"all capabilities", map[string]string{"self/status": "CapEff:\t000001fffeffffff\n"}, (*machine).capabilities, verdictOK, "all"},
		{"a container's capabilities", map[string]string{"self/status": "CapEff:\t00000000a80425fb\n"}, (*machine).capabilities, verdictFail, "CAP_SYS_ADMIN, CAP_SYS_PTRACE"},
		{"no proc", nil, (*machine).capabilities, verdictFail, "no such file"},
		{"old kernel", map[string]string{"sys/kernel/osrelease": "5.10.0-28-amd64\n"}, (*machine).kernel, verdictFail, "too old"},
		{"new kernel", map[string]string{"sys/kernel/osrelease": "6.18.1\n"}, (*machine).kernel, verdictOK, "Linux 6.18.1"},
		{"locked ptrace", map[string]string{"sys/kernel/yama/ptrace_scope": "3\n"}, (*machine).tracing, verdictFail, "ptrace_scope is 3"},
		{"no init", nil, (*machine).programs, verdictFail, "dormouse-init is not in"},
		{"no cgroup2", map[string]string{"self/mounts": v1}, (*machine).freezer, verdictFail, "is not mounted"},
		{"limits by v1", map[string]string{"self/mounts": v1}, (*machine).limits, verdictOK, "cpu by cgroup v1, memory by cgroup v1"},
		{"no memory limit", map[string]string{"self/mounts": strings.SplitAfter(v1, "\n")[0]}, (*machine).limits, verdictFail, "limits memory"},
		{"little memory", map[string]string{"meminfo": "MemTotal: 99 kB\nMemAvailable:     1024 kB\n"}, (*machine).memory, verdictWarn, "1.00 MiB available"},
		{"no IPv6", nil, (*machine).network, verdictWarn, "no IPv6"},
		{"MPTCP", map[string]string{"net/if_inet6": "", "sys/net/mptcp/enabled": "1\n"}, (*machine).network, verdictOK, "MPTCP"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := test.check(forged(t, test.files))
			if got.Status != test.want || !strings.Contains(got.Detail, test.detail) {
				t.Errorf("got %s %q, want %s with %q", got.Status, got.Detail, test.want, test.detail)
			}
			if got.Status == verdictFail && got.Fix == "" {
				t.Errorf("the failure %q says nothing to do about it", got.Detail)
			}
		})
	}
}

func TestDoctorSaysHowToGetACRIU(t *testing.T) {
	m := forged(t, nil)
	m.criu = criu.Options{Path: "/absent/criu"}
	got := m.engine(t.Context())
	if len(got) != 1 || got[0].Status != verdictFail || !strings.Contains(got[0].Fix, "make setup") {
		t.Errorf("got %+v, want one failure that names `make setup`", got)
	}
}

func TestDoctorFailsWhenACheckFailed(t *testing.T) {
	out := &strings.Builder{}
	c := &cli{out: out}
	err := c.printFindings([]finding{{"a", verdictOK, "fine", ""}, {"b", verdictWarn, "slow", "mend"}})
	if err != nil || !strings.Contains(out.String(), "warn  b                      slow\n                             → mend\n") {
		t.Errorf("warnings only: got %v and\n%s", err, out)
	}
	if err := c.printFindings([]finding{{"b", verdictFail, "broken", "mend"}}); err == nil || !strings.Contains(err.Error(), "1 of 1 checks failed") {
		t.Errorf("a failure: got %v", err)
	}
}

func TestDoctorTriesTheNetworkWithoutTouchingOurs(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root: it makes a network namespace")
		}
		t.Skip("needs root: it makes a network namespace")
	}
	before, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	m := forged(t, nil)
	names := []string{}
	for _, found := range m.jobNetwork() {
		names = append(names, found.Name)
		if found.Status != verdictOK && found.Fix == "" {
			t.Errorf("%s: %q says nothing to do about it", found.Name, found.Detail)
		}
		if found.Status == verdictFail {
			t.Errorf("%s: %s", found.Name, found.Detail)
		}
	}
	if want := "job network nf_tables WireGuard VXLAN"; strings.Join(names, " ") != want {
		t.Errorf("found %v, want %s", names, want)
	}
	after, err := net.Interfaces()
	if err != nil || len(after) != len(before) {
		t.Errorf("there were %d network devices and are %d, %v", len(before), len(after), err)
	}
}
