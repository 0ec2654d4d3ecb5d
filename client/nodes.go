package client

import (
	"context"
	"net/http"

	"dormouse/api"
)

// Nodes lists the nodes of all clouds.
func (c *Client) Nodes(ctx context.Context) ([]api.Node, error) {
	return list[api.Node](ctx, c, "/v1/nodes", nil)
}

// Top is what the monitor has measured in its newest round.
func (c *Client) Top(ctx context.Context) (*api.Top, error) {
	return one[api.Top](ctx, c, http.MethodGet, "/v1/top", nil, nil)
}

// KillNode cuts the power of a virtual node: its agent and tasks are gone at once.
func (c *Client) KillNode(ctx context.Context, node string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+segment(node)+"/kill", nil, nil, nil)
}

// StartNode brings a virtual node back, empty.
func (c *Client) StartNode(ctx context.Context, node string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+segment(node)+"/start", nil, nil, nil)
}

// Drain cordons a node and moves everything off it.
func (c *Client) Drain(ctx context.Context, node string) (*api.Operation, error) {
	return c.operate(ctx, "/v1/nodes/"+segment(node)+"/drain", struct{}{})
}

// Uncordon lets jobs onto a node again, and ends a drain of it.
func (c *Client) Uncordon(ctx context.Context, node string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+segment(node)+"/uncordon", nil, nil, nil)
}

// LabelNode sets labels of a node; an empty value removes one.
func (c *Client) LabelNode(ctx context.Context, node string, labels map[string]string) error {
	return c.call(ctx, http.MethodPost, "/v1/nodes/"+segment(node)+"/labels", nil, labels, nil)
}

// Clouds lists the platforms the controller knows.
func (c *Client) Clouds(ctx context.Context) ([]api.Cloud, error) {
	return list[api.Cloud](ctx, c, "/v1/clouds", nil)
}

// Version asks the controller for its version.
func (c *Client) Version(ctx context.Context) (*api.Version, error) {
	return one[api.Version](ctx, c, http.MethodGet, "/v1/version", nil, nil)
}
