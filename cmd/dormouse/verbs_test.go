package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"dormouse/api"
)

func TestSubmitSaysWhatTheMonitorIsToDo(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	file := filepath.Join(t.TempDir(), "job.yaml")
	yaml := "command: [serve]\nhealth: {http: /old, period_ms: 30s, retries: 5}\nstarvation_period_ms: 5s\nuser: nobody\n"
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	got := dormouse(t, f.url, "submit", "-f", file, "--health-cmd", "curl -sf localhost", "--health-timeout", "2s", "--health-start-delay", "1m",
		"--on-starvation", "notify", "--webhook", "https://example.org/hook", "--progress-regex", `step (\d+)`)
	got.check(t, exitDone, "j-aaaaaaaa\n", "")
	want := `POST /v1/jobs {"command":["serve"],"tasks":1,"cpus":1,"mem_bytes":536870912,"user":"nobody",` +
		`"health":{"command":["/bin/sh","-c","curl -sf localhost"],"period_ms":30000,"timeout_ms":2000,"start_delay_ms":60000,"retries":5},` +
		`"on_starvation":"notify","starvation_period_ms":5000,"progress_regex":"step (\\d+)","webhook":"https://example.org/hook"}`
	if !f.called(want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(f.calls, "\n"), want)
	}
}

func TestSubmitSendsWhatTheFlagsSay(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	got := dormouse(t, f.url, "submit", "--name", "counter", "--cpus", "0.5", "--mem", "1.5G", "--cloud", "east", "--env", "A=1=2", "-e", "PASSED",
		"--volume", "/srv:/data:ro", "--dir", "/data", "--user", "1000:1000", "--cap-add", "SYS_PTRACE", "--cpu-baseline", "x86-64-v3",
		"--keep", "3", "--max-restarts", "2", "--priority", "-5", "--root", "oci:debian:12", "--", "count", "--to", "10")
	got.check(t, exitDone, "j-aaaaaaaa\n", "")
	want := `POST /v1/jobs {"name":"counter","command":["count","--to","10"],"tasks":1,"cpus":0.5,"mem_bytes":1610612736,"priority":-5,"cloud":"east",` +
		`"root":"oci:debian:12","env":{"A":"1=2","PASSED":"on"},"dir":"/data","volumes":[{"source":"/srv","destination":"/data","read_only":true}],` +
		`"user":"1000:1000","cap_add":["SYS_PTRACE"],"cpu_baseline":"x86-64-v3","keep":3,"max_restarts":2}`
	if !f.called(want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(f.calls, "\n"), want)
	}
}

func TestSubmitReadsAJobFileAndFlagsOverrideIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "job.yaml")
	text := "name: db\ncommand: [redis-server, --save, '']\nmem_bytes: 4G\ncpus: 2\nuser: redis\nenv: {A: '1', B: '2'}\nvolumes:\n- /srv:/data\n- {source: /a, destination: /b, read_only: true}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	dormouse(t, f.url, "submit", "-f", file, "--cpus", "1", "--env", "B=3").check(t, exitDone, "j-aaaaaaaa", "")
	want := `POST /v1/jobs {"name":"db","command":["redis-server","--save",""],"tasks":1,"cpus":1,"mem_bytes":4294967296,"env":{"A":"1","B":"3"},` +
		`"volumes":[{"source":"/srv","destination":"/data"},{"source":"/a","destination":"/b","read_only":true}],"user":"redis"}`
	if !f.called(want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(f.calls, "\n"), want)
	}
}

func TestSubmitWithAUsersTokenLeavesTheUserToTheController(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob, "GET /v1/whoami": api.Token{Role: api.RoleUser, User: "alice"}})
	dormouse(t, f.url, "submit", "--", "true").check(t, exitDone, "", "")
	if last := f.calls[len(f.calls)-1]; strings.Contains(last, `"user"`) {
		t.Errorf("the request names a user: %s", last)
	}
}

func TestSubmitRunsAsTheCallerUnlessToldOtherwise(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	dormouse(t, f.url, "submit", "--", "true").check(t, exitDone, "", "")
	dormouse(t, f.url, "submit", "--root", "dir:/srv/root", "--", "true").check(t, exitDone, "", "")
	specs := []api.JobSpec{}
	for _, call := range f.calls {
		if call == "GET /v1/whoami" {
			continue
		}
		spec := api.JobSpec{}
		if err := json.Unmarshal([]byte(strings.TrimPrefix(call, "POST /v1/jobs ")), &spec); err != nil {
			t.Fatal(err)
		}
		specs = append(specs, spec)
	}
	if os.Getuid() == 0 && specs[0].User != "root" {
		t.Errorf("on the host's tree the user is %q, want the caller's name", specs[0].User)
	}
	if want := fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid()); specs[1].User != want {
		t.Errorf("on another tree the user is %q, want the caller's numbers %s", specs[1].User, want)
	}
}

