package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"dormouse/api"
	"dormouse/controller/store"
)

const (
	maxBody     = 1 << 20          // of a request
	bodyTimeout = 30 * time.Second // for a request to arrive
	longestWait = 5 * time.Minute  // of a long poll
)

// newHandler builds what serves REST and gRPC on one listener.
func (c *Controller) newHandler() http.Handler {
	mux := http.NewServeMux()
	config := huma.DefaultConfig("Dormouse", c.parts.Version)
	config.Info.Description = "Puts jobs to sleep and wakes them elsewhere. Errors are problem documents, RFC 9457: detail is one sentence."
	config.DocsPath, config.CreateHooks = "", nil // no page of another host, no $schema in answers
	config.Transformers = []huma.Transformer{plainProblem}
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{"token": {Type: "http", Scheme: "bearer"}}
	config.Security = []map[string][]string{{"token": {}}}
	rest := humago.New(mux, config)
	rest.UseMiddleware(c.decide)
	c.routeJobs(rest)
	c.routeAccess(rest)
	c.routeCheckpoints(rest)
	c.routePlatform(rest)
	c.routeStreams(rest, mux)
	for _, plain := range c.plainRoutes() {
		mux.Handle(plain.pattern, c.only(plain.id, plain.handler))
	}
	mux.HandleFunc("GET /healthz", c.healthz)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeProblem(w, newProblem(http.StatusNotFound, "there is no %s %s", r.Method, r.URL.Path))
	})
	// One byte more than huma allows, so that huma's refusal is the answer.
	authorized := http.MaxBytesHandler(c.authorize(c.counted(c.called(c.auditing(sized(c.once(mux)))))), maxBody+1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			c.grpc.ServeHTTP(w, r)
			return
		}
		authorized.ServeHTTP(w, r)
	})
}

// plainRoute is a route that the OpenAPI description does not have.
type plainRoute struct {
	id      string // names its access.Rule
	pattern string // of http.ServeMux
	handler http.Handler
}

func (c *Controller) plainRoutes() []plainRoute {
	return []plainRoute{
		{"metrics", "GET /metrics", c.metrics.handler()},
		{"backup", "GET /v1/backup", http.HandlerFunc(c.serveBackup)},
	}
}

// open are the paths that need no token: they tell nothing about jobs.
func open(path string) bool {
	return path == "/healthz" || strings.HasPrefix(path, "/openapi")
}

// counted counts requests by their status.
func (c *Controller) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		counter := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(counter, r)
		c.metrics.requests.WithLabelValues(r.Method, strconv.Itoa(counter.status)).Inc()
	})
}

var tooLarge = fmt.Sprintf("the request is larger than %d bytes", maxBody)

