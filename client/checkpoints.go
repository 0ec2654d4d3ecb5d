package client

import (
	"context"
	"net/http"

	"dormouse/api"
)

// Checkpoint starts a checkpoint of a running job. The operation is done when
// the checkpoint is durable.
func (c *Client) Checkpoint(ctx context.Context, job, label string) (*api.Operation, error) {
	body := struct {
		Label string `json:"label,omitempty"`
	}{label}
	return c.operate(ctx, jobPath(job)+"/checkpoints", body)
}

// Checkpoints lists the checkpoints of a job (empty: of all jobs).
func (c *Client) Checkpoints(ctx context.Context, job string) ([]api.Checkpoint, error) {
	path := "/v1/checkpoints"
	if job != "" {
		path = jobPath(job) + "/checkpoints"
	}
	return list[api.Checkpoint](ctx, c, path, nil)
}

// GetCheckpoint returns one checkpoint by its id or an unambiguous prefix.
func (c *Client) GetCheckpoint(ctx context.Context, id string) (*api.Checkpoint, error) {
	return one[api.Checkpoint](ctx, c, http.MethodGet, checkpointPath(id), nil, nil)
}

// RemoveCheckpoint forgets a checkpoint; what only it needs leaves the
// repository.
func (c *Client) RemoveCheckpoint(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, checkpointPath(id), nil, nil, nil)
}

// Verify reads and hashes everything a checkpoint (empty: every one) refers to.
// The operation's Result is []api.VerifyReport.
func (c *Client) Verify(ctx context.Context, id string) (*api.Operation, error) {
	if id == "" {
		return c.operate(ctx, "/v1/verify", struct{}{})
	}
	return c.operate(ctx, checkpointPath(id)+"/verify", struct{}{})
}

// Drill restores a checkpoint on trial, out of reach of everything, and throws
// it away. The operation's Result is []api.VerifyReport.
func (c *Client) Drill(ctx context.Context, id string) (*api.Operation, error) {
	body := struct {
		Restore bool `json:"restore"`
	}{true}
	return c.operate(ctx, checkpointPath(id)+"/verify", body)
}

// Clone makes a new job, which may have a name, from a checkpoint; the operation
// says which.
func (c *Client) Clone(ctx context.Context, id, cloud, name string) (*api.Operation, error) {
	body := struct {
		Cloud string `json:"cloud,omitempty"`
		Name  string `json:"name,omitempty"`
	}{cloud, name}
	return c.operate(ctx, checkpointPath(id)+"/clone", body)
}

func checkpointPath(id string) string { return "/v1/checkpoints/" + segment(id) }