// Everything that cannot be meant is one sentence and exit status 2, before any
// call to the controller.
func TestBadUsageIsRefusedBeforeTheControllerIsAsked(t *testing.T) {
	job := func(text string) string {
		file := filepath.Join(t.TempDir(), "job.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	tests := []struct{ line, want string }{
		{"frobnicate", `"frobnicate" is not a command of dormouse`},
		{"sumbit -- true", `did you mean "submit"?`},
		{"ps --al", "there is no flag --al"},
		{"ps extra", `"extra" is one argument too many`},
		{"ps -o yaml", "it can only be table or json"},
		{"inspect", "JOB is missing"},
		{"inspect a b", "one argument too many"},
		{"node", ""},
		{"node explode east-0", `"explode" is not a command of dormouse node`},
		{"node kill", "NODE is missing"},
		{"checkpoint", "JOB is missing"},
		{"checkpoint rm", "CHECKPOINT is missing"},
		{"submit", "there is no command"},
		{"submit ls -l", "put -- before a program"},
		{"submit --cpus 0 -- true", "0 processors cannot be given"},
		{"submit --cpus -1 -- true", "-1 processors cannot be given"},
		{"submit --cpus NaN -- true", "NaN processors cannot be given"},
		{"submit --cpus 1e9 -- true", "1000000000 processors cannot be given"},
		{"submit --cpus many -- true", `--cpus is "many", but it must be a number`},
		{"submit --mem 0 -- true", "0 B of memory hold no program"},
		{"submit --mem -1G -- true", "the size -1G is negative"},
		{"submit --mem lots -- true", `"lots" is not a size such as 512M`},
		{"submit --mem 1000000T -- true", "no machine has"},
		{"submit --mem 99999999999T -- true", "larger than any machine"},
		{"submit --tasks 0 -- true", "at least 1 task"},
		{"submit --tasks x -- true", "must be a whole number"},
		{"submit --name a/b -- true", `the name "a/b" is not made of`},
		{"submit --env =x -- true", "is not NAME=VALUE"},
		{"submit --volume /a -- true", "is not SRC:DST"},
		{"submit --volume a:/b -- true", "not an absolute path on the node"},
		{"submit --volume /a:/ -- true", "not an absolute path below /"},
		{"submit --volume /a:/b:rx -- true", "only ro or rw"},
		{"submit --volume /a:/b --volume /c:/b/ -- true", "two volumes have the destination /b"},
		{"submit --root ubuntu -- true", "is not host, dir:PATH"},
		{"submit --root dir: -- true", "names no path"},
		{"submit --dir data -- true", "is not absolute"},
		{"submit --keep -1 -- true", "cannot be kept"},
		{"submit --max-restarts -1 -- true", "cannot be allowed"},
		{"submit --on-starvation panic -- true", "must be suspend, migrate, notify or ignore"},
		{"submit --starvation-period 1s -- true", "every 2.5s at most"},
		{"submit --progress-regex ( -- true", "the expression for progress"},
		{"submit --webhook file:///etc/passwd -- true", "must be an http or https address"},
		{"submit --health-http 8080 -- true", "[:PORT]/PATH"},
		{"submit --health-http /a --health-cmd b -- true", "not both"},
		{"submit --health-retries 3 -- true", "asks nothing"},
		{"submit --health-cmd= -- true", "asks nothing"},
		{"submit --health-cmd true --health-retries -1 -- true", "from 1 to 1000 times in a row"},
		{"submit --health-cmd true --health-timeout 1ms -- true", "timeout must be from 100ms"},
		{"submit --cpu-baseline 386 -- true", "is not one of native"},
		{"submit --launch last -- true", `the launch "last" is not one of auto, each, first`},
		{"submit --connections drop -- true", `"drop" is not one of refuse, close, keep`},
		{"submit --publish web -- true", "is not [TASK:]PORT[:TARGET][/udp]"},
		{"submit --publish 80/sctp -- true", "is not [TASK:]PORT[:TARGET][/udp]"},
		{"submit --publish 1:2:3:4 -- true", "is not [TASK:]PORT[:TARGET][/udp]"},
		{"submit --publish -1 -- true", "is not [TASK:]PORT[:TARGET][/udp]"},
		{"submit --publish 70000 -- true", "70000 cannot be published"},
		{"submit --publish 80:70000 -- true", "70000 cannot be published"},
		{"submit --publish 0 -- true", "0 cannot be published"},
		{"submit --publish 5:80:80 --tasks 2 -- true", "the job has the tasks 0 to 1"},
		{"submit --publish 80 --publish 80 -- true", "80/tcp is published twice"},
		{"submit --checkpoint-every sometimes -- true", "neither a duration"},
		{"submit --keep-daily -1 -- true", "-1 checkpoints cannot be kept"},
		{"submit --drill-every -1 -- true", "one in -1 checkpoints"},
		{"submit --walltime soon -- true", "must be a duration"},
		{"submit --walltime -1h -- true", "must be a duration"},
		{"submit -f /absent.yaml", "no such file"},
		{"submit -f " + job("command: [true"), "is not YAML"},
		{"submit -f " + job("comand: ['true']"), `there is no field "comand"`},
		{"submit -f " + job("command: sleep"), "the field command cannot be a string"},
		{"submit -f " + job("command: [x]\nmem_bytes: big"), "is not a size"},
		{"submit -f " + job("command: [x]\npublish: [http]"), "is not [TASK:]PORT"},
		{"submit -f " + job("command: [x]\npublish: [{port: 80, protocol: sctp}]"), `"sctp" of a published port is neither`},
		{"submit -f " + job("name: x"), "there is no command"},
		{"wait j --for sleeping", `"sleeping" is not a phase`},
		{"wait j --timeout 5", "must be a duration"},
		{"wait j --timeout -5s", "is negative"},
		{"logs j --task -2", "there is no task -2"},
		{"exec", "JOB is missing"},
		{"exec j", "there is no command"},
		{"exec j --task -1 -- ls", "there is no task -1"},
		{"exec j -o json -- ls", "-o json cannot hold"},
		{"exec j -i -t -- ls", "standard input is not a terminal"},
		{"clone c --name a/b", `the name "a/b" is not made of`},
		{"kill j --signal NOPE", "is not a signal"},
		{"operations --wait", "OPERATION is missing"},
		{"completion tcsh", "is not one of the shells"},
		{"--controller nonsense ps", "is not a URL"},
		{"--ca /absent.pem ps", "no such file"},
	}
	for _, test := range tests {
		if test.want == "" {
			continue
		}
		t.Run(test.line, func(t *testing.T) {
			f := newFake(t, nil)
			got := dormouse(t, f.url, strings.Fields(test.line)...)
			got.check(t, exitUsage, "", test.want)
			if !strings.HasPrefix(got.errors, "dormouse: ") || !strings.Contains(got.errors, "--help`") {
				t.Errorf("the error %q does not begin with the program or does not point to the help", got.errors)
			}
			if len(f.calls) > 0 {
				t.Errorf("the controller was asked: %v", f.calls)
			}
		})
	}
}

func TestExitStatusFollowsTheProblem(t *testing.T) {
	for status, want := range map[int]int{400: exitUsage, 422: exitUsage, 401: exitFailed, 404: exitNotFound, 409: exitRefused, 408: exitTimedOut, 500: exitFailed, 507: exitFailed} {
		f := newFake(t, map[string]any{"POST /v1/jobs/j/suspend": &api.Problem{Status: status, Detail: "because of this"}})
		dormouse(t, f.url, "suspend", "j").check(t, want, "", "dormouse: because of this")
	}
}

func TestNoControllerSaysWhatToDo(t *testing.T) {
	dormouse(t, "", "ps").check(t, exitFailed, "", "run `sudo dormouse up` here")
	f := newFake(t, nil)
	dormouse(t, "http://127.0.0.1:1", "ps").check(t, exitFailed, "", "is `dormouse up` running?")
	_ = f
}

// Every command that names an operation waits for it and prints its result.
func TestCommandsWaitForTheirOperation(t *testing.T) {
	suspended := phased(api.PhaseSuspended, "", nil)
	cancelled := phased(api.PhaseCancelled, "ended by the user", number(143))
	clone := runningJob
	clone.ID = "j-dddddddd"
	cloned := operation(api.OpClone, api.OpDone)
	cloned.Job = clone.ID
	tests := []struct {
		args   []string
		call   string
		kind   api.OperationKind
		job    api.JobDetail
		done   api.Operation
		text   string
		jsonID string
	}{
		{[]string{"checkpoint", "counter", "--label", "x"}, `POST /v1/jobs/counter/checkpoints`, api.OpCheckpoint, runningJob, operation(api.OpCheckpoint, api.OpDone), "c-bbbbbbbb\n", "c-bbbbbbbb"},
		{[]string{"suspend", "counter"}, `POST /v1/jobs/counter/suspend`, api.OpSuspend, suspended, operation(api.OpSuspend, api.OpDone), "j-aaaaaaaa suspended as c-bbbbbbbb\n", "j-aaaaaaaa"},
		{[]string{"preempt", "counter"}, `POST /v1/jobs/counter/preempt`, api.OpPreempt, suspended, operation(api.OpPreempt, api.OpDone), "j-aaaaaaaa suspended as c-bbbbbbbb\n", "j-aaaaaaaa"},
		{[]string{"swap", "other", "counter"}, `POST /v1/jobs/other/swap`, api.OpSwap, runningJob, operation(api.OpSwap, api.OpDone), "j-aaaaaaaa running on east-1 from c-bbbbbbbb\n", "j-aaaaaaaa"},
		{[]string{"resume", "counter", "--cloud", "west", "--from", "c-1"}, `POST /v1/jobs/counter/resume`, api.OpResume, runningJob, operation(api.OpResume, api.OpDone), "j-aaaaaaaa running on east-1 from c-bbbbbbbb\n", "j-aaaaaaaa"},
		{[]string{"restart", "counter"}, `POST /v1/jobs/counter/restart`, api.OpRestart, runningJob, operation(api.OpRestart, api.OpDone), "j-aaaaaaaa running on east-1 from c-bbbbbbbb\n", "j-aaaaaaaa"},
		{[]string{"kill", "counter"}, `POST /v1/jobs/counter/kill`, api.OpKill, cancelled, operation(api.OpKill, api.OpDone), "j-aaaaaaaa cancelled\n", "j-aaaaaaaa"},
		{[]string{"clone", "c-bbbbbbbb", "--cloud", "west"}, `POST /v1/checkpoints/c-bbbbbbbb/clone`, api.OpClone, clone, cloned, "j-dddddddd\n", "j-dddddddd"},
	}
	for _, test := range tests {
		t.Run(test.args[0], func(t *testing.T) {
			routes := func() map[string]any {
				return map[string]any{
					test.call:                        operation(test.kind, api.OpRunning),
					"GET /v1/operations/o-11111111":  inTurn(operation(test.kind, api.OpRunning), test.done),
					"GET /v1/jobs/" + test.job.ID:    test.job,
					"GET /v1/checkpoints/c-bbbbbbbb": durableCheckpoint,
				}
			}
			f := newFake(t, routes())
			got := dormouse(t, f.url, test.args...)
			got.check(t, exitDone, test.text, "")
			if got.out != test.text || got.errors != "" {
				t.Errorf("piped, it printed %q and %q; want only %q", got.out, got.errors, test.text)
			}

			f = newFake(t, routes())
			got = dormouse(t, f.url, append([]string{"-o", "json"}, test.args...)...)
			document := struct{ ID string }{}
			if err := json.Unmarshal([]byte(got.out), &document); err != nil || document.ID != test.jsonID {
				t.Errorf("-o json printed %s (%v), want one document with the id %s", got.out, err, test.jsonID)
			}

			f = newFake(t, routes())
			got = dormouse(t, f.url, append(slices.Clone(test.args), "-o", "json", "--detach")...)
			detached := api.Operation{}
			if err := json.Unmarshal([]byte(got.out), &detached); err != nil || detached.ID != "o-11111111" || detached.Phase != api.OpRunning {
				t.Errorf("--detach printed %s (%v), want the running operation", got.out, err)
			}
		})
	}
}

func TestKillWithASignalSaysWhatWasSent(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs/counter/kill": operation(api.OpKill, api.OpDone)})
	dormouse(t, f.url, "kill", "counter", "--signal", "usr1").check(t, exitDone, "j-aaaaaaaa got SIGUSR1\n", "")
	if !f.called(`POST /v1/jobs/counter/kill {"signal":"SIGUSR1"}`) {
		t.Errorf("called %v", f.calls)
	}
}

func TestInterruptEndsFollowingWell(t *testing.T) {
	for _, verb := range []string{"logs", "events"} {
		ctx, cancel := context.WithCancel(context.Background())
		endless := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
			cancel()
			<-r.Context().Done()
		})
		f := newFake(t, map[string]any{"GET /v1/jobs/j": runningJob, "GET /v1/jobs/j-aaaaaaaa/logs": endless, "GET /v1/events": endless})
		dormouseIn(t, ctx, f.url, "", verb, "-f", "j").check(t, exitDone, "", "")
	}
}