// sized refuses a request whose header says that it is too large before any of
// its body is read: a client that waits for that (Expect: 100-continue) has the
// answer although it sent no body, instead of a connection closed while it sends.
func sized(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > maxBody {
			writeProblem(w, newProblem(http.StatusRequestEntityTooLarge, "%s", tooLarge))
			return
		}
		next.ServeHTTP(w, r)
	})
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (c *Controller) healthz(w http.ResponseWriter, r *http.Request) {
	if err := c.store.View(r.Context(), func(store.Tx) error { return nil }); err != nil {
		writeProblem(w, newProblem(http.StatusServiceUnavailable, "the store does not answer: %v", err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	role := "follower"
	if c.parts.Cluster.Leads() {
		role = "leader"
	}
	fmt.Fprintf(w, "{\"status\":\"ok\",\"role\":%q}\n", role)
}

func writeProblem(w http.ResponseWriter, p *problem) {
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(p.Status)
	json.NewEncoder(w).Encode(p) // a client that has gone needs no answer
}

// plainProblem makes one sentence of what huma found wrong with a request.
func plainProblem(_ huma.Context, _ string, v any) (any, error) {
	model, ok := v.(*huma.ErrorModel)
	if !ok {
		return v, nil
	}
	var found []string
	for _, e := range model.Errors {
		if e != nil {
			found = append(found, plainDetail(e))
		}
	}
	detail := model.Detail
	switch {
	case model.Status == http.StatusRequestEntityTooLarge:
		detail = tooLarge
	case len(found) > 0:
		detail = sentences(found)
	}
	return newProblem(model.Status, "%s", detail), nil
}

// plainDetail says in the user's words what a value should have been.
func plainDetail(e *huma.ErrorDetail) string {
	at := e.Location
	for _, prefix := range []string{"body.", "query.", "path."} {
		at = strings.TrimPrefix(at, prefix)
	}
	if name, missing := strings.CutPrefix(e.Message, "expected required property "); missing {
		return strings.TrimSuffix(name, " to be present") + " is missing"
	}
	if e.Message == "unexpected property" {
		return fmt.Sprintf("there is no field %q", at)
	}
	if kind, wrong := strings.CutPrefix(e.Message, "expected "); wrong && at != "" {
		value, err := json.Marshal(e.Value)
		if err != nil {
			return fmt.Sprintf("%s must be a %s", at, kind)
		}
		return fmt.Sprintf("%s must be a %s, got %s", at, kind, value)
	}
	if at == "" || at == "body" {
		return e.Message
	}
	return at + ": " + e.Message
}

// answer is a response with a JSON body.
type answer[T any] struct{ Body T }

// route registers a handler whose errors become problem documents.
func route[I, O any](rest huma.API, op huma.Operation, handle func(context.Context, *I) (O, error)) {
	op.MaxBodyBytes, op.BodyReadTimeout = maxBody, bodyTimeout
	huma.Register(rest, op, func(ctx context.Context, in *I) (*answer[O], error) {
		out, err := handle(ctx, in)
		if err != nil {
			return nil, asProblem(err)
		}
		return &answer[O]{Body: out}, nil
	})
}

// routeEmpty registers a handler that answers nothing.
func routeEmpty[I any](rest huma.API, op huma.Operation, handle func(context.Context, *I) error) {
	op.DefaultStatus = http.StatusNoContent
	huma.Register(rest, op, func(ctx context.Context, in *I) (*struct{}, error) {
		if err := handle(ctx, in); err != nil {
			return nil, asProblem(err)
		}
		return nil, nil
	})
}

func get(id, path, summary string) huma.Operation {
	return huma.Operation{OperationID: id, Method: http.MethodGet, Path: path, Summary: summary}
}

// begins describes a POST that begins an operation.
func begins(id, path, summary string) huma.Operation {
	return huma.Operation{OperationID: id, Method: http.MethodPost, Path: path, Summary: summary, DefaultStatus: http.StatusAccepted}
}

// ByID is the path parameter of everything that concerns one thing; exported,
// because huma fills in only exported embedded structs.
type ByID struct {
	ID string `path:"id"`
}

// Page are the query parameters of long lists; exported as ByID is.
type Page struct {
	Limit int    `query:"limit" minimum:"0" doc:"at most so many; 0: all"`
	After string `query:"after" doc:"the id of the last one of the page before"`
}

// pageOf reads a page of a table, the oldest record first: of those that the asker
// may see the wanted ones. A record that is not wanted any more is still a place to
// go on after.
func pageOf[T any](tx store.Tx, table *image[T], p Page, may, wanted func(*T) bool) ([]*T, error) {
	list, err := table.oldest(tx)
	if err != nil {
		return nil, err
	}
	if p.After != "" {
		last, err := table.get(tx, p.After)
		if ignoreNotFound(err) != nil {
			return nil, err
		}
		if err != nil || !may(last) {
			return nil, notFound("%s is not in the list any more: begin with the first page", p.After)
		}
		at, _ := slices.BinarySearchFunc(list, last, table.byAge)
		list = list[at+1:]
	}
	var page []*T
	for _, record := range list {
		if p.Limit > 0 && len(page) == p.Limit {
			break
		}
		if may(record) && wanted(record) {
			page = append(page, record)
		}
	}
	return page, nil
}

func always[T any](T) bool { return true }

// operation is the answer of what begins one.
func operation(op *opRecord, err error) (api.Operation, error) {
	if err != nil {
		return api.Operation{}, err
	}
	return op.Operation, nil
}

func (c *Controller) routeJobs(rest huma.API) {
	route(rest, huma.Operation{OperationID: "submit", Method: http.MethodPost, Path: "/v1/jobs", Summary: "Submit a job", DefaultStatus: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Body    api.JobSpec
			RawBody []byte
		}) (api.JobDetail, error) {
			spec, err := completeSpec(in.Body, in.RawBody)
			if err == nil {
				err = c.confine(ctx, &spec)
			}
			if err != nil {
				return api.JobDetail{}, err
			}
			job, err := c.submit(ctx, spec)
			if err != nil {
				return api.JobDetail{}, err
			}
			return job.JobDetail, nil
		})
	route(rest, get("jobs", "/v1/jobs", "List the jobs that are not over, or all"), func(ctx context.Context, in *struct {
		All bool `query:"all"`
		Page
	}) ([]api.Job, error) {
		return c.listJobs(ctx, in.All, in.Page)
	})
	route(rest, get("job", "/v1/jobs/{id}", "Show a job"), func(ctx context.Context, in *ByID) (api.JobDetail, error) {
		return c.explainedJob(ctx, in.ID)
	})
	routeEmpty(rest, huma.Operation{OperationID: "remove-job", Method: http.MethodDelete, Path: "/v1/jobs/{id}", Summary: "Forget a job, its checkpoints and logs"},
		func(ctx context.Context, in *ByID) error { return c.remove(ctx, in.ID) })
	route(rest, get("wait-job", "/v1/jobs/{id}/wait", "Wait until a job is in a phase, or over"), func(ctx context.Context, in *struct {
		ByID
		For     string `query:"for"`
		Timeout string `query:"timeout"`
	}) (api.JobDetail, error) {
		return c.waitJob(ctx, in.ID, api.Phase(in.For), in.Timeout)
	})
	route(rest, begins("suspend", "/v1/jobs/{id}/suspend", "Put a running job to sleep"), func(ctx context.Context, in *ByID) (api.Operation, error) {
		return operation(c.suspend(ctx, in.ID))
	})
	route(rest, begins("preempt", "/v1/jobs/{id}/preempt", "Take a running job off its place, until there is room for it"), func(ctx context.Context, in *ByID) (api.Operation, error) {
		return operation(c.preempt(ctx, in.ID))
	})
	route(rest, get("plan-preempt", "/v1/jobs/{id}/preempt", "What preempting a job would do and cost"), func(ctx context.Context, in *ByID) (api.PreemptPlan, error) {
		return c.planPreempt(ctx, in.ID)
	})
	route(rest, begins("swap", "/v1/jobs/{id}/swap", "Put another job where a running one is"), func(ctx context.Context, in *struct {
		ByID
		Body struct {
			In string `json:"in" doc:"the job to put there: pending or suspended"`
		}
	}) (api.Operation, error) {
		return operation(c.swap(ctx, in.ID, in.Body.In))
	})
	route(rest, get("plan-swap", "/v1/jobs/{id}/swap", "What a swap would do and cost"), func(ctx context.Context, in *struct {
		ByID
		In string `query:"in" required:"true"`
	}) (api.PreemptPlan, error) {
		return c.planSwap(ctx, in.ID, in.In)
	})
	type wake struct {
		ByID
		Body *struct {
			Cloud string `json:"cloud,omitempty"`
			From  string `json:"from,omitempty" doc:"checkpoint; the newest durable one unless given"`
		}
	}
	route(rest, begins("resume", "/v1/jobs/{id}/resume", "Wake a suspended job"), func(ctx context.Context, in *wake) (api.Operation, error) {
		if in.Body == nil {
			return operation(c.resume(ctx, in.ID, "", ""))
		}
		return operation(c.resume(ctx, in.ID, in.Body.Cloud, in.Body.From))
	})
	route(rest, begins("restart", "/v1/jobs/{id}/restart", "Restore a job from a checkpoint"), func(ctx context.Context, in *wake) (api.Operation, error) {
		if in.Body == nil {
			return operation(c.restart(ctx, in.ID, "", ""))
		}
		return operation(c.restart(ctx, in.ID, in.Body.Cloud, in.Body.From))
	})
	route(rest, begins("kill", "/v1/jobs/{id}/kill", "End a job, or send it a signal"), func(ctx context.Context, in *struct {
		ByID
		Body *struct {
			Signal string `json:"signal,omitempty" doc:"TERM, SIGTERM or 15; the job goes on if it survives. Empty: end the job"`
		}
	}) (api.Operation, error) {
		if in.Body == nil {
			return operation(c.kill(ctx, in.ID, ""))
		}
		return operation(c.kill(ctx, in.ID, in.Body.Signal))
	})
}

func (c *Controller) listJobs(ctx context.Context, all bool, page Page) ([]api.Job, error) {
	may := func(j *jobRecord) bool { return !j.Drill && sees(ctx, j.Owner) }
	wanted := func(j *jobRecord) bool { return all || !j.Phase.Final() }
	var jobs []*jobRecord
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		jobs, err = pageOf(tx, c.jobs, page, may, wanted)
		return err
	})
	list := make([]api.Job, len(jobs))
	for i, j := range jobs {
		list[i] = j.Job
	}
	return list, err
}

