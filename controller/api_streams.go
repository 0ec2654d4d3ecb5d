package controller

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"dormouse/api"
	"dormouse/api/agentpb"
	"dormouse/controller/protocol"
	"dormouse/controller/store"
)

func (c *Controller) routeStreams(rest huma.API, mux *http.ServeMux) {
	stream := func(op huma.Operation, handle http.HandlerFunc) {
		huma.Register(rest, op, func(_ context.Context, _ *struct{}) (*huma.StreamResponse, error) {
			return &huma.StreamResponse{Body: func(ctx huma.Context) {
				r, w := humago.Unwrap(ctx)
				handle(w, r)
			}}, nil
		})
	}
	id := &huma.Param{Name: "id", In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}}
	logs := get("logs", "/v1/jobs/{id}/logs", "What a job's tasks have written: NDJSON of task, stream, data (base64)")
	logs.Parameters = []*huma.Param{id, query("task", "a task's number; all unless given"), query("follow", "true: until the job is over")}
	stream(logs, c.serveLogs)
	events := get("events", "/v1/events", "The history: server-sent events")
	events.Parameters = []*huma.Param{query("job", "only of this job"), query("follow", "true: go on with what happens"), query("since", "only events after this number")}
	stream(events, c.serveEvents)
	exec := huma.Operation{OperationID: "exec", Method: http.MethodPost, Path: "/v1/jobs/{id}/exec", Summary: "Run a command in a task: upgrades to " + execProtocol}
	exec.Parameters = []*huma.Param{id, query("task", "a task's number; 0 unless given"), query("cmd", "the program and its arguments, one each"), query("tty", "true: on a terminal")}
	stream(exec, c.serveExec)
}

func query(name, doc string) *huma.Param {
	return &huma.Param{Name: name, In: "query", Description: doc, Schema: &huma.Schema{Type: huma.TypeString}}
}

// flag reads a boolean of the query.
func flag(r *http.Request, name string) bool {
	on, err := strconv.ParseBool(r.URL.Query().Get(name))
	return err == nil && on
}

// live ends a request's context with the controller, too.
func (c *Controller) live(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	stopped := context.AfterFunc(c.run, cancel)
	return ctx, func() { stopped(); cancel() }
}

// serveEvents streams the history, and then what happens.
func (c *Controller) serveEvents(w http.ResponseWriter, r *http.Request) {
	ctx, end := c.live(r)
	defer end()
	job := r.URL.Query().Get("job")
	if job != "" {
		own, err := c.visibleJob(ctx, job)
		if err != nil && !c.hadJob(ctx, job) {
			writeProblem(w, asProblem(err))
			return
		}
		if err == nil {
			job = own
		}
		detail, err := c.jobDetail(ctx, job)
		if err != nil && !c.hadJob(ctx, job) {
			writeProblem(w, asProblem(err))
			return
		}
		if err == nil {
			job = detail.ID
		}
	}
	since := uint64(0)
	if text := r.URL.Query().Get("since"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			writeProblem(w, asProblem(invalid("since must be the number of an event, got %q", text)))
			return
		}
		since = n
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	for follow := flag(r, "follow"); ; {
		revision := c.store.Revision()
		last, err := c.writeEvents(ctx, w, job, since)
		if err != nil || !follow {
			return
		}
		since = last
		if _, err := c.store.Wait(ctx, revision); err != nil {
			return
		}
	}
}

// hadJob reports whether the history knows a job that was removed.
func (c *Controller) hadJob(ctx context.Context, id string) (had bool) {
	events, _, err := c.events(ctx, id, 0, 1)
	return err == nil && len(events) > 0
}

// eventsAtOnce bounds the memory and the transaction of a long history.
const eventsAtOnce = 1000

func (c *Controller) writeEvents(ctx context.Context, w http.ResponseWriter, job string, since uint64) (uint64, error) {
	for {
		events, last, err := c.events(ctx, job, since, eventsAtOnce)
		if err != nil {
			return since, err
		}
		for _, e := range events {
			data, err := json.Marshal(e)
			if err != nil {
				return since, err
			}
			if _, err := fmt.Fprintf(w, "id: %d\nevent: %s\ndata: %s\n\n", e.ID, e.Type, data); err != nil {
				return since, err
			}
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			return since, err
		}
		since = last
		if len(events) < eventsAtOnce {
			return since, nil
		}
	}
}

