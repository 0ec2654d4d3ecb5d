package controller

import (
	"context"
	"sync"

	"dormouse/controller/store"
)

// bandwidth shares out what a cloud may send to the repository among those of
// its nodes that are sending. A node learns its share with the answer to every
// heartbeat, so for one heartbeat after an upload begins the cloud may exceed its
// limit by that node's old share.
type bandwidth struct {
	mu      sync.Mutex
	sending map[string]map[string]int // uploads, by cloud and node
}

func newBandwidth() *bandwidth { return &bandwidth{sending: make(map[string]map[string]int)} }

// begin notes that a node sends, until end is called.
func (b *bandwidth) begin(cloud, node string) (end func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sending[cloud] == nil {
		b.sending[cloud] = make(map[string]int)
	}
	b.sending[cloud][node]++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.sending[cloud][node]--; b.sending[cloud][node] == 0 {
			delete(b.sending[cloud], node)
		}
	}
}

// share is what a node may send of its cloud's limit. One that sends nothing is
// told what it could begin with.
func (b *bandwidth) share(cloud, node string, limit int64) int64 {
	if limit <= 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	among := len(b.sending[cloud])
	if b.sending[cloud][node] == 0 {
		among++
	}
	return max(limit/int64(among), 1)
}

// uploadRate is the present share of a node.
func (c *Controller) uploadRate(cloud, node string) int64 {
	known, _ := c.cloud(cloud)
	return c.bandwidth.share(cloud, node, known.UploadRate)
}

// sending notes that the nodes of the job send to the repository, until end is
// called.
func (d *doing) sending(ctx context.Context) (end func(), err error) {
	var ends []func()
	err = d.store.View(ctx, func(tx store.Tx) error {
		for _, ref := range d.job.refs() {
			node, err := store.Get[nodeRecord](tx, store.Nodes, ref.Node)
			if err != nil {
				return err
			}
			ends = append(ends, d.bandwidth.begin(node.Cloud, node.ID))
		}
		return nil
	})
	return func() {
		for _, end := range ends {
			end()
		}
	}, err
}