func TestFailedOperationsSetTheExitStatus(t *testing.T) {
	for _, test := range []struct {
		refused bool
		phase   api.OperationPhase
		error   string
		status  int
		want    string
	}{
		{true, api.OpFailed, "the program uses io_uring", exitRefused, "dormouse: the program uses io_uring\n"},
		{false, api.OpFailed, "no space left", exitFailed, "dormouse: no space left\n"},
		{false, api.OpCancelled, "", exitFailed, "the checkpoint was cancelled"},
	} {
		ended := operation(api.OpCheckpoint, test.phase)
		ended.Refused, ended.Error = test.refused, test.error
		f := newFake(t, map[string]any{"POST /v1/jobs/j/checkpoints": ended})
		dormouse(t, f.url, "checkpoint", "j").check(t, test.status, "", test.want)
	}
}

func TestInterruptedWaitSaysHowToLookAtTheOperation(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	f := newFake(t, map[string]any{
		"POST /v1/jobs/j/checkpoints": operation(api.OpCheckpoint, api.OpRunning),
		"GET /v1/operations/o-11111111": http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			cancel()
			<-r.Context().Done()
		}),
	})
	dormouseIn(t, ctx, f.url, "", "checkpoint", "j").check(t, exitFailed, "", "the checkpoint goes on: `dormouse operations o-11111111`")
}