// events reads up to limit events after since; last is the number to go on from.
func (c *Controller) events(ctx context.Context, job string, since uint64, limit int) (events []api.Event, last uint64, err error) {
	last = since
	err = c.store.View(ctx, func(tx store.Tx) error {
		return tx.Scan(store.Events, eventKey(since+1), func(_ string, value []byte) error {
			var e api.Event
			if err := json.Unmarshal(value, &e); err != nil {
				return err
			}
			last = e.ID
			if (job == "" || e.Job == job) && sees(ctx, e.Owner) {
				events = append(events, e)
			}
			if len(events) == limit {
				return store.ErrStop
			}
			return nil
		})
	})
	return events, last, err
}

// logWriter merges the output of several tasks into one response.
type logWriter struct {
	mu sync.Mutex
	w  http.ResponseWriter
}

type logLine struct {
	Task   int    `json:"task"`
	Stream string `json:"stream,omitempty"`
	Data   []byte `json:"data,omitempty"`
	Error  string `json:"error,omitempty"`
}

func (l *logWriter) write(line logLine) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := json.NewEncoder(l.w).Encode(line); err != nil {
		return err
	}
	return http.NewResponseController(l.w).Flush()
}

// serveLogs streams what tasks have written.
func (c *Controller) serveLogs(w http.ResponseWriter, r *http.Request) {
	ctx, end := c.live(r)
	defer end()
	detail, err := c.jobDetail(ctx, r.PathValue("id"))
	if err != nil {
		writeProblem(w, asProblem(err))
		return
	}
	tasks, err := tasksOf(detail, r.URL.Query().Get("task"))
	if err != nil {
		writeProblem(w, asProblem(err))
		return
	}
	follow := flag(r, "follow")
	if !follow {
		if err := c.haveLogs(ctx, detail.ID, tasks); err != nil {
			writeProblem(w, asProblem(err))
			return
		}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := &logWriter{w: w}
	var group sync.WaitGroup
	for _, task := range tasks {
		group.Go(func() {
			if err := c.taskLogs(ctx, detail.ID, task, follow, out); err != nil && ctx.Err() == nil {
				out.write(logLine{Task: task, Error: err.Error()}) // a client that has gone needs no answer
			}
		})
	}
	group.Wait()
}

// tasksOf reads the task parameter.
func tasksOf(job api.JobDetail, text string) ([]int, error) {
	if text == "" {
		all := make([]int, job.Tasks)
		for i := range all {
			all[i] = i
		}
		return all, nil
	}
	task, err := strconv.Atoi(text)
	if err != nil {
		return nil, invalid("task must be a number, got %q", text)
	}
	if task < 0 || task >= job.Tasks {
		return nil, notFound("job %s has no task %d: it has %d", job.ID, task, job.Tasks)
	}
	return []int{task}, nil
}

// haveLogs refuses logs that are out of reach before the answer begins.
func (c *Controller) haveLogs(ctx context.Context, id string, tasks []int) error {
	job, err := c.job(ctx, id)
	if err != nil {
		return err
	}
	for _, task := range tasks {
		ref, found := job.logSource(task)
		if found && !c.fleet.connected(ref.Node) {
			return refused("the log of task %d is on node %s, which is not connected", task, ref.Node)
		}
	}
	return nil
}

// logSource is where the newest log of a task is: its present run, or the
// newest ended one while there is none.
func (j *jobRecord) logSource(task int) (taskRef, bool) {
	for _, ref := range j.refs() {
		if ref.Index == task && (j.Phase == api.PhaseRunning || j.Phase == api.PhaseSuspending || len(j.Kept) == 0) {
			return ref, true
		}
	}
	best, found := taskRef{}, false
	for _, ref := range j.Kept {
		if ref.Index == task && (!found || ref.Run > best.Run) {
			best, found = ref, true
		}
	}
	return best, found
}

// taskLogs streams one task's log. A followed log goes on over suspends,
// restores and broken streams: as the log is part of what is restored, what was
// sent is skipped.
func (c *Controller) taskLogs(ctx context.Context, id string, task int, follow bool, out *logWriter) error {
	sent := map[string]int{}
	complete := int64(-1) // the run whose log was read to its end
	for broken := 0; ; {
		revision := c.store.Revision()
		job, err := c.job(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		ref, found := job.logSource(task)
		if found && ref.Run != complete && c.fleet.connected(ref.Node) {
			err := c.oneLog(ctx, ref, follow, sent, out)
			if err == nil {
				broken, complete = 0, ref.Run
				continue // the job may be over by now
			}
			if broken++; !follow || broken > protocol.MaxAttempts || ctx.Err() != nil {
				return err
			}
			if err := c.pause(ctx, protocol.Backoff(broken)); err != nil {
				return err
			}
			continue // the node may be lost by now, and the job elsewhere
		}
		if !follow || job.Phase.Final() {
			return nil
		}
		if _, err := c.store.Wait(ctx, revision); err != nil {
			return err
		}
	}
}

// pause waits for d.
func (c *Controller) pause(ctx context.Context, d time.Duration) error {
	select {
	case <-c.clock.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Controller) oneLog(ctx context.Context, ref taskRef, follow bool, sent map[string]int, out *logWriter) error {
	stream, end, err := c.openStream(ctx, ref, &agentpb.OpenStream{Kind: &agentpb.OpenStream_Logs{Logs: &agentpb.Logs{Follow: follow}}})
	if err != nil {
		return err
	}
	defer end()
	stop := context.AfterFunc(ctx, func() { end() })
	defer stop()
	at := map[string]int{}
	return copyLogs(stream, func(kind string, data []byte) error {
		begin := at[kind]
		at[kind] += len(data)
		if at[kind] <= sent[kind] {
			return nil
		}
		data = data[max(sent[kind]-begin, 0):]
		sent[kind] = at[kind]
		return out.write(logLine{Task: ref.Index, Stream: kind, Data: data})
	})
}

// The kinds of frame after an upgrade to dormouse-exec: one byte, then the
// length as uint32, big endian, then so many bytes.
const (
	execProtocol = "dormouse-exec"

	frameStdin  = 0
	frameStdout = 1
	frameStderr = 2
	frameExit   = 3 // int32
	frameResize = 4 // rows, columns: uint16 each
	frameError  = 5 // text
	frameClosed = 6 // end of stdin

	maxFrame = 1 << 20
)

// serveExec runs a command in a task, over an upgraded connection.
func (c *Controller) serveExec(w http.ResponseWriter, r *http.Request) {
	ctx, end := c.live(r)
	defer end()
	ref, exec, err := c.execRequest(ctx, r)
	if err != nil {
		writeProblem(w, asProblem(err))
		return
	}
	stream, detach, err := c.openStream(ctx, ref, &agentpb.OpenStream{Kind: &agentpb.OpenStream_Exec{Exec: exec}})
	if err != nil {
		writeProblem(w, asProblem(err))
		return
	}
	defer detach()
	who, _ := askerOf(ctx)
	entry := auditEntry(r, who)
	entry.Status, entry.Target, entry.Detail = http.StatusSwitchingProtocols, ref.Job, strings.Join(exec.Command, " ")
	c.auditNow(ctx, entry)
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeProblem(w, newProblem(http.StatusHTTPVersionNotSupported, "exec needs HTTP/1.1"))
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+execProtocol+"\r\n\r\n")
	if err != nil {
		return
	}
	var input sync.WaitGroup
	input.Go(func() {
		toAgent(stream, buffered.Reader)
		detach() // the client has gone: the command loses its terminal
	})
	toClient(conn, stream) // ends with the command, or with the stream
	conn.Close()
	input.Wait()
}

func (c *Controller) execRequest(ctx context.Context, r *http.Request) (taskRef, *agentpb.Exec, error) {
	q := r.URL.Query()
	if !strings.EqualFold(r.Header.Get("Upgrade"), execProtocol) {
		return taskRef{}, nil, newProblem(http.StatusUpgradeRequired, "exec needs the headers Connection: Upgrade and Upgrade: %s", execProtocol)
	}
	detail, err := c.jobDetail(ctx, r.PathValue("id"))
	if err != nil {
		return taskRef{}, nil, err
	}
	text := q.Get("task")
	if text == "" {
		text = "0"
	}
	tasks, err := tasksOf(detail, text)
	if err != nil {
		return taskRef{}, nil, err
	}
	exec := &agentpb.Exec{Command: q["cmd"], Env: make(map[string]string), Tty: flag(r, "tty")}
	if len(exec.Command) == 0 || exec.Command[0] == "" {
		return taskRef{}, nil, invalid("the command is empty: name the program to run and its arguments")
	}
	for _, pair := range q["env"] {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return taskRef{}, nil, invalid("an environment variable must be KEY=VALUE, got %q", pair)
		}
		exec.Env[key] = value
	}
	if exec.Rows, err = size16(q.Get("rows")); err != nil {
		return taskRef{}, nil, err
	}
	if exec.Cols, err = size16(q.Get("cols")); err != nil {
		return taskRef{}, nil, err
	}
	if detail.Phase != api.PhaseRunning {
		return taskRef{}, nil, refused("job %s is %s: only in a running job can a command be run", detail.ID, detail.Phase)
	}
	return taskRef{Node: detail.TaskStatus[tasks[0]].Node, Job: detail.ID, Index: tasks[0], Run: detail.Run}, exec, nil
}

func size16(text string) (uint32, error) {
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, invalid("a terminal's size is two numbers up to 65535, got %q", text)
	}
	return uint32(n), nil
}

