package controller

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

func TestBadRequestsAreRefusedByOneSentence(t *testing.T) {
	s := newSimulation(t, "east-0", "west-0")
	const long = `{"command":["x"],"name":"`
	for _, c := range []struct {
		method, path, body string
		status             int
		detail             string
	}{
		{"POST", "/v1/jobs", `{"command":["x"],"cpus":-1}`, 422, "cpus must be greater than 0, got -1"},
		{"POST", "/v1/jobs", `{"command":["x"],"cpus":0}`, 422, "cpus must be greater than 0, got 0"},
		{"POST", "/v1/jobs", `{"command":["x"],"tasks":0}`, 422, "tasks must be greater than 0, got 0"},
		{"POST", "/v1/jobs", `{"command":["x"],"mem_bytes":-5}`, 422, "mem_bytes must be greater than 0, got -5"},
		{"POST", "/v1/jobs", `{"command":["x"],"mem_bytes":5}`, 422, "mem_bytes must be at least 4194304 (4 MiB), got 5"},
		{"POST", "/v1/jobs", `{"command":["x"],"cpus":900,"cloud":"west"}`, 422, "no node of cloud west has 900 cpus: the largest has 4"},
		{"POST", "/v1/jobs", `{"command":["x"],"mem_bytes":1099511627776}`, 422, "no node has 1 TiB of memory: the largest has 8 GiB"},
		{"POST", "/v1/jobs", `{"command":["x"],"cloud":"north"}`, 404, `there is no cloud "north": known are east, west, metal`},
		{"POST", "/v1/jobs", `{"command":[]}`, 422, "the command is empty: name the program to run and its arguments"},
		{"POST", "/v1/jobs", `{"command":[""]}`, 422, "the command is empty: name the program to run and its arguments"},
		{"POST", "/v1/jobs", `{}`, 422, "command is missing"},
		{"POST", "/v1/jobs", `{"command":["x"],"cpu":1}`, 422, `there is no field "cpu"`},
		{"POST", "/v1/jobs", `{"command":["x"],"cpus":"two"}`, 422, `cpus must be a number, got "two"`},
		{"POST", "/v1/jobs", `{"command":["x"],"root":"nowhere"}`, 422, `the root must be host, dir:PATH, oci:PATH, oci:REFERENCE or an absolute path, got "nowhere"`},
		{"POST", "/v1/jobs", `{"command":["x"],"name":"a b"}`, 422, `the name must be up to 63 letters, digits, dots, dashes and underscores, got "a b"`},
		{"POST", "/v1/jobs", `{"command":["x"],"volumes":[{"source":"a","destination":"/b"}]}`, 422, `a volume needs two absolute paths, SRC:DST, and DST must not be /, got "a":"/b"`},
		{"POST", "/v1/jobs", `{"command":["x"],"max_restarts":-1}`, 422, "max_restarts must be 0 or greater, got -1"},
		{"POST", "/v1/jobs", `{"command":["x"],"cpu_baseline":"pentium"}`, 422, `cpu_baseline must be native, x86-64-v2, x86-64-v3 or x86-64-v4, got "pentium"`},
		{"GET", "/v1/jobs/nosuch", "", 404, `there is no job "nosuch"`},
		{"POST", "/v1/jobs/nosuch/suspend", "", 404, `there is no job "nosuch"`},
		{"GET", "/v1/checkpoints/nosuch", "", 404, `there is no checkpoint "nosuch"`},
		{"POST", "/v1/checkpoints/nosuch/clone", "", 404, `there is no checkpoint "nosuch"`},
		{"GET", "/v1/operations/nosuch", "", 404, `there is no operation "nosuch"`},
		{"POST", "/v1/nodes/nosuch/kill", "", 404, `there is no node "nosuch"`},
		{"GET", "/v1/jobs/nosuch/logs", "", 404, `there is no job "nosuch"`},
		{"GET", "/v1/events?job=nosuch", "", 404, `there is no job "nosuch"`},
		{"GET", "/v1/nosuch", "", 404, "there is no GET /v1/nosuch"},
	} {
		code, detail := s.call(c.method, c.path, bodyOf(c.body), nil)
		if code != c.status || detail != c.detail {
			t.Errorf("%s %s %s: want %d %q, got %d %q", c.method, c.path, c.body, c.status, c.detail, code, detail)
		}
	}
	if code, detail := s.call("POST", "/v1/jobs", long+strings.Repeat("x", 2*maxBody)+`"}`, nil); code != http.StatusRequestEntityTooLarge {
		t.Errorf("a huge request: %d %s", code, detail)
	}
	if code, detail := s.call("POST", "/v1/jobs", `{"command":`, nil); code != http.StatusBadRequest || strings.Contains(detail, "\n") {
		t.Errorf("broken JSON: %d %s", code, detail)
	}
	var jobs []api.Job
	if s.want(http.StatusOK, "GET", "/v1/jobs?all=true", nil, &jobs); len(jobs) != 0 {
		t.Errorf("refused requests left jobs: %v", jobs)
	}
}

