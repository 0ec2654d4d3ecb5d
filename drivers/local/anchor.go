package local

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// network returns the node's network namespace, connected to the fabric. It is
// that of the node's anchor, which is started if it is not there: in a new
// namespace, or in that of the process inhabitant if that is not 0.
func (n *node) network(inhabitant int) (*os.File, error) {
	anchor, err := n.anchor()
	if err == nil && anchor == 0 {
		anchor, err = n.startAnchor(inhabitant)
	}
	if err != nil {
		return nil, fmt.Errorf("the network namespace of node %s: %w", n.spec.Name, err)
	}
	namespace, err := namespaceOf(anchor)
	if err != nil {
		return nil, fmt.Errorf("the network namespace of node %s: %w", n.spec.Name, err)
	}
	if err := n.options.Fabric.attach(n.spec.Name, namespace); err != nil {
		namespace.Close()
		return nil, err
	}
	return namespace, nil
}

func namespaceOf(pid int) (*os.File, error) { return os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)) }

// anchor is the pid of the node's anchor, 0 when there is none. No other
// process is ever in its cgroup.
func (n *node) anchor() (int, error) {
	pids, err := n.group.pids(n.group.anchorDir())
	if err != nil || len(pids) == 0 {
		return 0, err
	}
	return pids[0], nil
}

func (n *node) startAnchor(inhabitant int) (int, error) {
	hold := n.options.Hold
	cmd := exec.Command(hold[0], append(hold[1:len(hold):len(hold)], n.spec.Name)...)
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	var namespace *os.File
	if inhabitant == 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	} else {
		var err error
		if namespace, err = namespaceOf(inhabitant); err != nil {
			return 0, err
		}
		defer namespace.Close()
	}
	if err := startIn(cmd, n.group.anchorDir(), namespace); err != nil {
		return 0, fmt.Errorf("start its anchor: %w", err)
	}
	go cmd.Wait() // until the power is cut
	return cmd.Process.Pid, nil
}