func (c *Controller) jobDetail(ctx context.Context, ref string) (api.JobDetail, error) {
	var detail api.JobDetail
	err := c.store.View(ctx, func(tx store.Tx) error {
		job, err := findJob(tx, ref)
		if err == nil {
			detail = job.JobDetail
		}
		return err
	})
	return detail, err
}

func (c *Controller) waitJob(ctx context.Context, ref string, phase api.Phase, timeout string) (api.JobDetail, error) {
	patience, err := parseWait(timeout)
	if err != nil {
		return api.JobDetail{}, err
	}
	first, err := c.jobDetail(ctx, ref)
	if err != nil {
		return first, err
	}
	// From here by id: a name may come to mean another job.
	var detail api.JobDetail
	_, err = c.until(ctx, c.clock.After(patience), func(tx store.Tx) (bool, error) {
		job, err := getJob(tx, first.ID)
		if errors.Is(err, store.ErrNotFound) {
			return false, notFound("job %s was removed", first.ID)
		}
		if err != nil {
			return false, err
		}
		detail = job.JobDetail
		return job.Phase.Final() || job.Phase == phase, nil
	})
	return detail, err
}

// parseWait reads how long a long poll may take.
func parseWait(text string) (time.Duration, error) {
	if text == "" {
		return longestWait, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, invalid("%q is not a duration such as 30s", text)
	}
	return min(d, longestWait), nil
}

