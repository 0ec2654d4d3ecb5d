package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"dormouse/api"
)

// CreateToken makes a token. Its secret is in this answer only; it is empty when
// the answer got lost and was asked for again.
func (c *Client) CreateToken(ctx context.Context, ask api.TokenRequest) (*api.NewToken, error) {
	return one[api.NewToken](ctx, c, http.MethodPost, "/v1/tokens", nil, ask)
}

// Tokens lists the tokens, also those revoked or expired not long ago.
func (c *Client) Tokens(ctx context.Context) ([]api.Token, error) {
	return list[api.Token](ctx, c, "/v1/tokens", nil)
}

// RevokeToken revokes a token, by its id or name.
func (c *Client) RevokeToken(ctx context.Context, token string) error {
	return c.call(ctx, http.MethodDelete, "/v1/tokens/"+segment(token), nil, nil, nil)
}

// WhoAmI returns the token that the client shows.
func (c *Client) WhoAmI(ctx context.Context) (*api.Token, error) {
	return one[api.Token](ctx, c, http.MethodGet, "/v1/whoami", nil, nil)
}

// Audit returns the newest entries of the audit log since a time, oldest first.
// limit 0: as many as the controller gives.
func (c *Client) Audit(ctx context.Context, since time.Time, limit int) ([]api.AuditEntry, error) {
	query := url.Values{}
	if !since.IsZero() {
		query.Set("since", since.UTC().Format(time.RFC3339))
	}
	if limit > 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return list[api.AuditEntry](ctx, c, "/v1/audit", query)
}
