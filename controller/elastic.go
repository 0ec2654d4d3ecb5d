package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/controller/scheduler"
	"dormouse/controller/store"
	"dormouse/drivers"
)

// Elastic clouds. A cloud that may have more nodes than it begins with gets
// further ones while jobs wait for room that those would give: new jobs, and those
// that lost their place with a node. Which and how many is tried out with the
// scheduler itself, on nodes that are only imagined. A further node that nothing
// has been on for a while is given back.
//
// A job that is yet to start and will be put on nodes being made is provisioning.
//
// A node is in the store before its driver is asked for it, and until its driver
// has taken it away; what was begun when the controller ended is finished by the
// next one.

const (
	// idleLong is for how long nothing must have been on a further node before it
	// is given back, unless the cloud says otherwise.
	idleLong = 5 * time.Minute
	// joinLong is how long a node may take to join before it is given up.
	joinLong = 15 * time.Minute
	// growRest is how long a cloud is left alone that could not make a node.
	growRest = time.Minute
)

// elastic are the clouds that may get further nodes.
func (c *Controller) elastic() (clouds []Cloud) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range c.order {
		if cloud := c.clouds[name]; cloud.Driver != nil && cloud.Most > len(cloud.Nodes) {
			clouds = append(clouds, cloud)
		}
	}
	return clouds
}

// grow provisions the nodes for which jobs wait.
func (c *Controller) grow(ctx context.Context, s *survey, decisions []scheduler.Decision) error {
	clouds := c.elastic()
	if len(clouds) == 0 || !s.lacks(decisions) {
		return nil
	}
	for _, cloud := range clouds {
		if c.clock.Now().Before(c.restsUntil(cloud.Name)) {
			continue
		}
		specs := s.furtherNodes(cloud)
		if len(specs) == 0 {
			continue
		}
		if err := c.recordFurther(ctx, cloud, specs); err != nil {
			return err
		}
		c.work.Go(func() { c.provision(cloud, specs) })
		return nil // the next look decides whether it needs more of another cloud
	}
	return nil
}

func (c *Controller) restsUntil(cloud string) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.resting[cloud]
}

// lacks reports whether jobs wait that nobody is about to make room for.
func (s *survey) lacks(decisions []scheduler.Decision) bool {
	evicts := func(d scheduler.Decision) bool { return len(d.Evict) > 0 }
	leaves := func(r scheduler.Running) bool { return r.Leaving }
	return s.unplaced(decisions) > 0 && !slices.ContainsFunc(decisions, evicts) && !slices.ContainsFunc(s.running, leaves)
}

// unplaced counts the jobs that wait for nothing but room.
func (s *survey) unplaced(decisions []scheduler.Decision) (n int) {
	held := make(map[string]bool)
	for _, w := range s.queue {
		held[w.ID] = w.Hold != ""
	}
	for _, d := range decisions {
		if d.Placement == nil && !held[d.ID] {
			n++
		}
	}
	return n
}

// furtherNodes are the fewest nodes with which the cloud would make room for the
// jobs that wait, as far as it may.
func (s *survey) furtherNodes(cloud Cloud) []drivers.NodeSpec {
	like, ok := s.likeOthers(cloud)
	if !ok {
		return nil
	}
	imagined := *s
	imagined.nodes = slices.Clone(s.nodes)
	taken, count := make(map[string]bool), 0
	for i, n := range imagined.nodes {
		taken[n.ID] = true
		if n.Cloud != cloud.Name || n.State == api.NodeLost {
			continue
		}
		count++
		if n.State == api.NodeJoining { // it will do as well as a further one
			imagined.nodes[i] = imaginedNode(n.ID, like)
		}
	}
	if count >= cloud.Most {
		return nil
	}
	var specs []drivers.NodeSpec
	enough, left := 0, imagined.unplaced(imagined.decide())
	for next := 0; left > 0 && count < cloud.Most; count++ {
		name := fmt.Sprintf("%s-%d", cloud.Name, next)
		for ; taken[name]; next++ {
			name = fmt.Sprintf("%s-%d", cloud.Name, next)
		}
		taken[name] = true
		imagined.nodes = append(imagined.nodes, imaginedNode(name, like))
		specs = append(specs, drivers.NodeSpec{Name: name, CPUs: like.CPUs, MemBytes: like.MemBytes})
		if now := imagined.unplaced(imagined.decide()); now < left {
			enough, left = len(specs), now
		}
	}
	return specs[:enough]
}

// likeOthers is what a further node of the cloud will be like: as its first one.
func (s *survey) likeOthers(cloud Cloud) (scheduler.Node, bool) {
	i := slices.IndexFunc(s.nodes, func(n scheduler.Node) bool { return n.Cloud == cloud.Name && n.CPUs > 0 && n.MemBytes > 0 })
	if i < 0 {
		return scheduler.Node{}, false
	}
	return s.nodes[i], true
}

func imaginedNode(id string, like scheduler.Node) scheduler.Node {
	return scheduler.Node{
		ID: id, Cloud: like.Cloud, State: api.NodeReady, CPUs: like.CPUs, MemBytes: like.MemBytes, CRIUVersion: like.CRIUVersion,
		Labels: map[string]string{labelNode: id, labelCloud: like.Cloud},
	}
}

// recordFurther writes down which nodes are about to be made.
func (c *Controller) recordFurther(ctx context.Context, cloud Cloud, specs []drivers.NodeSpec) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		for _, spec := range specs {
			if _, err := tx.Get(store.Nodes, spec.Name); !errors.Is(err, store.ErrNotFound) {
				return errors.Join(err, fmt.Errorf("there is a node %s already", spec.Name))
			}
			n := nodeRecord{Driver: cloud.DriverName, Further: true, Node: api.Node{
				ID: spec.Name, Name: spec.Name, Cloud: cloud.Name, CPUs: spec.CPUs, MemBytes: spec.MemBytes,
			}}
			if err := c.putNodeState(tx, n, api.NodeJoining, "it is made because jobs wait for room"); err != nil {
				return err
			}
		}
		return nil
	})
}