func (c *Controller) routeCheckpoints(rest huma.API) {
	route(rest, begins("checkpoint", "/v1/jobs/{id}/checkpoints", "Checkpoint a running job"), func(ctx context.Context, in *struct {
		ByID
		Body *struct {
			Label string `json:"label,omitempty" maxLength:"200" doc:"kept by retention"`
		}
	}) (api.Operation, error) {
		if in.Body == nil {
			return operation(c.checkpoint(ctx, in.ID, ""))
		}
		return operation(c.checkpoint(ctx, in.ID, in.Body.Label))
	})
	route(rest, get("job-checkpoints", "/v1/jobs/{id}/checkpoints", "List a job's checkpoints"), func(ctx context.Context, in *ByID) ([]api.Checkpoint, error) {
		return c.listCheckpoints(ctx, in.ID)
	})
	route(rest, get("checkpoints", "/v1/checkpoints", "List all checkpoints"), func(ctx context.Context, _ *struct{}) ([]api.Checkpoint, error) {
		return c.listCheckpoints(ctx, "")
	})
	route(rest, get("show-checkpoint", "/v1/checkpoints/{id}", "Show a checkpoint"), func(ctx context.Context, in *ByID) (cp api.Checkpoint, err error) {
		err = c.store.View(ctx, func(tx store.Tx) error {
			cp, err = findCheckpoint(tx, in.ID)
			return err
		})
		return cp, err
	})
	routeEmpty(rest, huma.Operation{OperationID: "remove-checkpoint", Method: http.MethodDelete, Path: "/v1/checkpoints/{id}", Summary: "Forget a checkpoint"},
		func(ctx context.Context, in *ByID) error { return c.removeCheckpoint(ctx, in.ID) })
	route(rest, begins("verify-checkpoint", "/v1/checkpoints/{id}/verify", "Read and hash a checkpoint, or restore it on trial"), func(ctx context.Context, in *struct {
		ByID
		Body *struct {
			Restore bool `json:"restore,omitempty" doc:"restore it on trial, out of reach of everything"`
		}
	}) (api.Operation, error) {
		if in.Body != nil && in.Body.Restore {
			return operation(c.drill(ctx, in.ID))
		}
		return operation(c.verifyCheckpoints(ctx, in.ID))
	})
	route(rest, begins("verify", "/v1/verify", "Read and hash all checkpoints"), func(ctx context.Context, _ *struct{}) (api.Operation, error) {
		return operation(c.verifyCheckpoints(ctx, ""))
	})
	route(rest, begins("clone", "/v1/checkpoints/{id}/clone", "Make a new job of a checkpoint"), func(ctx context.Context, in *struct {
		ByID
		Body *struct {
			Cloud string `json:"cloud,omitempty"`
			Name  string `json:"name,omitempty"`
		}
	}) (api.Operation, error) {
		if in.Body == nil {
			return operation(c.clone(ctx, in.ID, "", ""))
		}
		return operation(c.clone(ctx, in.ID, in.Body.Cloud, in.Body.Name))
	})
}

