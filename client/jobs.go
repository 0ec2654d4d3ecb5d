package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"dormouse/api"
)

// Submit hands a job to the controller.
func (c *Client) Submit(ctx context.Context, spec api.JobSpec) (*api.JobDetail, error) {
	return one[api.JobDetail](ctx, c, http.MethodPost, "/v1/jobs", nil, spec)
}

// Jobs lists the jobs that are not over, or all of them.
func (c *Client) Jobs(ctx context.Context, all bool) ([]api.Job, error) {
	query := url.Values{}
	if all {
		query.Set("all", "true")
	}
	return list[api.Job](ctx, c, "/v1/jobs", query)
}

// Job returns one job. Here and in every other method, job is an id, an
// unambiguous prefix of one, or a name.
func (c *Client) Job(ctx context.Context, job string) (*api.JobDetail, error) {
	return one[api.JobDetail](ctx, c, http.MethodGet, jobPath(job), nil, nil)
}

// RemoveJob forgets a job that is over, with its checkpoints.
func (c *Client) RemoveJob(ctx context.Context, job string) error {
	return c.call(ctx, http.MethodDelete, jobPath(job), nil, nil, nil)
}

// WaitJob answers when the job has reached phase (empty: a final one), when it
// is over, or after timeout, whichever comes first: look at the answer's Phase.
// The controller may answer before a long timeout is over.
func (c *Client) WaitJob(ctx context.Context, job string, phase api.Phase, timeout time.Duration) (*api.JobDetail, error) {
	query := url.Values{"timeout": {timeout.String()}}
	if phase != "" {
		query.Set("for", string(phase))
	}
	return one[api.JobDetail](ctx, c, http.MethodGet, jobPath(job)+"/wait", query, nil)
}

// Suspend checkpoints a job and takes it off its nodes.
func (c *Client) Suspend(ctx context.Context, job string) (*api.Operation, error) {
	return c.operate(ctx, jobPath(job)+"/suspend", struct{}{})
}

// Preempt takes a running job off its place until there is room for it again.
func (c *Client) Preempt(ctx context.Context, job string) (*api.Operation, error) {
	return c.operate(ctx, jobPath(job)+"/preempt", struct{}{})
}

// PlanPreempt tells what Preempt would do and cost.
func (c *Client) PlanPreempt(ctx context.Context, job string) (*api.PreemptPlan, error) {
	return one[api.PreemptPlan](ctx, c, http.MethodGet, jobPath(job)+"/preempt", nil, nil)
}

// Swap puts the job in, which is pending or suspended, where the running job out
// is.
func (c *Client) Swap(ctx context.Context, out, in string) (*api.Operation, error) {
	body := struct {
		In string `json:"in"`
	}{in}
	return c.operate(ctx, jobPath(out)+"/swap", body)
}

// PlanSwap tells what Swap would do and cost.
func (c *Client) PlanSwap(ctx context.Context, out, in string) (*api.PreemptPlan, error) {
	return one[api.PreemptPlan](ctx, c, http.MethodGet, jobPath(out)+"/swap", url.Values{"in": {in}}, nil)
}

// Wake says where a job is restored from and to.
type Wake struct {
	Cloud string `json:"cloud,omitempty"` // empty: where there is room
	From  string `json:"from,omitempty"`  // empty: the newest durable checkpoint
}

// Resume restores a suspended job.
func (c *Client) Resume(ctx context.Context, job string, wake Wake) (*api.Operation, error) {
	return c.operate(ctx, jobPath(job)+"/resume", wake)
}

// Restart ends a job, if it runs, and restores it from a checkpoint; it starts
// anew when there is none.
func (c *Client) Restart(ctx context.Context, job string, wake Wake) (*api.Operation, error) {
	return c.operate(ctx, jobPath(job)+"/restart", wake)
}

// Kill sends a signal (SIGUSR1, ...); empty ends the job: SIGTERM, then SIGKILL.
func (c *Client) Kill(ctx context.Context, job, signal string) (*api.Operation, error) {
	body := struct {
		Signal string `json:"signal,omitempty"`
	}{signal}
	return c.operate(ctx, jobPath(job)+"/kill", body)
}

func (c *Client) operate(ctx context.Context, path string, in any) (*api.Operation, error) {
	return one[api.Operation](ctx, c, http.MethodPost, path, nil, in)
}

func jobPath(job string) string { return "/v1/jobs/" + segment(job) }
