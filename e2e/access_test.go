package e2e

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"dormouse/api"
	"dormouse/e2e/cluster"
)

// bearer is how one who has a token of its own sees the platform.
type bearer struct {
	*platform
	secret string
}

// bear makes a token and returns its bearer.
func (p *platform) bear(name string, flags ...string) bearer {
	p.t.Helper()
	secret := strings.TrimSpace(p.run(append([]string{"token", "create", name}, flags...)...))
	env := append(p.c.Command(p.t.Context()).Env, "DORMOUSE_TOKEN="+secret)
	return bearer{&platform{t: p.t, c: cluster.Reach(built.bin+"/dormouse", env)}, secret}
}

// submits submits a job, which the admin removes in the end.
func (b bearer) submits(admin *platform, args ...string) string {
	b.t.Helper()
	job := b.run(append([]string{"submit"}, args...)...)
	b.t.Cleanup(func() { admin.forget(job) })
	return job
}

// tells writes again and again who it is.
var tells = []string{"--", "sh", "-c", "while :; do echo $(id -u):$(id -g); sleep 0.05; done"}

// onlyEver checks that a job has never written anything but one line.
func (p *platform) onlyEver(job, line string) {
	p.t.Helper()
	if got := slices.Compact(strings.Fields(p.output(job))); !slices.Equal(got, []string{line}) {
		p.t.Errorf("job %s has written %q, expected only %q", job, got, line)
	}
}

func TestTokensDecideWhoDoesWhat(t *testing.T) {
	t.Parallel()
	admin := onOwn(t, built.bin, nil, "--cloud", "east=1", "--cpus", "8", "--mem", "8G")
	adminTokenIsItsOwners(t, admin)

	alice := admin.bear("alice-laptop", "--role", "user", "--user", "alice:20001:20002")
	bob := admin.bear("bob-laptop", "--role", "user", "--user", "bob:20003:20003")
	trusted := admin.bear("alice-trusted", "--role", "user", "--user", "alice:20001:20002", "--allow-root")
	operator := admin.bear("night-shift", "--role", "operator")

	job := alice.submits(admin, append([]string{"--name", "hers"}, tells...)...)
	alice.waitLines(job, 3)
	usersAreKeptApart(t, alice, bob, job)
	rootIsForThoseWhoMay(t, admin, alice, trusted)
	rolesAreKept(t, alice, operator)

	alice.run("suspend", "hers")
	before := alice.lines(job)
	alice.run("resume", "hers")
	alice.waitLines(job, before+3)
	alice.onlyEver(job, "20001:20002")

	tooMuchIsRefused(t, alice)
	endedTokens(t, admin, alice, job)
	auditTells(t, admin, job)
	for _, b := range []bearer{alice, bob, trusted, operator} {
		if files := holding(t, filepath.Dir(admin.c.State()), b.secret); len(files) != 0 {
			t.Errorf("the secret of a token lies in %v", files)
		}
	}
}

// adminTokenIsItsOwners: nobody but who started `up` can read the token of its
// admin, wherever it lies.
func adminTokenIsItsOwners(t *testing.T, admin *platform) {
	t.Helper()
	file := filepath.Join(admin.c.State(), "admin.token")
	token, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	files := holding(t, admin.c.State(), strings.TrimSpace(string(token)))
	if !slices.Contains(files, file) {
		t.Errorf("the token of %s was found in %v only", file, files)
	}
	for _, file := range files {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t).Uid; info.Mode().Perm() != 0o600 || int(owner) != os.Getuid() {
			t.Errorf("%s holds the admin's token, has mode %s and belongs to user %d, expected -rw------- and %d", file, info.Mode(), owner, os.Getuid())
		}
	}
}