func (c *Controller) listCheckpoints(ctx context.Context, ref string) (list []api.Checkpoint, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		id := ""
		if ref != "" {
			job, err := findJob(tx, ref)
			if err != nil {
				return err
			}
			id = job.ID
		}
		list, err = checkpointsOf(tx, id)
		list = slices.DeleteFunc(list, func(cp api.Checkpoint) bool { return !sees(ctx, cp.Owner) })
		return err
	})
	return list, err
}

func (c *Controller) routePlatform(rest huma.API) {
	route(rest, get("operations", "/v1/operations", "List operations"), func(ctx context.Context, in *struct{ Page }) ([]api.Operation, error) {
		return c.listOperations(ctx, in.Page)
	})
	route(rest, get("operation", "/v1/operations/{id}", "Show an operation, or wait for its next change"), func(ctx context.Context, in *struct {
		ByID
		Wait string `query:"wait"`
	}) (api.Operation, error) {
		return c.waitOperation(ctx, in.ID, in.Wait)
	})
	route(rest, begins("cancel-operation", "/v1/operations/{id}/cancel", "Call an operation off, where that is safe: what it did is undone"),
		func(ctx context.Context, in *ByID) (api.Operation, error) { return operation(c.cancel(ctx, in.ID)) })
	route(rest, get("nodes", "/v1/nodes", "List the nodes"), func(ctx context.Context, in *struct{ Page }) ([]api.Node, error) {
		return c.listNodes(ctx, in.Page)
	})
	route(rest, get("top", "/v1/top", "What the monitor has measured of nodes and jobs in its newest round"), func(ctx context.Context, _ *struct{}) (api.Top, error) {
		return c.top(ctx)
	})
	routeEmpty(rest, huma.Operation{OperationID: "kill-node", Method: http.MethodPost, Path: "/v1/nodes/{id}/kill", Summary: "Cut the power of a virtual node"},
		func(ctx context.Context, in *ByID) error { return c.cutPower(ctx, in.ID) })
	routeEmpty(rest, huma.Operation{OperationID: "start-node", Method: http.MethodPost, Path: "/v1/nodes/{id}/start", Summary: "Start a virtual node again"},
		func(ctx context.Context, in *ByID) error { return c.powerOn(ctx, in.ID) })
	route(rest, begins("drain", "/v1/nodes/{id}/drain", "Cordon a node and move everything off it"), func(ctx context.Context, in *ByID) (api.Operation, error) {
		return operation(c.drain(ctx, in.ID))
	})
	routeEmpty(rest, huma.Operation{OperationID: "uncordon", Method: http.MethodPost, Path: "/v1/nodes/{id}/uncordon", Summary: "Let jobs onto a node again, and end its drain"},
		func(ctx context.Context, in *ByID) error { return c.uncordon(ctx, in.ID) })
	routeEmpty(rest, huma.Operation{OperationID: "label-node", Method: http.MethodPost, Path: "/v1/nodes/{id}/labels", Summary: "Set labels of a node; an empty value removes one"},
		func(ctx context.Context, in *struct {
			ByID
			Body map[string]string
		}) error {
			return c.label(ctx, in.ID, in.Body)
		})
	route(rest, get("clouds", "/v1/clouds", "List the clouds"), func(ctx context.Context, _ *struct{}) ([]api.Cloud, error) {
		return c.listClouds(ctx)
	})
	route(rest, get("controllers", "/v1/controllers", "List the controllers that share the store, the leader first"), func(context.Context, *struct{}) ([]api.Controller, error) {
		return c.parts.Cluster.Controllers(), nil
	})
	route(rest, get("version", "/v1/version", "The controller's version"), func(context.Context, *struct{}) (api.Version, error) {
		return api.Version{Version: c.parts.Version, Go: runtime.Version()}, nil
	})
}