func TestProgressIsDrawnOnATerminalOnly(t *testing.T) {
	out := &strings.Builder{}
	bar := &progressBar{cli: &cli{err: out, terminal: true}}
	running := operation(api.OpCheckpoint, api.OpRunning)
	bar.draw(&running)
	bar.clear()
	if want := "\r[============            ]  50% capture\x1b[K\r\x1b[K"; out.String() != want {
		t.Errorf("drew %q, want %q", out, want)
	}
}

func TestWaitJudgesThePhase(t *testing.T) {
	tests := []struct {
		name   string
		args   []string
		phases []any
		status int
		out    string
		errors string
	}{
		{"completed", nil, []any{runningJob, phased(api.PhaseCompleted, "", number(0))}, exitDone, "j-aaaaaaaa completed\n", ""},
		{"failed", nil, []any{phased(api.PhaseFailed, "", number(3))}, exitFailed, "", "j-aaaaaaaa failed (exit code 3)"},
		{"failed with a reason", nil, []any{phased(api.PhaseFailed, "node east-0 was lost", nil)}, exitFailed, "", "failed (node east-0 was lost)"},
		{"cancelled", nil, []any{phased(api.PhaseCancelled, "", nil)}, exitFailed, "", "j-aaaaaaaa cancelled"},
		{"running", []string{"--for", "running"}, []any{phased(api.PhaseStarting, "", nil), runningJob}, exitDone, "j-aaaaaaaa running\n", ""},
		{"failed as wanted", []string{"--for", "failed"}, []any{phased(api.PhaseFailed, "", number(3))}, exitDone, "j-aaaaaaaa failed\n", ""},
		{"over", []string{"--for", "running"}, []any{phased(api.PhaseCompleted, "", number(0))}, exitFailed, "", "so it can no longer be running"},
		{"past", []string{"--for", "pending"}, []any{runningJob}, exitFailed, "", "is already running, so it can no longer be pending"},
		{"suspended first", []string{"--for", "running"}, []any{phased(api.PhaseSuspended, "", nil), runningJob}, exitDone, "running", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFake(t, map[string]any{"GET /v1/jobs/j/wait": inTurn(test.phases...)})
			dormouse(t, f.url, append([]string{"wait", "j"}, test.args...)...).check(t, test.status, test.out, test.errors)
		})
	}
}