// bodyOf makes an empty body none at all.
func bodyOf(text string) any {
	if text == "" {
		return nil
	}
	return text
}

func TestActionsInTheWrongPhaseAreRefused(t *testing.T) {
	s := newSimulation(t, "east-0")
	running := s.running(api.JobSpec{Name: "runs"})
	done := s.running(api.JobSpec{})
	s.end(done, 0)
	s.awaitPhase(done, api.PhaseCompleted)
	for _, c := range []struct{ path, detail string }{
		{"/v1/jobs/" + done + "/suspend", "job " + done + " is completed: only a job that is running can be suspended"},
		{"/v1/jobs/" + done + "/checkpoints", "job " + done + " is completed: only a job that is running can be checkpointed"},
		{"/v1/jobs/" + done + "/kill", "job " + done + " is over already: it is completed"},
		{"/v1/jobs/runs/resume", "job " + running + " is running: only a job that is suspended can be resumed"},
	} {
		if detail := s.want(http.StatusConflict, "POST", c.path, nil, nil); detail != c.detail {
			t.Errorf("%s: want %q, got %q", c.path, c.detail, detail)
		}
	}
}

func TestResumeWithoutRoomIsRefusedWithTheReason(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{CPUs: 4})
	s.do("/v1/jobs/"+id+"/suspend", nil)
	s.running(api.JobSpec{CPUs: 2})
	detail := s.want(http.StatusConflict, "POST", "/v1/jobs/"+id+"/resume", nil, nil)
	if !strings.Contains(detail, "needs 4 cpus and 512 MiB on one node, and the most that is free is 2 cpus") {
		t.Errorf("the refusal: %q", detail)
	}
	if job := s.jobNow(id); job.Phase != api.PhaseSuspended || job.Operation != "" {
		t.Errorf("the refused job: %+v", job.Job)
	}
}

func TestJobsAreFoundByNameAndPrefix(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{Name: "db"})
	for _, ref := range []string{id, id[:6], "db"} {
		var job api.JobDetail
		if s.want(http.StatusOK, "GET", "/v1/jobs/"+ref, nil, &job); job.ID != id {
			t.Errorf("%s found %s", ref, job.ID)
		}
	}
	s.end(id, 0)
	s.awaitPhase(id, api.PhaseCompleted)
	second := s.running(api.JobSpec{Name: "db"})
	var job api.JobDetail
	if s.want(http.StatusOK, "GET", "/v1/jobs/db", nil, &job); job.ID != second {
		t.Errorf("the name means %s rather than the job that runs", job.ID)
	}
	s.end(second, 0)
	s.awaitPhase(second, api.PhaseCompleted)
	if detail := s.want(http.StatusUnprocessableEntity, "GET", "/v1/jobs/db", nil, nil); !strings.Contains(detail, id) || !strings.Contains(detail, second) {
		t.Errorf("the refusal does not name both: %q", detail)
	}
}

