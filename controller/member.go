package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
)

// Several controllers may share one store. Each is a member: it stands for
// election, and until it leads it follows. A follower answers what the store
// alone can tell, hands every other request on to the leader, and sends agents
// there. The leader is a Controller as it is alone, on a store that etcd keeps
// others from writing to; when its term ends that Controller is stopped and never
// used again, and the member follows once more.

// campaignPause is how long a member waits when it could not stand for election.
const campaignPause = time.Second

// member is this process among the controllers.
type member struct {
	d     *Daemon
	store *etcd.Store
	self  etcd.Candidate
	// following answers what the store tells, forward everything else.
	following *Controller
	forward   *forwarder
}

// role is what answers requests at the moment.
type role struct{ http.Handler }

// ServeHTTP answers REST and the agents' gRPC, by the role this controller has now.
func (d *Daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) { d.role.Load().ServeHTTP(w, r) }

// follower and leader tell a Controller of its place among the others.
type follower struct{ m *member }

func (f follower) Leads() bool                   { return false }
func (f follower) Controllers() []api.Controller { return f.m.controllers() }

type leader struct {
	m    *member
	term *etcd.Term
}

func (l leader) Leads() bool                   { return l.term.Holds() }
func (l leader) Controllers() []api.Controller { return l.m.controllers() }

func (m *member) controllers() []api.Controller {
	all := m.store.Candidates()
	list := make([]api.Controller, len(all))
	for i, c := range all {
		list[i] = api.Controller{Name: c.Name, URL: c.URL, Version: c.Version, Leads: c.Leads}
	}
	return list
}

// startMember begins to follow, and to stand for election.
func (d *Daemon) startMember(ctx context.Context, shared *etcd.Store, parts Parts) error {
	m := &member{d: d, store: shared, self: etcd.Candidate{Name: d.config.Name, URL: d.URL(), Version: parts.Version}}
	parts.Store, parts.Cluster = etcd.Following{Store: shared}, follower{m}
	var err error
	if m.following, err = d.newController(ctx, parts); err != nil {
		return err
	}
	d.controller = m.following
	m.forward = newForwarder(shared, m.self, d.keys.Pool(), d.log)
	d.role.Store(&role{m.follow()})
	if err := d.serve(); err != nil {
		return err
	}
	campaign, stop := context.WithCancel(context.Background())
	d.resign = stop
	d.members.Go(func() { m.run(campaign, parts) })
	return nil
}

// newController makes a Controller that knows the configured clouds, none of
// which has a driver: see checkStore.
func (d *Daemon) newController(ctx context.Context, parts Parts) (*Controller, error) {
	c, err := New(parts)
	if err != nil {
		return nil, err
	}
	for _, cloud := range d.config.Clouds {
		if err := c.AddCloud(ctx, cloud.cloud()); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// run stands for election and leads, over and over, until ctx ends.
func (m *member) run(ctx context.Context, parts Parts) {
	defer m.forward.close()
	for ctx.Err() == nil {
		err := m.reign(ctx, parts)
		if ctx.Err() != nil {
			return
		}
		var newer *store.NewerSchemaError
		var damaged *store.DamagedError
		if errors.As(err, &newer) || errors.As(err, &damaged) {
			m.d.fail(err)
			return
		}
		m.d.log.Warn("this controller does not lead", "reason", err)
		select {
		case <-ctx.Done():
		case <-time.After(campaignPause):
		}
	}
}

// reign waits until this controller is elected, leads for as long as its term
// lasts, and returns why that ended.
func (m *member) reign(ctx context.Context, parts Parts) error {
	term, err := m.store.Campaign(ctx, m.self)
	if err != nil {
		return err
	}
	defer term.Close()
	parts.Store, parts.Cluster = term, leader{m, term}
	c, err := m.d.newController(ctx, parts)
	if err != nil {
		return err
	}
	defer c.Stop()
	if err := c.Start(ctx); err != nil {
		return fmt.Errorf("take up what the controller before has left: %w", err)
	}
	m.d.log.Info("this controller leads", "controller", m.self.Name)
	m.d.role.Store(&role{c})
	defer m.d.role.Store(&role{m.follow()}) // before c is stopped
	select {
	case <-term.Done():
		return term.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}