func TestWaitTimesOut(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/jobs/j/wait": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("timeout") != "0s" {
			<-r.Context().Done() // a long poll that nothing ends
			return
		}
		json.NewEncoder(w).Encode(runningJob)
	})})
	dormouse(t, f.url, "wait", "j", "--timeout", "500ms").check(t, exitTimedOut, "", "j-aaaaaaaa is still running after 500ms")
	dormouse(t, f.url, "wait", "k", "--timeout", "5s").check(t, exitNotFound, "", "there is no")
}

func TestLogsGoWhereTheProgramWroteThem(t *testing.T) {
	lines := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, `{"task":0,"stream":"stdout","data":"b25lCnR3"}`)
		fmt.Fprintln(w, `{"task":1,"stream":"stdout","data":"VFdPCg=="}`)
		fmt.Fprintln(w, `{"task":0,"stream":"stderr","data":"ZXJyCg=="}`)
		fmt.Fprintln(w, `{"task":0,"stream":"stdout","data":"bwo="}`)
	})
	f := newFake(t, map[string]any{"GET /v1/jobs/j": runningJob, "GET /v1/jobs/j-aaaaaaaa/logs": lines})
	got := dormouse(t, f.url, "logs", "j")
	if got.out != "one\ntwTWO\no\n" || got.errors != "err\n" {
		t.Errorf("one task: printed %q and %q", got.out, got.errors)
	}
	two := runningJob
	two.Tasks = 2
	f = newFake(t, map[string]any{"GET /v1/jobs/j": two, "GET /v1/jobs/j-aaaaaaaa/logs": lines})
	got = dormouse(t, f.url, "logs", "j")
	if got.out != "task 0 | one\ntask 1 | TWO\ntask 0 | two\n" || got.errors != "task 0 | err\n" {
		t.Errorf("two tasks: printed %q and %q", got.out, got.errors)
	}
	got = dormouse(t, f.url, "logs", "j", "-f", "--task", "1", "-o", "json")
	if !f.called("GET /v1/jobs/j-aaaaaaaa/logs?follow=true&task=1") || !strings.HasPrefix(got.out, `{"task":0,"stream":"stdout","data":"b25lCnR3"}`+"\n") {
		t.Errorf("as JSON: printed %q after %v", got.out, f.calls)
	}
}

// execServer answers an exec with a frame of output and an exit status; with
// echo it first sends back all input.
func execServer(t *testing.T, status byte, echo bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		buffered.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: dormouse-exec\r\n\r\n")
		buffered.Flush()
		for {
			head := make([]byte, 5)
			if _, err := buffered.Read(head); err != nil {
				return
			}
			body := make([]byte, head[4])
			buffered.Read(body)
			if head[0] == 6 {
				break
			}
			if echo {
				buffered.Write(append([]byte{1, 0, 0, 0, head[4]}, body...))
			}
		}
		buffered.WriteString("\x02\x00\x00\x00\x04oops")
		buffered.Write([]byte{3, 0, 0, 0, 4, 0, 0, 0, status})
		buffered.Flush()
	}
}

func TestExecExitsWithTheCommandsStatus(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs/j/exec": execServer(t, 42, true)})
	got := dormouseIn(t, context.Background(), f.url, "input", "exec", "-i", "j", "--env", "A=1", "--", "cat", "-n")
	if got.status != 42 || got.out != "input" || got.errors != "oops" {
		t.Errorf("got %+v, want status 42, the input back and no message of our own", got)
	}
	if !f.called("POST /v1/jobs/j/exec?cmd=cat&cmd=-n&env=A%3D1&task=0") {
		t.Errorf("called %v", f.calls)
	}
}

func TestExecLeavesInputAloneUnlessAsked(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs/j/exec": execServer(t, 0, true)})
	got := dormouseIn(t, context.Background(), f.url, "input", "exec", "j", "--", "cat")
	if got.status != exitDone || got.out != "" {
		t.Errorf("got %+v, want no input to be passed on", got)
	}
}

func TestVerifyFailsOnDamage(t *testing.T) {
	done := operation(api.OpVerify, api.OpDone)
	done.Result = json.RawMessage(`[{"checkpoint":"c-1","ok":true,"bytes":1024},{"checkpoint":"c-2","ok":false,"bytes":10,"problems":["pack p1 is truncated"]}]`)
	f := newFake(t, map[string]any{"POST /v1/verify": done})
	dormouse(t, f.url, "verify").check(t, exitFailed, "c-2         damaged  10 B      pack p1 is truncated", "1 of 2 checkpoints damaged")
	done.Result = json.RawMessage(`[{"checkpoint":"c-1","ok":true,"bytes":1024}]`)
	f = newFake(t, map[string]any{"POST /v1/checkpoints/c-1/verify": done})
	dormouse(t, f.url, "verify", "c-1", "-o", "json").check(t, exitDone, `"ok": true`, "")
	done.Kind = api.OpDrill
	done.Result = json.RawMessage(`[{"checkpoint":"c-1","ok":true,"bytes":0,"drill":{"time":"2026-03-01T12:00:00Z","ok":true,"restore_ms":310,"nodes":["east-1"]}}]`)
	f = newFake(t, map[string]any{"POST /v1/checkpoints/c-1/verify": done})
	dormouse(t, f.url, "verify", "--restore", "c-1").check(t, exitDone, "c-1         ok       restored on east-1 in 310 ms  -\n", "")
	dormouse(t, f.url, "verify", "--restore").check(t, exitUsage, "", "--restore needs the checkpoint")
}

