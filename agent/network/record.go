package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// record is what must be known of a network to find it, to use it and to remove
// it. It is on disk before any of that is done.
type record struct {
	Key  Key
	Plan Plan
	// Built: everything was made. What is not built, nobody uses.
	Built bool
	// Slot numbers the network on this node: see uplink.
	Slot int
	// Port is the UDP port of the tunnel, PrivateKey its WireGuard key.
	Port       uint16
	PrivateKey []byte
	Tunnel     tunnelKind
	Members    []Member
	Peers      []Peer // as last connected
}

// recordFile is inside the network's directory.
const recordFile = "network.json"

// directory of a network below the state.
func (m *Manager) directory(key Key) string { return filepath.Join(m.options.State, key.String()) }

// save writes the record so that after a crash the old or the new one is there.
func (m *Manager) save(r record) error {
	dir := m.directory(r.Key)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("record the network of job %s: %w", r.Key.Job, err)
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("record the network of job %s: %w", r.Key.Job, err)
	}
	if err := replaceFile(filepath.Join(dir, recordFile), append(raw, '\n')); err != nil {
		return fmt.Errorf("record the network of job %s: %w", r.Key.Job, err)
	}
	return nil
}

// replaceFile survives a crash of this process at any instant. It does not wait
// for the disk: no network outlives the machine.
func replaceFile(path string, contents []byte) error {
	if err := os.WriteFile(path+".new", contents, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// recorded reads all records. Those that cannot be read come back as keys only:
// what they stood for is to be removed.
func (m *Manager) recorded() (records []record, damaged []Key, err error) {
	entries, err := os.ReadDir(m.options.State)
	if err != nil {
		return nil, nil, fmt.Errorf("read the records of networks: %w", err)
	}
	for _, entry := range entries {
		key, ok := parseKey(entry.Name())
		if !ok || !entry.IsDir() {
			continue
		}
		r := record{}
		raw, err := os.ReadFile(filepath.Join(m.directory(key), recordFile))
		if err == nil {
			err = json.Unmarshal(raw, &r)
		}
		if err != nil || r.Key != key {
			damaged = append(damaged, key)
			continue
		}
		records = append(records, r)
	}
	return records, damaged, nil
}

// parseKey undoes Key.String.
func parseKey(name string) (Key, bool) {
	job, number, ok := strings.Cut(name, ".")
	run, err := strconv.ParseInt(number, 10, 64)
	key := Key{Job: job, Run: run}
	return key, ok && err == nil && key.check() == nil
}

// forget removes the record and what is beside it.
func (m *Manager) forget(key Key) error {
	if err := os.RemoveAll(m.directory(key)); err != nil {
		return fmt.Errorf("forget the network of job %s: %w", key.Job, err)
	}
	return nil
}

// without returns the record with one member less, sharing nothing with r.
func (r record) without(index int) record {
	members := make([]Member, 0, len(r.Members))
	for _, m := range r.Members {
		if m.Index != index {
			members = append(members, m)
		}
	}
	r.Members = members
	return r
}

// with returns the record with one member added or replaced.
func (r record) with(member Member) record {
	r = r.without(member.Index)
	r.Members = append(r.Members, member)
	return r
}

var errNoAddress = errors.New("the node has no address on a network that reaches other nodes: start its agent with one (underlay)")

// portsOf lists what a task would publish.
func (r *record) portsOf(index int) []Publish {
	var ports []Publish
	for _, port := range r.Plan.Publish {
		if port.Task == index {
			ports = append(ports, port)
		}
	}
	return ports
}

// published lists what the outside reaches through this node: the ports of
// tasks that are here.
func (r *record) published() []forward {
	var list []forward
	for _, member := range r.Members {
		for _, port := range r.portsOf(member.Index) {
			list = append(list, forward{Publish: port, To: member.Address, Via: uplinkOf(r.Slot).router})
		}
	}
	return list
}

// forward is one published port of a task on this node.
type forward struct {
	Publish
	To  netip.Addr // the task
	Via netip.Addr // its router, seen from the node
}
