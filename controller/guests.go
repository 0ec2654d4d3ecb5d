package controller

import (
	"context"
	"errors"
	"sync"
	"time"

	"dormouse/controller/access"
	"dormouse/controller/store"
)

// guests are the requests under way, by token: those that last (event streams,
// logs, exec, long polls) end when their token is revoked or expires.
type guests struct {
	mu      sync.Mutex
	byToken map[string]map[*guest]bool
	came    chan struct{} // of size 1: somebody new is there
}

type guest struct{ end context.CancelCauseFunc }

func newGuests() *guests {
	return &guests{byToken: make(map[string]map[*guest]bool), came: make(chan struct{}, 1)}
}

var errTokenEnded = errors.New("the token was revoked or has expired")

// admit returns a context that ends with the token.
func (g *guests) admit(ctx context.Context, token string) (context.Context, func()) {
	if token == localAdmin.Token {
		return ctx, func() {}
	}
	ctx, end := context.WithCancelCause(ctx)
	one := &guest{end: end}
	g.mu.Lock()
	if g.byToken[token] == nil {
		g.byToken[token] = make(map[*guest]bool)
	}
	g.byToken[token][one] = true
	g.mu.Unlock()
	select {
	case g.came <- struct{}{}:
	default: // it will look anyway
	}
	return ctx, func() {
		end(nil)
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.byToken[token], one)
		if len(g.byToken[token]) == 0 {
			delete(g.byToken, token)
		}
	}
}

func (g *guests) tokens() (ids map[string]bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	ids = make(map[string]bool, len(g.byToken))
	for id := range g.byToken {
		ids[id] = true
	}
	return ids
}

func (g *guests) dismiss(token string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for one := range g.byToken[token] {
		one.end(errTokenEnded)
	}
}

// guardPeriod bounds how often the tokens of the guests are looked at.
const guardPeriod = 100 * time.Millisecond

// guardGuests ends the requests of tokens that are not valid any more.
func (c *Controller) guardGuests(ctx context.Context) {
	for ctx.Err() == nil {
		revision := c.store.Revision()
		next, err := c.dismissInvalid(ctx)
		if err != nil && ctx.Err() == nil {
			c.log.Warn("the tokens of the requests under way cannot be looked at", "error", err)
		}
		if c.pause(ctx, guardPeriod) != nil {
			return
		}
		var expiry <-chan time.Time
		if !next.IsZero() {
			expiry = c.clock.After(next.Sub(c.clock.Now()))
		}
		waiting, end := context.WithCancel(ctx)
		changed := make(chan struct{})
		go func() { // ends with this turn
			defer close(changed)
			c.store.Wait(waiting, revision) // whatever it says, it is time to look
		}()
		select {
		case <-changed:
		case <-expiry:
		case <-c.guests.came:
		}
		end()
		<-changed
	}
}

// dismissInvalid returns when the next token of a guest expires.
func (c *Controller) dismissInvalid(ctx context.Context) (next time.Time, err error) {
	there := c.guests.tokens()
	if len(there) == 0 {
		return next, nil
	}
	var all []access.Token
	err = c.store.View(ctx, func(tx store.Tx) (err error) {
		all, err = store.All[access.Token](tx, store.AccessTokens)
		return err
	})
	if err != nil {
		return next, err
	}
	now := c.clock.Now()
	for i := range all {
		t := &all[i]
		if t.Valid(now) != "" || !there[t.ID] {
			continue
		}
		delete(there, t.ID)
		if t.Expires != nil && (next.IsZero() || t.Expires.Before(next)) {
			next = *t.Expires
		}
	}
	for id := range there {
		c.guests.dismiss(id)
	}
	return next, nil
}