func TestRemovals(t *testing.T) {
	f := newFake(t, map[string]any{
		"GET /v1/jobs/counter": runningJob, "DELETE /v1/jobs/j-aaaaaaaa": &api.Problem{Status: 409, Detail: "j-aaaaaaaa runs; end it with `dormouse kill j-aaaaaaaa`"},
		"GET /v1/checkpoints/c-b": durableCheckpoint, "DELETE /v1/checkpoints/c-bbbbbbbb": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }),
	})
	dormouse(t, f.url, "rm", "counter").check(t, exitRefused, "", "end it with")
	dormouse(t, f.url, "checkpoint", "rm", "c-b").check(t, exitDone, "c-bbbbbbbb removed\n", "")
	dormouse(t, f.url, "checkpoint", "rm", "c-x").check(t, exitNotFound, "", "there is no")
}

func TestNodePower(t *testing.T) {
	lost := readyNode
	lost.State = api.NodeLost
	f := newFake(t, map[string]any{"POST /v1/nodes/east-1/kill": nil, "POST /v1/nodes/east-1/start": nil, "GET /v1/nodes": inTurn([]api.Node{readyNode}, []api.Node{lost}, []api.Node{readyNode})})
	dormouse(t, f.url, "node", "kill", "east-1").check(t, exitDone, "east-1 lost\n", "")
	dormouse(t, f.url, "node", "start", "east-1", "-o", "json").check(t, exitDone, `"state": "ready"`, "")
	dormouse(t, f.url, "node", "kill", "nowhere").check(t, exitNotFound, "", "there is no")
}

func TestTablesAreAlignedForPeople(t *testing.T) {
	event := api.Event{ID: 7, Time: testNow, Job: "j-aaaaaaaa", Type: "checkpoint.durable", Message: "done"}
	events := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		encoded, _ := json.Marshal(event)
		fmt.Fprintf(w, "id: 7\ndata: %s\n\n", encoded)
	})
	f := newFake(t, map[string]any{
		"GET /v1/jobs": []api.Job{runningJob.Job}, "GET /v1/jobs/counter": runningJob, "GET /v1/jobs/j-aaaaaaaa/checkpoints": []api.Checkpoint{}, "GET /v1/checkpoints": []api.Checkpoint{durableCheckpoint},
		"GET /v1/nodes": []api.Node{readyNode}, "GET /v1/clouds": []api.Cloud{{Name: "east", Driver: "local", Nodes: 2}},
		"GET /v1/operations": []api.Operation{operation(api.OpCheckpoint, api.OpRunning)}, "GET /v1/events": events,
	})
	for line, want := range map[string]string{
		"ps": "ID          NAME     PHASE    CLOUD  TASKS  CHECKPOINTS  RESTARTS  AGE  EXIT  REASON\n" +
			"j-aaaaaaaa  counter  running  east   1      2            1         60s  -     -\n",
		"checkpoints": "ID          JOB         STATE    TRIGGER  LABEL  AGE  PAUSE  SIZE      STORED   NEW       PARENT      DRILL\n" +
			"c-bbbbbbbb  j-aaaaaaaa  durable  user     first  30s  84 ms  1.00 GiB  600 MiB  6.00 MiB  c-cccccccc  -\n",
		"nodes": "NAME    CLOUD  STATE  CPUS    MEMORY               TASKS  CRIU   ADDRESS     LABELS  REASON\n" +
			"east-1  east   ready  1 of 2  512 MiB of 2.00 GiB  1      4.2.1  100.64.0.2  -       -\n",
		"clouds":          "NAME  DRIVER  NODES\neast  local   2\n",
		"operations":      "o-11111111  checkpoint  j-aaaaaaaa  running  50%       capture  50s\n",
		"inspect counter": "TASK  NODE    PHASE    PID   ADDRESS    EXIT  SIGNAL  REASON\n0     east-1  running  4711  10.90.0.1  -     -       -\n",
		"events":          "j-aaaaaaaa    checkpoint.durable      done\n",
	} {
		dormouse(t, f.url, strings.Fields(line)...).check(t, exitDone, want, "")
	}
}

// The names of the design, section 4: programs outside rely on them.
func TestJSONFieldNamesAreTheContract(t *testing.T) {
	full := runningJob
	full.ExitCode, full.Finished = number(0), &finished
	full.TaskStatus = []api.TaskStatus{{Node: "n", Phase: "p", Pid: 1, VirtualIP: "i", ExitCode: number(1)}}
	ended := operation(api.OpCheckpoint, api.OpFailed)
	ended.Error, ended.Finished = "x", &finished
	events := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "data: {\"id\":1,\"time\":\"2026-11-21T12:00:00Z\",\"job\":\"j\",\"type\":\"t\",\"message\":\"m\"}\n\n")
	})
	f := newFake(t, map[string]any{
		"GET /v1/jobs": []api.Job{full.Job}, "GET /v1/jobs/j": full, "GET /v1/jobs/j-aaaaaaaa/checkpoints": []api.Checkpoint{}, "GET /v1/checkpoints": []api.Checkpoint{durableCheckpoint},
		"GET /v1/nodes": []api.Node{readyNode}, "GET /v1/operations": []api.Operation{ended}, "GET /v1/events": events,
	})
	jobFields := "id name phase reason tasks priority cloud checkpoints restarts created started finished exit_code"
	for line, want := range map[string]string{
		"ps":          jobFields,
		"inspect j":   jobFields + " spec task_status",
		"checkpoints": "id job state trigger label created pause_ms size_bytes stored_bytes new_bytes tasks parent",
		"nodes":       "id name cloud state cpus mem_bytes cpus_used mem_used tasks",
		"operations":  "id kind job phase progress error started finished",
		"events":      "time job type message",
	} {
		got := dormouse(t, f.url, append(strings.Fields(line), "-o", "json")...)
		fields := fieldsOf(t, got.out)
		for _, name := range strings.Fields(want) {
			if _, ok := fields[name]; !ok {
				t.Errorf("%s -o json has no field %q, only %v", line, name, sortedKeys(fields))
			}
		}
		if line == "inspect j" {
			task := fields["task_status"].([]any)[0].(map[string]any)
			if want := []string{"exit_code", "index", "node", "phase", "pid", "virtual_ip"}; !reflect.DeepEqual(sortedKeys(task), want) {
				t.Errorf("task_status has the fields %v, want %v", sortedKeys(task), want)
			}
		}
	}
}

