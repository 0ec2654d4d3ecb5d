package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dormouse/api"
)

func TestPublishedPortsMeanWhatTheySeemTo(t *testing.T) {
	for _, test := range []struct {
		text  string
		tasks int
		want  api.Publish
	}{
		{"8080", 1, api.Publish{Port: 8080}},
		{"8080/tcp", 1, api.Publish{Port: 8080}},
		{"53/udp", 1, api.Publish{Port: 53, Protocol: "udp"}},
		{"8080:80", 1, api.Publish{Port: 8080, Target: 80}},
		{"8080:80", 4, api.Publish{Port: 8080, Target: 80}},
		{"0:8080", 1, api.Publish{Port: 8080}},
		{"3:8080", 4, api.Publish{Task: 3, Port: 8080}},
		{"3:8080:80/udp", 4, api.Publish{Task: 3, Port: 8080, Target: 80, Protocol: "udp"}},
	} {
		if got, err := parsePublish(test.text, test.tasks); err != nil || got != test.want {
			t.Errorf("%s of a job with %d tasks is %+v, %v; want %+v", test.text, test.tasks, got, err, test.want)
		}
	}
}

func TestSubmitSendsWhatTheFlagsSayAboutTasks(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	dormouse(t, f.url, "submit", "--tasks", "4", "--user", "root", "--publish", "1:8080:80", "-p", "53/udp", "--launch", "first", "--connections", "close", "--", "mpirun", "x").check(t, exitDone, "", "")
	want := `POST /v1/jobs {"command":["mpirun","x"],"tasks":4,"cpus":1,"mem_bytes":536870912,"user":"root","launch":"first",` +
		`"publish":[{"task":1,"port":8080,"target":80},{"task":0,"protocol":"udp","port":53}],"connections":"close"}`
	if !f.called(want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(f.calls, "\n"), want)
	}
}

func TestJobFilesPublishToo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "job.yaml")
	text := "command: [x]\ntasks: 2\nuser: root\nlaunch: each\nconnections: keep\npublish:\n- 1:8080\n- 9090\n- {task: 1, port: 7070, target: 70}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFake(t, map[string]any{"POST /v1/jobs": runningJob})
	dormouse(t, f.url, "submit", "-f", file, "--connections", "refuse").check(t, exitDone, "", "")
	want := `POST /v1/jobs {"command":["x"],"tasks":2,"cpus":1,"mem_bytes":536870912,"user":"root","launch":"each",` +
		`"publish":[{"task":1,"port":7070,"target":70},{"task":1,"port":8080},{"task":0,"port":9090}],"connections":"refuse"}`
	if !f.called(want) {
		t.Errorf("called\n%s\nwant\n%s", strings.Join(f.calls, "\n"), want)
	}
}

// parallelCheckpoint is one of parallelJob in which task 2 held up the others.
func parallelCheckpoint() api.Checkpoint {
	checkpoint := durableCheckpoint
	checkpoint.Tasks = 4
	for i, dump := range []float64{40, 42, 95, 41} {
		checkpoint.Steps = append(checkpoint.Steps, api.CaptureSteps{Task: i, Node: []string{"east-0", "east-1"}[i%2], FreezeMS: 2, DumpMS: dump, FilesMS: 1,
			PauseMS: 110, UploadMS: 300, SizeBytes: 128 << 20, NewBytes: 5 << 20})
	}
	return checkpoint
}

func TestInspectShowsTasksAndTheStepsOfTheirCheckpoint(t *testing.T) {
	older := parallelCheckpoint()
	older.ID, older.Created = "c-older", older.Created.Add(-1)
	unmeasured := durableCheckpoint
	unmeasured.ID, unmeasured.Created = "c-unmeasured", testNow
	f := newFake(t, map[string]any{"GET /v1/jobs/j": parallelJob(), "GET /v1/jobs/j-aaaaaaaa/checkpoints": []api.Checkpoint{older, parallelCheckpoint(), unmeasured}})
	got := dormouse(t, f.url, "inspect", "j")
	for _, want := range []string{
		"TASK  NODE    PHASE    PID  ADDRESS     EXIT  SIGNAL  REASON\n0     east-0  running  100  10.64.16.1  -     -       -\n1     east-1",
		"checkpoint c-bbbbbbbb, durable, 30s ago\n",
		"TASK  NODE    FREEZE  DUMP   FILES   PAUSE   BYTES    NEW       UPLOAD\n0     east-0  2.0 ms  40 ms  1.0 ms  110 ms  128 MiB  5.00 MiB  300 ms\n",
		"slowest: task 2 on east-0, captured in 98 ms\n",
	} {
		got.check(t, exitDone, want, "")
	}
	document := struct {
		ID     string
		Newest api.Checkpoint `json:"newest_checkpoint"`
	}{}
	got = dormouse(t, f.url, "inspect", "j", "-o", "json")
	if err := json.Unmarshal([]byte(got.out), &document); err != nil || document.ID != "j-aaaaaaaa" || document.Newest.ID != "c-bbbbbbbb" || len(document.Newest.Steps) != 4 {
		t.Errorf("-o json printed %s (%v), want the job with its newest checkpoint", got.out, err)
	}
}

