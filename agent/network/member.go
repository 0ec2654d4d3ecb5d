package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// taskDevice is the name of a task's device inside its namespace.
const taskDevice = "eth0"

// portOf is the router's end of a task's link.
func portOf(index int) string { return fmt.Sprintf("t%d", index) }

func isPort(name string) bool {
	number, ok := strings.CutPrefix(name, "t")
	_, err := strconv.Atoi(number)
	return ok && err == nil
}

// unlinkOthers removes the links of all tasks that are not members, both ends
// of each.
func unlinkOthers(router *namespace, members []Member) error {
	links, err := complete(router.links.LinkList)
	if err != nil {
		return fmt.Errorf("list the router's network devices: %w", err)
	}
	kept := map[string]bool{}
	for _, member := range members {
		kept[portOf(member.Index)] = true
	}
	var errs []error
	for _, link := range links {
		if name := link.Attrs().Name; isPort(name) && !kept[name] {
			errs = append(errs, router.deleteLink(name))
		}
	}
	return errors.Join(errs...)
}

// linkMember joins a task's namespace to the router's bridge. Done again, it
// keeps the link that is there.
func linkMember(router *namespace, plan Plan, member Member, netns *os.File) error {
	task, err := openNamespace(netns)
	if err != nil {
		return err
	}
	defer task.close()
	if member.Cut {
		// First: no packet may pass in between.
		if err := Cut(netns); err != nil {
			return err
		}
	}
	if !linked(router, task, member.Index) {
		if err := pair(router, task, member); err != nil {
			return err
		}
	}
	if err := task.apply(setting{name: "ipv6/conf/" + taskDevice + "/disable_ipv6", value: "1", optional: true}); err != nil {
		return err
	}
	if err := enslave(router, member.Index); err != nil {
		return err
	}
	if err := address(task, taskDevice, netip.PrefixFrom(member.Address, plan.Subnet.Bits())); err != nil {
		return err
	}
	if err := defaultRoute(task, taskDevice, plan.Gateway); err != nil {
		return err
	}
	return errors.Join(task.await(taskDevice), router.await(portOf(member.Index)), router.await(bridgeName))
}

// linked reports whether the task's device and the router's port are the two
// ends of one link.
func linked(router, task *namespace, index int) bool {
	inside, err := task.links.LinkByName(taskDevice)
	if err != nil {
		return false
	}
	port, err := router.links.LinkByName(portOf(index))
	// Each end of a veth pair names the other's index as its parent.
	return err == nil && inside.Attrs().ParentIndex == port.Attrs().Index && port.Attrs().ParentIndex == inside.Attrs().Index
}

// pair makes the link in place of what may be left of an older one.
func pair(router, task *namespace, member Member) error {
	if err := router.deleteLink(portOf(member.Index)); err != nil {
		return err
	}
	if err := task.deleteLink(taskDevice); err != nil {
		return err
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = portOf(member.Index)
	attributes.MTU = TaskMTU
	err := router.links.LinkAdd(&netlink.Veth{
		LinkAttrs:        attributes,
		PeerName:         taskDevice,
		PeerHardwareAddr: taskMAC(member.Address),
		PeerMTU:          TaskMTU,
		PeerNamespace:    netlink.NsFd(task.file.Fd()),
	})
	if err != nil {
		return fmt.Errorf("make the task's network device: %w", err)
	}
	return nil
}

// enslave makes the task's link a port of the bridge.
func enslave(router *namespace, index int) error {
	port, err := router.links.LinkByName(portOf(index))
	if err != nil {
		return fmt.Errorf("find the task's end of the bridge: %w", err)
	}
	bridge, err := router.links.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find the network's bridge: %w", err)
	}
	if err := router.links.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("join the task to the network's bridge: %w", err)
	}
	return up(router, portOf(index))
}
