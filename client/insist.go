package client

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"strconv"
	"time"

	"dormouse/api"
)

// repeatEvery is how long to wait before a call is repeated.
const repeatEvery = 250 * time.Millisecond

// insist repeats a call that changes something, under one key, until it is
// answered or the patience is over.
func (c *Client) insist(ctx context.Context, call func(key string) error) error {
	key := rand.Text()
	deadline := time.Now().Add(c.patience)
	sent := false
	for first := true; ; first = false {
		err := call(key)
		sent = sent || err != nil && !notSent(err)
		after, again := repetition(err, first)
		if !again || time.Now().Add(after).After(deadline) {
			return gaveUp(err, sent)
		}
		select {
		case <-time.After(after):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// gaveUp is the error of a call that is not repeated any more.
func gaveUp(err error, sent bool) error {
	var unreachable *UnreachableError
	if errors.As(err, &unreachable) {
		unreachable.Sent = sent
	}
	return err
}

// repetition reports whether a call that ended with err is worth repeating, and
// after how long. One that could not even connect at first is not: there is no
// controller, or not there.
func repetition(err error, first bool) (after time.Duration, again bool) {
	var problem *api.Problem
	switch {
	case IsUnreachable(err):
		return repeatEvery, !first || !notSent(err)
	case errors.As(err, &problem):
		switch problem.Status {
		case http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusBadGateway, http.StatusGatewayTimeout:
			again = true
		}
		return max(repeatEvery, problem.RetryAfter), again
	}
	return 0, false
}

// retryAfter reads the header of that name: a number of seconds.
func retryAfter(response *http.Response) time.Duration {
	seconds, err := strconv.Atoi(response.Header.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}