func fieldsOf(t *testing.T, document string) map[string]any {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(document), &value); err != nil {
		t.Fatalf("not one JSON document: %v\n%s", err, document)
	}
	if list, ok := value.([]any); ok {
		value = list[0]
	}
	return value.(map[string]any)
}

func sortedKeys(fields map[string]any) []string {
	keys := []string{}
	for key := range fields {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}

func TestEmptyListsAreJSONLists(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/jobs": []api.Job{}})
	if got := dormouse(t, f.url, "ps", "-o", "json"); got.out != "[]\n" {
		t.Errorf("printed %q, want an empty list", got.out)
	}
}

func TestEnvPrintsWhatAShellCanRead(t *testing.T) {
	state := t.TempDir()
	token := filepath.Join(state, "admin.token")
	if err := os.WriteFile(token, []byte("it's secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	encoded, _ := json.Marshal(pointer{URL: "https://127.0.0.1:7117", TokenFile: token, CAFile: "/ca.pem", State: state, Pid: 1})
	if err := os.WriteFile(filepath.Join(state, pointerFile), encoded, 0o600); err != nil {
		t.Fatal(err)
	}
	want := "export DORMOUSE_CONTROLLER='https://127.0.0.1:7117'\nexport DORMOUSE_TOKEN='it'\\''s secret'\nexport DORMOUSE_CA='/ca.pem'\n"
	if got := dormouse(t, "", "env", "--state", state); got.out != want {
		t.Errorf("printed\n%s\nwant\n%s", got.out, want)
	}
	dormouse(t, "", "env", "--state", state, "-o", "json").check(t, exitDone, `"DORMOUSE_TOKEN": "it's secret"`, "")
	dormouse(t, "", "env", "--state", t.TempDir()).check(t, exitFailed, "", "no `dormouse up` runs with the state directory")
}

func TestCompletionKnowsWhatTheControllerKnows(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/jobs": []api.Job{runningJob.Job}, "GET /v1/nodes": []api.Node{readyNode}, "GET /v1/checkpoints": []api.Checkpoint{durableCheckpoint}})
	for line, want := range map[string]string{
		"__complete inspect j-":       "j-aaaaaaaa\tcounter running",
		"__complete node kill e":      "east-1\tready",
		"__complete verify ":          "c-bbbbbbbb\tj-aaaaaaaa durable",
		"__complete wait x --for run": "running",
	} {
		args := strings.Fields(line)
		if strings.HasSuffix(line, " ") {
			args = append(args, "")
		}
		if got := dormouse(t, f.url, args...); !strings.Contains(got.out, want) {
			t.Errorf("%q completes to %q, want %q", line, got.out, want)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		dormouse(t, "", "completion", shell).check(t, exitDone, "dormouse", "")
	}
}

// Everything a user can type has help with an example, and -o json is known.
func TestEveryCommandHasHelpAndAnExample(t *testing.T) {
	var visit func(*cobra.Command)
	visit = func(command *cobra.Command) {
		if command.Hidden {
			return
		}
		if command.Short == "" || command.Example == "" {
			t.Errorf("%s has no short description or no example", command.CommandPath())
		}
		for _, below := range command.Commands() {
			visit(below)
		}
	}
	root := newRoot(&cli{})
	visit(root)
	names := []string{}
	for _, command := range root.Commands() {
		names = append(names, command.Name())
	}
	for _, name := range strings.Fields("submit ps inspect wait logs exec checkpoint checkpoints verify suspend resume restart clone preempt swap kill rm nodes node drain uncordon clouds events operations env version completion") {
		if !slices.Contains(names, name) {
			t.Errorf("there is no command %s", name)
		}
		dormouse(t, "", name, "--help").check(t, exitDone, "Examples:", "")
	}
}

func TestHumanWords(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10 << 20: "10.0 MiB", 1023 << 20: "1.00 GiB", 5 << 40: "5.00 TiB"} {
		if got := humanSize(bytes); got != want {
			t.Errorf("humanSize(%d) = %s, want %s", bytes, got, want)
		}
	}
	for text, want := range map[string]int64{"512M": 512 << 20, "2G": 2 << 30, "1GiB": 1 << 30, "1.5g": 3 << 29, "4096": 4096, "10 kb": 10240, "7B": 7} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("parseSize(%s) = %d, %v; want %d", text, got, err, want)
		}
	}
	for age, want := range map[time.Duration]string{-time.Second: "0s", 90 * time.Second: "90s", 5 * time.Minute: "5m", 3 * time.Hour: "3h", 72 * time.Hour: "3d"} {
		if got := humanAge(age); got != want {
			t.Errorf("humanAge(%s) = %s, want %s", age, got, want)
		}
	}
}

func FuzzParseSizeNeverPanics(f *testing.F) {
	f.Add("1.5GiB")
	f.Fuzz(func(t *testing.T, text string) {
		if bytes, err := parseSize(text); err == nil && bytes < 0 {
			t.Errorf("parseSize(%q) = %d", text, bytes)
		}
	})
}

func FuzzJobFilesNeverPanic(f *testing.F) {
	f.Add([]byte("command: [a]\nvolumes: [/a:/b, {source: x}]\nmem_bytes: 1G"))
	f.Fuzz(func(t *testing.T, text []byte) { parseJobFile(text) })
}

func TestDryRunPrintsThePlanAndDoesNothing(t *testing.T) {
	took := 1500.0
	plan := api.PreemptPlan{Bytes: 3 << 20, EstimatedMS: &took, Out: []api.Eviction{{
		Job: "j-aaaaaaaa", Name: "counter", Priority: 2, Nodes: []string{"east-0"}, Bytes: 3 << 20, BytesFrom: "the newest checkpoint",
		EstimatedMS: &took, EstimatedFrom: "its newest checkpoint", Comes: "waits for room: needs 4 cpus",
	}}, In: &api.Arrival{Job: "j-bbbbbbbb", Nodes: []string{"east-0"}, From: "c-1"}}
	f := newFake(t, map[string]any{"GET /v1/jobs/counter/swap": plan, "GET /v1/jobs/counter/preempt": plan})
	want := "out             j-aaaaaaaa (counter), priority 2, on east-0\n" +
		"to checkpoint   3.00 MiB (known from the newest checkpoint)\n" +
		"estimated time  1.50 s (known from its newest checkpoint)\n" +
		"then            waits for room: needs 4 cpus\n" +
		"in              j-bbbbbbbb, restored from c-1 on east-0\n"
	dormouse(t, f.url, "swap", "counter", "urgent", "--dry-run").check(t, exitDone, want, "")
	dormouse(t, f.url, "preempt", "counter", "-n").check(t, exitDone, "out             j-aaaaaaaa", "")
	dormouse(t, f.url, "preempt", "counter", "-n", "-o", "json").check(t, exitDone, `"estimated_from": "its newest checkpoint"`, "")
	if !f.called("GET /v1/jobs/counter/swap?in=urgent") || len(f.calls) != 3 {
		t.Errorf("the controller was asked %v", f.calls)
	}
	unknown := plan
	unknown.Out = []api.Eviction{{Job: "j-aaaaaaaa", Nodes: []string{"east-0"}, BytesFrom: "the memory reserved", EstimatedFrom: "no checkpoint was made yet"}}
	f = newFake(t, map[string]any{"GET /v1/jobs/counter/preempt": unknown})
	dormouse(t, f.url, "preempt", "counter", "-n").check(t, exitDone, "estimated time  not known: no checkpoint was made yet\n", "")
}

func TestDrainListsWhereJobsWent(t *testing.T) {
	done := api.Operation{ID: "o-11111111", Kind: api.OpDrain, Node: "east-0", Phase: api.OpDone,
		Result: json.RawMessage(`[{"job":"j-1","name":"counter","phase":"running","nodes":["west-0"]},{"job":"j-2","name":"","phase":"suspended","reason":"waits for room"}]`)}
	f := newFake(t, map[string]any{"POST /v1/nodes/east-0/drain": done})
	dormouse(t, f.url, "drain", "east-0").check(t, exitDone, "j-1  counter  running    west-0  -\nj-2  -        suspended  -       waits for room\n", "")
	dormouse(t, f.url, "drain", "east-0", "--detach").check(t, exitDone, "o-11111111\n", "")
	done.Result = json.RawMessage(`[]`)
	f = newFake(t, map[string]any{"POST /v1/nodes/east-0/drain": done})
	dormouse(t, f.url, "drain", "east-0").check(t, exitDone, "east-0 is empty\n", "")
	done.Phase, done.Refused, done.Error = api.OpFailed, true, "node east-0 is cordoned, but not empty: job j-1: it could not be checkpointed"
	f = newFake(t, map[string]any{"POST /v1/nodes/east-0/drain": done})
	dormouse(t, f.url, "drain", "east-0").check(t, exitRefused, "", "it could not be checkpointed")
}

func TestNodeLabels(t *testing.T) {
	f := newFake(t, map[string]any{
		"POST /v1/nodes/east-0/labels":   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }),
		"POST /v1/nodes/east-0/uncordon": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }),
		"GET /v1/nodes":                  []api.Node{{ID: "east-0", Name: "east-0", State: api.NodeReady, Labels: map[string]string{"disk": "ssd"}}},
	})
	dormouse(t, f.url, "node", "label", "east-0", "disk=ssd", "old-").check(t, exitDone, "east-0 disk=ssd\n", "")
	if !f.called(`POST /v1/nodes/east-0/labels {"disk":"ssd","old":""}`) {
		t.Errorf("the controller was asked %v", f.calls)
	}
	dormouse(t, f.url, "uncordon", "east-0").check(t, exitDone, "east-0 ready\n", "")
	dormouse(t, f.url, "node", "label", "east-0").check(t, exitUsage, "", "KEY=VALUE")
	for _, bad := range []string{"disk", "=ssd", "disk="} {
		dormouse(t, f.url, "node", "label", "east-0", bad).check(t, exitUsage, "", "is not a label: KEY=VALUE")
		dormouse(t, f.url, "submit", "--constraint", bad, "--", "true").check(t, exitUsage, "", "is not a label: KEY=VALUE")
	}
	dormouse(t, f.url, "submit", "--placement", "anywhere", "--", "true").check(t, exitUsage, "", "not one of spread, pack")
}