func TestInspectShowsWherePublishedPortsAre(t *testing.T) {
	job := runningJob
	job.Spec.Publish = []api.Publish{{Port: 8080, Target: 80}, {Port: 53, Protocol: "udp"}}
	f := newFake(t, map[string]any{"GET /v1/jobs/j": job, "GET /v1/jobs/j-aaaaaaaa/checkpoints": []api.Checkpoint{}, "GET /v1/nodes": []api.Node{readyNode}})
	got := dormouse(t, f.url, "inspect", "j")
	got.check(t, exitDone, "100.64.0.2:8080/tcp leads to port 80 of task 0\n", "")
	got.check(t, exitDone, "100.64.0.2:53/udp leads to port 53 of task 0\n", "")
}

func TestOperationShowsTheStepsSoFar(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/operations/o-1": operation(api.OpCheckpoint, api.OpRunning), "GET /v1/checkpoints/c-bbbbbbbb": parallelCheckpoint()})
	dormouse(t, f.url, "operations", "o-1").check(t, exitDone, "slowest: task 2 on east-0", "")
	f = newFake(t, map[string]any{"GET /v1/operations/o-1": operation(api.OpCheckpoint, api.OpDone)})
	dormouse(t, f.url, "operations", "o-1").check(t, exitDone, "done", "")
}

func TestInspectShowsACheckpoint(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/checkpoints/c-bb": parallelCheckpoint()})
	dormouse(t, f.url, "inspect", "c-bb").check(t, exitDone, "slowest: task 2", "")
	dormouse(t, f.url, "inspect", "c-bb", "-o", "json").check(t, exitDone, `"id": "c-bbbbbbbb"`, "")
	dormouse(t, f.url, "inspect", "c-none").check(t, exitNotFound, "", "there is no")
}

func TestPsListsTasks(t *testing.T) {
	job := parallelJob()
	f := newFake(t, map[string]any{"GET /v1/jobs": []api.Job{job.Job, {ID: "j-removed"}}, "GET /v1/jobs/j-aaaaaaaa": job})
	dormouse(t, f.url, "ps", "--tasks").check(t, exitDone, "j-aaaaaaaa  counter  3     east-1  running  103  10.64.16.4  -     -       -\n", "")
	fields := fieldsOf(t, dormouse(t, f.url, "ps", "--tasks", "-o", "json").out)
	if fields["job"] != "j-aaaaaaaa" || fields["index"] != 0.0 {
		t.Errorf("-o json printed %v", fields)
	}
}

func TestOperationsNameEveryNode(t *testing.T) {
	job := parallelJob()
	f := newFake(t, map[string]any{"POST /v1/jobs/j/restart": operation(api.OpRestart, api.OpDone), "GET /v1/jobs/j-aaaaaaaa": job})
	dormouse(t, f.url, "restart", "j").check(t, exitDone, "j-aaaaaaaa running on east-0, east-1 from c-bbbbbbbb\n", "")
}

func TestWaitNamesTheTaskThatFailed(t *testing.T) {
	job := parallelJob()
	job.Phase, job.ExitCode = api.PhaseFailed, number(3)
	job.TaskStatus[2].ExitCode = number(3)
	f := newFake(t, map[string]any{"GET /v1/jobs/j/wait": job})
	dormouse(t, f.url, "wait", "j").check(t, exitFailed, "", "j-aaaaaaaa failed (task 2 on east-0: exit code 3)")
}

func TestTasksComplete(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/jobs/counter": parallelJob()})
	for _, verb := range []string{"logs", "exec"} {
		dormouse(t, f.url, "__complete", verb, "counter", "--task", "").check(t, exitDone, "3\teast-1 running\n", "")
	}
}

func TestLoneTasksHaveNoStraggler(t *testing.T) {
	lone := durableCheckpoint
	lone.Steps = parallelCheckpoint().Steps[:1]
	if got := straggler(&lone); got != "" {
		t.Errorf("of one task, the slowest is %q, want none", got)
	}
}