func TestTokenIsNeeded(t *testing.T) {
	s := newSimulation(t)
	for path, want := range map[string]int{
		"/v1/jobs": 401, "/v1/events": 401, "/metrics": 401, "/v1/jobs/x/exec": 401, "/healthz": 200, "/openapi.json": 200,
	} {
		for _, header := range []string{"", "Bearer wrong", "Basic " + adminToken} {
			request, err := http.NewRequestWithContext(t.Context(), "GET", s.url+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Authorization", header)
			response, err := s.client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != want {
				t.Errorf("GET %s with %q: want %d, got %d", path, header, want, response.StatusCode)
			}
		}
	}
}

func TestOpenAPINamesEveryRoute(t *testing.T) {
	s := newSimulation(t)
	var document struct {
		Paths map[string]map[string]any `json:"paths"`
	}
	s.want(http.StatusOK, "GET", "/openapi.json", nil, &document)
	for _, route := range []string{
		"post /v1/jobs", "get /v1/jobs", "get /v1/jobs/{id}", "delete /v1/jobs/{id}", "get /v1/jobs/{id}/wait", "get /v1/jobs/{id}/logs",
		"post /v1/jobs/{id}/checkpoints", "get /v1/jobs/{id}/checkpoints", "post /v1/jobs/{id}/suspend", "post /v1/jobs/{id}/resume",
		"post /v1/jobs/{id}/restart", "post /v1/jobs/{id}/kill", "get /v1/checkpoints", "get /v1/checkpoints/{id}", "delete /v1/checkpoints/{id}",
		"post /v1/checkpoints/{id}/verify", "post /v1/checkpoints/{id}/clone", "post /v1/verify", "get /v1/operations", "get /v1/operations/{id}",
		"get /v1/nodes", "post /v1/nodes/{id}/kill", "post /v1/nodes/{id}/start", "get /v1/clouds", "get /v1/events", "get /v1/version",
	} {
		method, path, _ := strings.Cut(route, " ")
		if document.Paths[path][method] == nil {
			t.Errorf("%s is missing", route)
		}
	}
}

func TestMetricsCount(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.do("/v1/jobs/"+id+"/checkpoints", nil)
	request, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	response, err := s.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`dormouse_jobs{phase="running"} 1`, `dormouse_nodes{cloud="east",state="ready"} 1`, `dormouse_checkpoints_total{state="durable"} 1`,
		`dormouse_checkpoint_pause_seconds_count 1`, `dormouse_operations_total{kind="checkpoint",phase="done"} 1`,
	} {
		if !strings.Contains(string(text), line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
}

func TestWaitAnswersWhenThePhaseIsReachedOrTheTimeIsOver(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.submit(api.JobSpec{})
	var job api.JobDetail
	if s.want(http.StatusOK, "GET", "/v1/jobs/"+id+"/wait?for=running&timeout=30s", nil, &job); job.Phase != api.PhaseRunning {
		t.Errorf("want running, got %s", job.Phase)
	}
	if s.want(http.StatusOK, "GET", "/v1/jobs/"+id+"/wait?timeout=1ms", nil, &job); job.Phase != api.PhaseRunning {
		t.Errorf("want running when the time is over, got %s", job.Phase)
	}
	s.end(id, 0)
	if s.want(http.StatusOK, "GET", "/v1/jobs/"+id+"/wait?for=suspended&timeout=30s", nil, &job); job.Phase != api.PhaseCompleted {
		t.Errorf("want the end of the job, got %s", job.Phase)
	}
	s.want(http.StatusUnprocessableEntity, "GET", "/v1/jobs/"+id+"/wait?timeout=soon", nil, nil)
}

func TestLogsSurviveTheEndOfAJob(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	want := "run 1 on east-0\n"
	if got := s.logs(id); got != want {
		t.Errorf("while it runs: want %q, got %q", want, got)
	}
	s.end(id, 0)
	s.awaitPhase(id, api.PhaseCompleted)
	s.eventually("the task is cleaned up", noCleanups)
	if got := s.logs(id); got != want {
		t.Errorf("after its end: want %q, got %q", want, got)
	}
	s.want(http.StatusNotFound, "GET", "/v1/jobs/"+id+"/logs?task=3", nil, nil)
}

func (s *simulation) logs(id string) string {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), "GET", s.url+"/v1/jobs/"+id+"/logs", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	response, err := s.client.Do(request)
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	text := ""
	for lines := json.NewDecoder(response.Body); ; {
		var line logLine
		if err := lines.Decode(&line); err == io.EOF {
			return text
		} else if err != nil {
			s.t.Fatal(err)
		}
		text += string(line.Data) + line.Error
	}
}

func TestEventsTellTheHistoryInOrder(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, "GET", s.url+"/v1/events?follow=true&job="+id, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	response, err := s.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	next := func() (e api.Event) {
		for lines.Scan() {
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				if err := json.Unmarshal([]byte(data), &e); err != nil {
					t.Fatal(err)
				}
				return e
			}
		}
		t.Fatalf("the events ended: %v", lines.Err())
		return e
	}
	for _, want := range []string{"submitted", "placed", "running"} {
		if e := next(); e.Type != want || e.Job != id {
			t.Errorf("want %s, got %+v", want, e)
		}
	}
	s.end(id, 0)
	if e := next(); e.Type != "completed" {
		t.Errorf("want the live event completed, got %+v", e)
	}
}

