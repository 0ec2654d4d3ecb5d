package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// jobNetwork really makes, in a network namespace that is gone afterwards, what
// the networks of jobs are made of.
func (m *machine) jobNetwork() []finding {
	var findings []finding
	err := inNewNetwork(func() error {
		findings = []finding{bridging(), filtering(), tunnelling(), vxlan()}
		return nil
	})
	if err != nil {
		return []finding{{"job network", verdictFail, fmt.Sprintf("cannot make a network namespace to try it in: %v", err), "run outside of a container, or in a privileged one"}}
	}
	return findings
}

// inNewNetwork runs try on a thread that is in a new network namespace. If the
// thread cannot go back, it is not used again.
func inNewNetwork(try func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- func() error {
			ours, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer ours.Close()
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			err = try()
			if unix.Setns(int(ours.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			return err
		}()
	}()
	return <-result
}

func named(name string) netlink.LinkAttrs {
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	return attributes
}

func bridging() finding {
	pair := netlink.NewVeth(named("try1"))
	pair.PeerName = "try2"
	for name, link := range map[string]netlink.Link{"bridge": &netlink.Bridge{LinkAttrs: named("try0")}, "veth": pair} {
		if err := netlink.LinkAdd(link); err != nil {
			return finding{"job network", verdictFail, fmt.Sprintf("cannot make a network device of the kind %s: %v", name, err), "load the kernel module " + name}
		}
	}
	return finding{"job network", verdictOK, "bridge and veth", ""}
}

// filtering tries what keeps jobs apart, gives them the way out and cuts them off
// while they are captured.
func filtering() finding {
	missing := func(err error) finding {
		return finding{"nf_tables", verdictFail, fmt.Sprintf("does not work: %v, but jobs are kept apart and cut off by it", err), "load the kernel modules nf_tables, nft_nat, nft_masq and nft_ct"}
	}
	rules, err := nftables.New()
	if err != nil {
		return missing(err)
	}
	table := rules.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "try"})
	chain := rules.AddChain(&nftables.Chain{Name: "try", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	rules.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}, &expr.Masq{},
	}})
	if err := rules.Flush(); err != nil {
		return missing(err)
	}
	return finding{"nf_tables", verdictOK, "with connection tracking and address translation", ""}
}

// tunnelling finds out how jobs that span nodes are encrypted.
func tunnelling() finding {
	kernel := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: named("try3")})
	if kernel == nil {
		return finding{"WireGuard", verdictOK, "in the kernel", ""}
	}
	user := tunnelDevice()
	switch {
	case user == nil && errors.Is(kernel, unix.EOPNOTSUPP):
		return finding{"WireGuard", verdictWarn, "in a process of its own for each job that spans nodes, which is slower: the kernel has none", "load the kernel module wireguard"}
	case user == nil:
		return finding{"WireGuard", verdictFail, fmt.Sprintf("the kernel has it, but it does not work: %v", kernel), "unload the kernel module wireguard, or mend it"}
	}
	return finding{"WireGuard", verdictWarn, fmt.Sprintf("neither in the kernel nor by /dev/net/tun (%v): jobs cannot span nodes, but over VXLAN", user), "load the kernel module wireguard or tun"}
}

// tunnelDevice makes a TUN device, which is gone with its descriptor.
func tunnelDevice() error {
	control, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(control)
	request, err := unix.NewIfreq("try4")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	return unix.IoctlIfreq(control, unix.TUNSETIFF, request)
}

func vxlan() finding {
	if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: named("try5"), VxlanId: 1, Port: 4789}); err != nil {
		return finding{"VXLAN", verdictWarn, fmt.Sprintf("does not work (%v): clouds with `tunnel: vxlan` cannot have this node", err), "load the kernel module vxlan"}
	}
	return finding{"VXLAN", verdictOK, "for clouds whose network is trusted (`tunnel: vxlan`)", ""}
}
