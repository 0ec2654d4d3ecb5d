package network

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// victim is an agent that is to be killed. Descriptor 3 is the node's network
// namespace, 4 and 5 those of its tasks.
type victim struct {
	State, Cgroup, Program string
	Underlay               netip.Addr
	Key                    Key
	Plan                   Plan
}

// runVictim leads a network through its whole life.
func runVictim(args []string) int {
	v := victim{}
	err := json.Unmarshal([]byte(args[0]), &v)
	if err == nil {
		err = v.live(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (v victim) live(ctx context.Context) error {
	var files []*os.File
	for fd := 3; fd <= 5; fd++ {
		unix.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), "namespace"))
	}
	m, err := New(Options{State: v.State, Cgroup: v.Cgroup, Underlay: v.Underlay, Init: v.Program, Program: v.Program, Namespace: files[0]})
	if err != nil {
		return err
	}
	endpoint, err := m.Prepare(ctx, v.Key, v.Plan)
	if err != nil {
		return err
	}
	endpoint.Address = netip.AddrPortFrom(endpoint.Address.Addr().Next(), endpoint.Address.Port())
	if err := m.Connect(ctx, v.Key, []Peer{{Node: "other", Endpoint: endpoint, Addresses: []netip.Addr{addressOf(7)}}}); err != nil {
		return err
	}
	for index := range 2 {
		if err := m.Join(ctx, v.Key, Member{Index: index, Address: addressOf(index)}, files[1+index]); err != nil {
			return err
		}
	}
	for index := range 2 {
		if err := m.Leave(ctx, v.Key, index); err != nil {
			return err
		}
	}
	return nil
}
