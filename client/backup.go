package client

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"dormouse/api"
)

// Backup writes a back-up of the controller's store and keys to w. Whether it is
// whole must be checked by reading it.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	response, err := c.send(ctx, http.MethodGet, "/v1/backup", nil, "", nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(w, response.Body); err != nil {
		return c.failed(ctx, fmt.Errorf("receive the back-up: %w", err))
	}
	return nil
}

// Controllers lists the controllers that share the store, the leader first.
func (c *Client) Controllers(ctx context.Context) ([]api.Controller, error) {
	return list[api.Controller](ctx, c, "/v1/controllers", nil)
}
