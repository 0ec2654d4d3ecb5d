package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"dormouse/api"
)

// Operations lists what is under way and what was done lately.
func (c *Client) Operations(ctx context.Context) ([]api.Operation, error) {
	return list[api.Operation](ctx, c, "/v1/operations", nil)
}

// Operation returns one operation. With a wait it answers when the operation
// has changed or ended, or when that time is over.
func (c *Client) Operation(ctx context.Context, id string, wait time.Duration) (*api.Operation, error) {
	query := url.Values{}
	if wait > 0 {
		query.Set("wait", wait.String())
	}
	return one[api.Operation](ctx, c, http.MethodGet, "/v1/operations/"+segment(id), query, nil)
}

// CancelOperation calls an operation off, where that is safe; it has ended when
// what it did is undone. operation is an id or an unambiguous prefix of one.
func (c *Client) CancelOperation(ctx context.Context, operation string) (*api.Operation, error) {
	return c.operate(ctx, "/v1/operations/"+segment(operation)+"/cancel", struct{}{})
}