func (c *Controller) listOperations(ctx context.Context, page Page) ([]api.Operation, error) {
	may := func(op *opRecord) bool { return sees(ctx, op.Owner) }
	var ops []*opRecord
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		ops, err = pageOf(tx, c.operations, page, may, always)
		return err
	})
	list := make([]api.Operation, len(ops))
	for i, op := range ops {
		list[i] = op.Operation
	}
	return list, err
}

// waitOperation answers at once without wait; with it, when the operation has
// changed or ended, or the time is over.
func (c *Controller) waitOperation(ctx context.Context, ref, wait string) (api.Operation, error) {
	var first, now *opRecord
	err := c.store.View(ctx, func(tx store.Tx) error {
		id, err := findID(tx, store.Operations, "operation", ref)
		if err != nil {
			return err
		}
		first, err = getOperation(tx, id)
		return err
	})
	if err != nil || wait == "" || first.Phase != api.OpRunning {
		return operation(first, err)
	}
	patience, err := parseWait(wait)
	if err != nil {
		return api.Operation{}, err
	}
	_, err = c.until(ctx, c.clock.After(patience), func(tx store.Tx) (bool, error) {
		if now, err = getOperation(tx, first.ID); err != nil {
			return false, err
		}
		return now.Phase != api.OpRunning || now.Step != first.Step || now.Message != first.Message || now.Progress != first.Progress, nil
	})
	return operation(now, err)
}

func (c *Controller) listNodes(ctx context.Context, page Page) ([]api.Node, error) {
	var nodes []*seenNode
	var used map[string]usage
	err := c.store.View(ctx, func(tx store.Tx) (err error) {
		if nodes, err = pageOf(tx, c.nodes, page, always, always); err == nil {
			used, err = c.usage(tx, nodes)
		}
		return err
	})
	list := make([]api.Node, len(nodes))
	for i, n := range nodes {
		u := used[n.ID]
		list[i] = n.Node
		list[i].CPUsUsed, list[i].MemUsed, list[i].Tasks = u.cpus, u.mem, u.tasks
	}
	return list, err
}

func (c *Controller) listClouds(ctx context.Context) ([]api.Cloud, error) {
	list := []api.Cloud{}
	err := c.store.View(ctx, func(tx store.Tx) error {
		records, err := c.nodes.all(tx)
		if err != nil {
			return err
		}
		count := make(map[string]int)
		for _, r := range records {
			count[r.Cloud]++
		}
		for _, name := range c.cloudNames() {
			cloud, _ := c.cloud(name)
			list = append(list, api.Cloud{Name: name, Driver: cloud.DriverName, Nodes: count[name]})
		}
		return nil
	})
	return list, err
}