// holding returns the files of a directory that hold a text.
func holding(t *testing.T, dir, text string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // it has been replaced meanwhile
		}
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		if bytes.Contains(data, []byte(text)) {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// usersAreKeptApart: bob neither sees nor touches alice's job.
func usersAreKeptApart(t *testing.T, alice, bob bearer, job string) {
	t.Helper()
	if list := decode[[]api.Job](alice.platform, "ps"); len(list) != 1 || list[0].ID != job || list[0].Owner != "alice" {
		t.Errorf("alice sees %+v, expected job %s of alice", list, job)
	}
	for _, verb := range []string{"ps --all", "checkpoints", "operations --all", "events"} {
		if got := bob.try(strings.Fields(verb)...); got.status != 0 || strings.Contains(got.stdout, job) {
			t.Errorf("%s shows bob, with exit status %d: %s%s", verb, got.status, got.stdout, got.stderr)
		}
	}
	for _, verb := range []string{"inspect", "logs", "events", "kill", "suspend", "checkpoint", "rm", "restart"} {
		oneSentence(t, verb, bob.try(verb, job), refused, "does not belong to user bob")
		oneSentence(t, verb, bob.try(verb, "hers"), notFound, "hers")
	}
	oneSentence(t, "exec", bob.try("exec", job, "--", "true"), refused, "does not belong to user bob")
	if got := alice.run("exec", job, "--", "id", "-u"); got != "20001" {
		t.Errorf("what alice runs in her job runs as %q", got)
	}
	alice.moves(job)
}

// rootIsForThoseWhoMay: a job of a user is root, or has more of the machine, only
// where an admin has allowed it.
func rootIsForThoseWhoMay(t *testing.T, admin *platform, alice, trusted bearer) {
	t.Helper()
	for _, user := range []string{"root", "0", "0:0", "00:00"} {
		oneSentence(t, "as "+user, alice.try("submit", "--user", user, "--", "id"), refused, "does not run as root", "--allow-root")
	}
	oneSentence(t, "as another", alice.try("submit", "--user", "20003:20003", "--", "id"), refused, "runs as that user, not as 20003:20003")
	oneSentence(t, "with a volume", alice.try("submit", "--volume", "/etc:/host", "--", "id"), refused, "/etc", "access.paths")
	oneSentence(t, "with a capability", alice.try("submit", "--cap-add", "SYS_ADMIN", "--", "id"), refused, "SYS_ADMIN")
	oneSentence(t, "user root", admin.try("token", "create", "r", "--user", "root:0:0"), usage, "--allow-root")
	rooted := trusted.submits(admin, "--user", "root", "--", "id", "-u")
	if output := trusted.completes(rooted); output != "0\n" {
		t.Errorf("a job that may be root wrote %q", output)
	}
}

// rolesAreKept: what a role may not do is one sentence and exit status 4.
func rolesAreKept(t *testing.T, alice, operator bearer) {
	t.Helper()
	for _, command := range []string{"audit", "token ls", "token create more --role admin", "token revoke night-shift"} {
		oneSentence(t, command, alice.try(strings.Fields(command)...), refused, "only an admin may do that", "alice-laptop", "user")
		oneSentence(t, command, operator.try(strings.Fields(command)...), refused, "only an admin may do that", "night-shift", "operator")
	}
	node := decode[[]api.Node](alice.platform, "nodes")[0].Name
	for _, command := range []string{"drain " + node, "uncordon " + node, "node label " + node + " a=b", "node kill " + node, "preempt hers", "swap hers hers"} {
		oneSentence(t, command, alice.try(strings.Fields(command)...), refused, "only an admin or an operator may do that")
	}
	if got := operator.try("ps"); got.status != 0 || !strings.Contains(got.stdout, "hers") {
		t.Errorf("an operator sees, with exit status %d: %s%s", got.status, got.stdout, got.stderr)
	}
}

// tooMuchIsRefused: the controller does not read what is too large, and says so.
func tooMuchIsRefused(t *testing.T, alice bearer) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "command: [\"true\"]\nenv: {LARGE: %q}\n", strings.Repeat("x", 8<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	oneSentence(t, "8 MiB", alice.try("submit", "-f", file), failed, "the request is larger than 1048576 bytes")
}

// endedTokens: nothing more is answered to a token that is revoked or has
// expired, whose job runs on.
func endedTokens(t *testing.T, admin *platform, alice bearer, job string) {
	t.Helper()
	brief := admin.bear("alice-brief", "--role", "user", "--user", "alice:20001:20002", "--expires", "1s")
	admin.run("token", "revoke", "alice-laptop")
	oneSentence(t, "revoked", alice.try("ps"), failed, "the token was revoked")
	oneSentence(t, "revoked", alice.try("submit", "--", "true"), failed, "the token was revoked")
	admin.until(job, "the token has expired", func() bool { return brief.try("ps").status != 0 })
	oneSentence(t, "expired", brief.try("ps"), failed, "the token has expired")
	never := bearer{&platform{t: t, c: cluster.Reach(built.bin+"/dormouse", append(admin.c.Command(t.Context()).Env, "DORMOUSE_TOKEN=dm_guess"))}, ""}
	oneSentence(t, "guessed", never.try("ps"), failed, "the token is wrong")
	states := map[string]bool{}
	for _, token := range decode[[]api.Token](admin, "token", "ls") {
		states[token.Name] = token.Revoked != nil || token.Expires != nil
	}
	if !states["alice-laptop"] || !states["alice-brief"] || states["bob-laptop"] {
		t.Errorf("the tokens that ended: %v", states)
	}
	admin.moves(job)
}

// auditTells: the log names who did what, and what was refused to whom.
func auditTells(t *testing.T, admin *platform, job string) {
	t.Helper()
	entries := decode[[]api.AuditEntry](admin, "audit", "-n", "1000")
	for _, want := range []api.AuditEntry{
		{Name: "local", Role: api.RoleAdmin, Method: "POST", Path: "/v1/tokens", Status: 201},
		{Name: "alice-laptop", Role: api.RoleUser, User: "alice", Method: "POST", Path: "/v1/jobs", Status: 201, Target: job},
		{Name: "alice-laptop", Role: api.RoleUser, User: "alice", Method: "POST", Path: "/v1/jobs", Status: 403},
		{Name: "bob-laptop", Role: api.RoleUser, User: "bob", Method: "POST", Path: "/v1/jobs/" + job + "/kill", Status: 403},
		{Name: "night-shift", Role: api.RoleOperator, Method: "GET", Path: "/v1/audit", Status: 403},
		{Name: "local", Role: api.RoleAdmin, Method: "DELETE", Path: "/v1/tokens/alice-laptop", Status: 204},
		{Name: "alice-laptop", Role: api.RoleUser, User: "alice", Method: "GET", Path: "/v1/jobs", Status: 401},
		{Method: "GET", Path: "/v1/jobs", Status: 401},
	} {
		if !slices.ContainsFunc(entries, func(e api.AuditEntry) bool {
			told := e.Address != "" && !e.Time.IsZero() && (e.Status < 400 || e.Detail != "")
			e.Target = map[bool]string{true: e.Target}[want.Target != ""]
			return told && e.Name == want.Name && e.Role == want.Role && e.User == want.User && e.Method == want.Method && e.Path == want.Path && e.Status == want.Status && e.Target == want.Target
		}) {
			t.Errorf("the audit log does not tell of %+v in\n%s", want, admin.run("audit", "-n", "1000"))
		}
	}
}
