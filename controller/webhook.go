package controller

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
)

// Findings about a job that has a webhook are posted to it. What is to be posted
// is written with the finding, and forgotten when it was taken, or given up after
// postTries; so a controller that takes over goes on with it. It may arrive twice:
// its id tells.

const (
	postTimeout = 10 * time.Second
	postTries   = 5
	firstRetry  = 2 * time.Second // then four times as long each time
	postPrefix  = "post/"         // keys of store.Monitor: and the number
	postsAtOnce = 8
)

// post is one finding on its way to a webhook.
type post struct {
	Number    uint64          `json:"number"`
	Job       string          `json:"job"`
	URL       string          `json:"url"`
	Confined  bool            `json:"confined,omitempty"` // a user's, as JobSpec.Confined
	Body      json.RawMessage `json:"body"`
	Tries     int             `json:"tries,omitempty"`
	NotBefore time.Time       `json:"not_before,omitzero"`
}

func (p post) key() string { return fmt.Sprintf("%s%016x", postPrefix, p.Number) }

// postFinding has a finding posted to the job's webhook, if it has one.
func (c *Controller) postFinding(tx store.Tx, job *jobRecord, kind string, f api.Finding, task *int) error {
	if job.Spec.Webhook == "" || f.Kind == api.FindingStarvation && c.parts.Relief.policy(job) == api.StarvationIgnore {
		return nil
	}
	n, err := tx.Sequence(store.Monitor)
	if err != nil {
		return err
	}
	body, err := json.Marshal(api.WebhookPost{
		ID: n, Event: kind, Time: f.Time, Job: job.ID, Name: job.Name, Phase: job.Phase, Task: task,
		Node: f.Node, Condition: f.Condition, Since: f.Since, Explanation: f.Explanation,
	})
	if err != nil {
		return err
	}
	p := post{Number: n, Job: job.ID, URL: job.Spec.Webhook, Confined: job.Spec.Confined, Body: body}
	return store.Put(tx, store.Monitor, p.key(), p)
}

// deliver posts what is to be posted, until ctx ends.
func (c *Controller) deliver(ctx context.Context) {
	for {
		revision := c.store.Revision()
		posts, next, err := c.duePosts(ctx)
		if err != nil && ctx.Err() == nil {
			c.log.Error("what is to be posted to webhooks cannot be read", "error", err)
		}
		for _, p := range posts {
			if c.claim(p.key()) {
				c.work.Go(func() {
					defer c.release(p.key())
					c.deliverOne(ctx, p)
				})
			}
		}
		if c.pause(ctx, time.Second) != nil || len(posts) == 0 && !c.awaitDue(ctx, revision, next) {
			return
		}
	}
}

// duePosts are some of those that are due, and when the next is.
func (c *Controller) duePosts(ctx context.Context) (due []post, next time.Time, err error) {
	now := c.clock.Now()
	err = c.store.View(ctx, func(tx store.Tx) error {
		return tx.Scan(store.Monitor, postPrefix, func(key string, value []byte) error {
			if !strings.HasPrefix(key, postPrefix) || len(due) == postsAtOnce {
				return store.ErrStop
			}
			var p post
			if err := json.Unmarshal(value, &p); err != nil {
				return fmt.Errorf("read %s from the store: %w", key, err)
			}
			if !p.NotBefore.After(now) {
				due = append(due, p)
			} else if next.IsZero() || p.NotBefore.Before(next) {
				next = p.NotBefore
			}
			return nil
		})
	})
	return due, next, err
}

// deliverOne posts one, and writes how that went.
func (c *Controller) deliverOne(ctx context.Context, p post) {
	now, err := c.storedPost(ctx, p.key())
	if err != nil || now.Tries != p.Tries {
		return // it was posted since it was read
	}
	failed := c.send(ctx, p)
	if ctx.Err() != nil {
		return // tried again at the next start
	}
	p.Tries++
	result := "taken"
	switch {
	case failed == nil:
	case p.Tries >= postTries:
		result = "given_up"
	default:
		result = "refused"
	}
	c.metrics.posts.WithLabelValues(result).Inc()
	err = c.store.Update(ctx, func(tx store.Tx) error {
		switch result {
		case "refused":
			p.NotBefore = c.clock.Now().UTC().Add(firstRetry << (2 * (p.Tries - 1)))
			return store.Put(tx, store.Monitor, p.key(), p)
		case "given_up":
			message := fmt.Sprintf("the webhook did not take a finding in %d tries: %v", p.Tries, failed)
			if err := c.emit(tx, api.Event{Job: p.Job, Type: "webhook", Message: message}); err != nil {
				return err
			}
		}
		return tx.Delete(store.Monitor, p.key())
	})
	if err != nil && ctx.Err() == nil {
		c.log.Error("how a post to a webhook went was not written", "job", p.Job, "error", err)
	}
}

func (c *Controller) storedPost(ctx context.Context, key string) (p post, err error) {
	err = c.store.View(ctx, func(tx store.Tx) (err error) {
		p, err = store.Get[post](tx, store.Monitor, key)
		return err
	})
	return p, err
}

// send posts p once. What is answered is not read: only the status counts.
func (c *Controller) send(ctx context.Context, p post) error {
	ctx, end := context.WithTimeout(ctx, postTimeout)
	defer end()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL, bytes.NewReader(p.Body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "dormouse/"+c.parts.Version)
	client := http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       (&net.Dialer{Control: refuseInternal(p.Confined)}).DialContext,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.CopyN(io.Discard, response.Body, 4096); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return fmt.Errorf("it answered %s", response.Status)
	}
	return nil
}

// refuseInternal keeps jobs from making the controller call what only it can
// reach: the metadata service of its platform (link-local) and, for the jobs of
// users, its own machine.
func refuseInternal(confined bool) func(network, address string, _ syscall.RawConn) error {
	return func(_, address string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		ip := to.Addr().Unmap()
		switch {
		case ip.IsLinkLocalUnicast(), ip.IsMulticast(), ip.IsUnspecified():
			return fmt.Errorf("a webhook may not be at %s", ip)
		case ip.IsLoopback() && confined:
			return fmt.Errorf("a user's webhook may not be at %s, the controller's own machine", ip)
		}
		return nil
	}
}