// toAgent relays the client's frames until it has gone, or makes no sense.
func toAgent(stream agentStream, from *bufio.Reader) {
	for {
		kind, data, err := readFrame(from)
		if err != nil {
			return
		}
		frame := &agentpb.Frame{}
		switch {
		case kind == frameStdin && len(data) == 0:
			continue // an empty piece would mean the end
		case kind == frameStdin:
			frame.Body = &agentpb.Frame_Stdin{Stdin: data}
		case kind == frameClosed:
			frame.Body = &agentpb.Frame_Stdin{}
		case kind == frameResize && len(data) == 4:
			frame.Body = &agentpb.Frame_Resize{Resize: &agentpb.WindowSize{
				Rows: uint32(binary.BigEndian.Uint16(data)), Cols: uint32(binary.BigEndian.Uint16(data[2:])),
			}}
		default:
			return
		}
		if err := stream.Send(frame); err != nil {
			return
		}
	}
}

func readFrame(from *bufio.Reader) (kind byte, data []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(from, head[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(head[1:])
	if length > maxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes is larger than %d", length, maxFrame)
	}
	data = make([]byte, length)
	_, err = io.ReadFull(from, data)
	return head[0], data, err
}

// toClient relays the agent's frames until the command has ended.
func toClient(to io.Writer, stream agentStream) {
	for {
		frame, err := stream.Recv()
		if err != nil {
			writeFrame(to, frameError, []byte("the connection to the node broke before the command ended"))
			return
		}
		kind, data, last := byte(frameError), []byte(nil), true
		switch body := frame.GetBody().(type) {
		case *agentpb.Frame_Stdout:
			kind, data, last = frameStdout, body.Stdout, false
		case *agentpb.Frame_Stderr:
			kind, data, last = frameStderr, body.Stderr, false
		case *agentpb.Frame_Exit:
			kind, data = frameExit, binary.BigEndian.AppendUint32(nil, uint32(body.Exit.GetCode()))
		case *agentpb.Frame_Error:
			data = []byte(body.Error)
		default:
			continue
		}
		if err := writeFrame(to, kind, data); err != nil || last {
			return
		}
	}
}

func writeFrame(to io.Writer, kind byte, data []byte) error {
	var frame bytes.Buffer
	frame.WriteByte(kind)
	frame.Write(binary.BigEndian.AppendUint32(nil, uint32(len(data))))
	frame.Write(data)
	_, err := to.Write(frame.Bytes())
	return err
}