// provision has the nodes made, and gives up those that cannot be.
func (c *Controller) provision(cloud Cloud, specs []drivers.NodeSpec) {
	_, err := cloud.Driver.Provision(c.run, specs)
	if err == nil || c.run.Err() != nil {
		return
	}
	c.log.Error("further nodes could not be made", "cloud", cloud.Name, "error", err)
	c.rest(cloud.Name)
	made, listed := cloud.Driver.Nodes(c.run)
	for _, spec := range specs {
		if listed == nil && slices.ContainsFunc(made, func(n drivers.Node) bool { return n.Name == spec.Name && n.Power == drivers.PowerOn }) {
			continue
		}
		if err := c.giveBack(c.run, cloud, spec.Name, "it could not be made: "+err.Error()); err != nil && c.run.Err() == nil {
			c.log.Error("a node that could not be made is not given back", "node", spec.Name, "error", err)
		}
	}
}

func (c *Controller) rest(cloud string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resting[cloud] = c.clock.Now().Add(growRest)
}

// furtherSpecs are the further nodes of a cloud that the store knows: a controller
// that begins has them made, or taken over, with the others.
func (c *Controller) furtherSpecs(ctx context.Context, cloud Cloud) (specs []drivers.NodeSpec, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		nodes, err := store.All[nodeRecord](tx, store.Nodes)
		for _, n := range nodes {
			if n.Further && n.Cloud == cloud.Name && !n.GivenBack {
				specs = append(specs, drivers.NodeSpec{Name: n.ID, CPUs: n.CPUs, MemBytes: n.MemBytes})
			}
		}
		return err
	})
	return specs, err
}

// shrink gives back further nodes that are not needed, until ctx ends.
func (c *Controller) shrink(ctx context.Context) {
	idle := make(map[string]time.Time) // since when, by node
	for {
		select {
		case <-c.clock.After(c.parts.Round):
		case <-ctx.Done():
			return
		}
		for _, cloud := range c.elastic() {
			if err := c.shrinkCloud(ctx, cloud, idle); err != nil && ctx.Err() == nil {
				c.log.Error("idle nodes cannot be given back", "cloud", cloud.Name, "error", err)
			}
		}
	}
}

func (c *Controller) shrinkCloud(ctx context.Context, cloud Cloud, idle map[string]time.Time) error {
	why := make(map[string]string) // of the nodes that go
	now := c.clock.Now()
	err := c.store.View(ctx, func(tx store.Tx) error {
		nodes, err := c.nodes.all(tx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if !n.Further || n.Cloud != cloud.Name {
				continue
			}
			busy, err := c.occupied(tx, n.ID)
			if err != nil {
				return err
			}
			if busy {
				delete(idle, n.ID)
				continue
			}
			if _, known := idle[n.ID]; !known {
				idle[n.ID] = now
			}
			switch quiet := now.Sub(idle[n.ID]); {
			case n.GivenBack:
				why[n.ID] = n.Reason
			case n.State == api.NodeJoining && quiet >= joinLong:
				why[n.ID] = fmt.Sprintf("it has not joined for %s", joinLong)
			case n.State != api.NodeJoining && quiet >= cloud.idle():
				why[n.ID] = fmt.Sprintf("nothing was on it for %s", cloud.idle())
			}
		}
		return nil
	})
	for node, reason := range why {
		err = errors.Join(err, c.giveBack(ctx, cloud, node, reason))
		delete(idle, node)
	}
	return err
}

func (c Cloud) idle() time.Duration {
	if c.Idle > 0 {
		return c.Idle
	}
	return idleLong
}

// occupied reports whether a node has, or may have, anything of a job: tasks, the
// logs of one that is over, or what is yet to be cleaned up.
func (c *Controller) occupied(tx store.Tx, node string) (bool, error) {
	jobs, err := c.jobsOn(tx, node)
	if err != nil {
		return true, err
	}
	on := func(ref taskRef) bool { return ref.Node == node }
	for _, job := range jobs {
		if slices.ContainsFunc(job.refs(), on) || slices.ContainsFunc(job.Kept, on) {
			return true, nil
		}
	}
	left := false
	err = tx.Scan(store.Cleanups, node+"/", func(key string, _ []byte) error {
		left = strings.HasPrefix(key, node+"/")
		return store.ErrStop
	})
	return left, err
}

// giveBack takes a node away for good, unless something is on it again.
func (c *Controller) giveBack(ctx context.Context, cloud Cloud, node, why string) error {
	going := false
	err := c.store.Update(ctx, func(tx store.Tx) error {
		n, err := store.Get[nodeRecord](tx, store.Nodes, node)
		if err != nil {
			return ignoreNotFound(err)
		}
		busy, err := c.occupied(tx, node)
		if err != nil || busy {
			return err
		}
		if going = true; n.GivenBack {
			return nil
		}
		n.GivenBack, n.Cordoned = true, true
		return c.putNodeState(tx, n, api.NodeCordoned, "it is given back: "+why)
	})
	if err != nil || !going {
		return err
	}
	if err := cloud.Driver.Release(ctx, node); err != nil {
		return err
	}
	c.fleet.lose(node)
	c.monitor.forget(ctx, node)
	return c.store.Update(ctx, func(tx store.Tx) error {
		return errors.Join(dropTokens(tx, node), ignoreNotFound(tx.Delete(store.Monitor, inboxPrefix+node)), ignoreNotFound(tx.Delete(store.Nodes, node)))
	})
}