func TestExecRelaysBothWays(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	config := s.client.Transport.(*http.Transport).TLSClientConfig.Clone()
	config.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", s.addr, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, "POST /v1/jobs/"+id+"/exec?cmd=cat HTTP/1.1\r\nHost: dormouse\r\nAuthorization: Bearer "+adminToken+
		"\r\nConnection: Upgrade\r\nUpgrade: dormouse-exec\r\nContent-Length: 0\r\n\r\n")
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, nil)
	if err != nil || response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Upgrade") != execProtocol {
		t.Fatalf("the upgrade: %v, %v", response, err)
	}
	writeFrame(conn, frameStdin, []byte("hello"))
	if kind, data, err := readFrame(reader); err != nil || kind != frameStdout || string(data) != "hello" {
		t.Fatalf("want the echo, got kind %d, %q, %v", kind, data, err)
	}
	writeFrame(conn, frameClosed, nil)
	kind, data, err := readFrame(reader)
	if err != nil || kind != frameExit || !bytes.Equal(data, binary.BigEndian.AppendUint32(nil, 7)) {
		t.Fatalf("want exit 7, got kind %d, %v, %v", kind, data, err)
	}
	if _, _, err := readFrame(reader); err == nil {
		t.Error("the connection goes on after the exit")
	}
}

func TestExecIsRefusedWithoutUpgradeOrCommandOrRunningJob(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	s.want(http.StatusUpgradeRequired, "POST", "/v1/jobs/"+id+"/exec?cmd=ls", nil, nil)
}

func TestJoinTokensAreForOneNodeAndOneUse(t *testing.T) {
	s := newSimulation(t, "east-0")
	ctx := t.Context()
	stranger := &simAgent{world: s.world, node: "east-7", cloud: "east"}
	boot, err := s.c.Bootstrap("east")(ctx, "east-7")
	if err != nil {
		t.Fatal(err)
	}
	refusedJoin := func(a *simAgent, token, want string) {
		t.Helper()
		_, err := a.joinWith(ctx, token)
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), want) {
			t.Errorf("join: want a refusal with %q, got %v", want, err)
		}
	}
	refusedJoin(&simAgent{world: s.world, node: "east-8", cloud: "east"}, boot.Token, "is not for node east-8")
	refusedJoin(stranger, "nonsense", "is wrong or was used before")
	refusedJoin(stranger, "shared", "do not join by themselves")
	if _, err := stranger.joinWith(ctx, boot.Token); err != nil {
		t.Fatal(err)
	}
	refusedJoin(stranger, boot.Token, "is wrong or was used before")
	older, err := s.c.Bootstrap("east")(ctx, "east-7")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.c.Bootstrap("east")(ctx, "east-7"); err != nil {
		t.Fatal(err)
	}
	refusedJoin(stranger, older.Token, "is wrong or was used before")
	metal := &simAgent{world: s.world, node: "metal-1", cloud: "metal"}
	if _, err := metal.joinWith(ctx, "shared"); err != nil {
		t.Errorf("a node of a static cloud: %v", err)
	}
	refusedJoin(&simAgent{world: s.world, node: "east-0", cloud: "metal"}, "shared", "already")
	if _, err := (&simAgent{world: s.world, node: "../x", cloud: "metal"}).joinWith(ctx, "shared"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a bad node name: %v", err)
	}
}

func TestStreamsNeedTheNodesOwnCertificate(t *testing.T) {
	s := newSimulation(t, "east-0")
	connect := func(a *simAgent, hello string) error {
		conn, err := a.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		stream, err := agentpb.NewAgentServiceClient(conn).Connect(t.Context())
		if err != nil {
			return err
		}
		stream.Send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Hello{Hello: &agentpb.Hello{Node: hello}}})
		_, err = stream.Recv()
		return err
	}
	if err := connect(&simAgent{world: s.world, node: "east-0"}, "east-0"); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a certificate: %v", err)
	}
	other := s.join("east-1")
	s.eventually("east-1 is ready", func(tx store.Tx) (bool, error) {
		n, err := store.Get[nodeRecord](tx, store.Nodes, "east-1")
		return err == nil && n.State == api.NodeReady, ignoreMissing(err)
	})
	if err := connect(&simAgent{world: s.world, node: "east-1", certificate: other.certificate}, "east-0"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("with another node's certificate: %v", err)
	}
}

func TestLongPollsEndWithTheController(t *testing.T) {
	s := newSimulation(t, "east-0")
	id := s.running(api.JobSpec{})
	answered := make(chan int, 1)
	go func() {
		status, _, err := s.send("GET", "/v1/jobs/"+id+"/wait?timeout=5m", nil)
		if err != nil {
			t.Error(err)
		}
		answered <- status
	}()
	s.c.Stop()
	if status := <-answered; status != http.StatusServiceUnavailable {
		t.Errorf("want 503, got %d", status)
	}
	s.restart()
}
