package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"dormouse/api"
	"dormouse/controller/access"
	"dormouse/controller/store"
)

func (c *Controller) routeAccess(rest huma.API) {
	route(rest, huma.Operation{OperationID: "create-token", Method: http.MethodPost, Path: "/v1/tokens", Summary: "Make a token; the answer alone has its secret", DefaultStatus: http.StatusCreated},
		func(ctx context.Context, in *struct{ Body api.TokenRequest }) (api.NewToken, error) {
			return c.createToken(ctx, in.Body)
		})
	route(rest, get("tokens", "/v1/tokens", "List the tokens, without their secrets"), func(ctx context.Context, _ *struct{}) ([]api.Token, error) {
		return c.listTokens(ctx)
	})
	routeEmpty(rest, huma.Operation{OperationID: "revoke-token", Method: http.MethodDelete, Path: "/v1/tokens/{id}", Summary: "Revoke a token, by its id or name: what it has open ends"},
		func(ctx context.Context, in *ByID) error { return c.revokeToken(ctx, in.ID) })
	route(rest, get("whoami", "/v1/whoami", "Show the token that asks"), func(ctx context.Context, _ *struct{}) (api.Token, error) {
		who, _ := askerOf(ctx)
		return api.Token{ID: who.Token, Name: who.Name, Role: who.Role, User: who.User, AllowRoot: who.AllowRoot}, nil
	})
	route(rest, get("audit", "/v1/audit", "Show who did what, oldest first"), func(ctx context.Context, in *struct {
		Since time.Time `query:"since" doc:"only what came after"`
		Limit int       `query:"limit" doc:"only so many, the newest"`
	}) ([]api.AuditEntry, error) {
		return c.listAudit(ctx, in.Since, in.Limit)
	})
}

func (c *Controller) createToken(ctx context.Context, ask api.TokenRequest) (api.NewToken, error) {
	now := c.clock.Now().UTC()
	token := access.Token{Token: api.Token{
		ID: newID("t"), Name: ask.Name, Role: ask.Role, User: ask.User, AllowRoot: ask.AllowRoot, Created: now,
	}}
	if ask.ExpiresMS < 0 {
		return api.NewToken{}, invalid("expires_ms must be 0 or greater, got %d", ask.ExpiresMS)
	}
	if ask.ExpiresMS > 0 {
		expires := now.Add(time.Duration(ask.ExpiresMS) * time.Millisecond)
		token.Expires = &expires
	}
	if ask.User != "" {
		if err := findUser(&token); err != nil {
			return api.NewToken{}, err
		}
	}
	if err := access.Check(token.Token); err != nil {
		return api.NewToken{}, invalid("%v", err)
	}
	if ask.User != "" && token.UID == 0 && !token.AllowRoot {
		return api.NewToken{}, invalid("user %s is root: allow the token that (--allow-root), or choose another user", token.User)
	}
	secret := access.NewSecret()
	err := c.store.Update(ctx, func(tx store.Tx) error {
		all, err := store.All[access.Token](tx, store.AccessTokens)
		if err != nil {
			return err
		}
		for i := range all {
			if all[i].Name == token.Name && all[i].Valid(now) == "" || token.Name == localAdmin.Name {
				return refused("there is a token named %s already: revoke it first, or choose another name", token.Name)
			}
		}
		if err := store.Put(tx, store.AccessTokens, access.Hash(secret), token); err != nil {
			return err
		}
		// A receipt would keep the secret readable: who did not get it makes another token.
		return c.answered(ctx, tx, http.StatusCreated, api.NewToken{Token: token.Token})
	})
	return api.NewToken{Token: token.Token, Secret: secret}, err
}

// findUser resolves the user of a token to numbers: as this machine knows them,
// or as NAME:UID:GID says.
func findUser(token *access.Token) error {
	parts := strings.Split(token.User, ":")
	var uid, gid string
	switch len(parts) {
	case 1:
		found, err := user.Lookup(token.User)
		if err != nil {
			return invalid("the controller's machine knows no user %q: give its numbers, as in %s:1000:1000", token.User, token.User)
		}
		uid, gid = found.Uid, found.Gid
	case 3:
		token.User, uid, gid = parts[0], parts[1], parts[2]
	default:
		return invalid("the user must be NAME or NAME:UID:GID, got %q", token.User)
	}
	u, err := strconv.ParseUint(uid, 10, 31)
	g, gidErr := strconv.ParseUint(gid, 10, 31)
	if errors.Join(err, gidErr) != nil {
		return invalid("the numbers of user %s must be whole and below 2147483648, got %s:%s", token.User, uid, gid)
	}
	token.UID, token.GID = uint32(u), uint32(g)
	return nil
}

func (c *Controller) listTokens(ctx context.Context) ([]api.Token, error) {
	list := []api.Token{}
	err := c.store.View(ctx, func(tx store.Tx) error {
		all, err := store.All[access.Token](tx, store.AccessTokens)
		for _, t := range all {
			list = append(list, t.Token)
		}
		return err
	})
	sortBy(list, func(t api.Token) (time.Time, string) { return t.Created, t.ID })
	return list, err
}

// revokeToken makes a token invalid. Its record stays for a while, so that the
// audit log's names mean something.
func (c *Controller) revokeToken(ctx context.Context, ref string) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		key, token, err := tokenNamed(tx, ref)
		if err != nil {
			return err
		}
		if token.Revoked != nil {
			return refused("token %s (%s) was revoked already", token.ID, token.Name)
		}
		now := c.clock.Now().UTC()
		token.Revoked = &now
		if err := store.Put(tx, store.AccessTokens, key, token); err != nil {
			return err
		}
		return c.answered(ctx, tx, http.StatusNoContent, nil)
	})
}

// tokenNamed finds a token by its id, or by the name of the only one that is not
// revoked.
func tokenNamed(tx store.Tx, ref string) (key string, token access.Token, err error) {
	err = tx.Scan(store.AccessTokens, "", func(k string, _ []byte) error {
		t, err := store.Get[access.Token](tx, store.AccessTokens, k)
		if err == nil && (t.ID == ref || t.Name == ref && t.Revoked == nil && token.ID != ref) {
			key, token = k, t
		}
		return err
	})
	if err == nil && key == "" {
		err = notFound("there is no token %q", ref)
	}
	return key, token, err
}

// keptTokens is for how long tokens that are not valid any more are listed.
const keptTokens = 90 * 24 * time.Hour

// forgetTokens removes tokens that became invalid long ago.
func (c *Controller) forgetTokens(ctx context.Context) error {
	oldest := c.clock.Now().Add(-keptTokens)
	return c.store.Update(ctx, func(tx store.Tx) error {
		var old []string
		err := tx.Scan(store.AccessTokens, "", func(key string, _ []byte) error {
			t, err := store.Get[access.Token](tx, store.AccessTokens, key)
			if slices.ContainsFunc([]*time.Time{t.Revoked, t.Expires}, func(at *time.Time) bool { return at != nil && at.Before(oldest) }) {
				old = append(old, key)
			}
			return err
		})
		for _, key := range old {
			err = errors.Join(err, tx.Delete(store.AccessTokens, key))
		}
		if err != nil {
			return fmt.Errorf("forget old tokens: %w", err)
		}
		return nil
	})
}
