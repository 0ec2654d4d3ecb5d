package local

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

// The way out: this machine forwards what the nodes send to where it would send
// it itself, under its own address, and lets in nothing but the answers. If it
// forwarded nothing before, it goes on to forward nothing else, and forwards
// nothing again after the last fabric of the namespace was closed.
const (
	forwardingFile = "/proc/sys/net/ipv4/ip_forward"
	// forwardingWasOff, as the alias of a bridge, is the debt to switch
	// forwarding off again. It is kept in the kernel, where it lasts as long as
	// what it is about.
	forwardingWasOff = "dormouse: ip_forward was 0"
	// bridgePrefix begins the name of every fabric's bridge.
	bridgePrefix = "dm"
	// bridgeKind is what rtnetlink calls a bridge.
	bridgeKind = "bridge\x00"
)

// What a packet's devices are, linux/netfilter/nf_tables.h; the library has no
// names for them.
const (
	metaIIFKIND expr.MetaKey = 26
	metaOIFKIND expr.MetaKey = 27
)

// openOutbound makes the way out. The caller holds the namespace's lock.
func (f *Fabric) openOutbound(bridge netlink.Link) error {
	was, err := os.ReadFile(forwardingFile)
	if err != nil {
		return err
	}
	owed, err := f.othersOwe()
	if err != nil {
		return err
	}
	owed = owed || bridge.Attrs().Alias == forwardingWasOff || strings.TrimSpace(string(was)) == "0"
	if owed {
		if err := netlink.LinkSetAlias(bridge, forwardingWasOff); err != nil {
			return err
		}
	}
	if err := f.writeRules(owed); err != nil {
		return fmt.Errorf("nf_tables: %w", err)
	}
	return os.WriteFile(forwardingFile, []byte("1"), 0)
}

// closeOutbound takes the way out back, after the bridge was removed. The caller
// holds the namespace's lock.
func (f *Fabric) closeOutbound(owed bool) error {
	rules, err := nftables.New()
	if err != nil {
		return err
	}
	// Added first, or else deleting what is not there would fail.
	rules.DelTable(rules.AddTable(f.table()))
	if err := rules.Flush(); err != nil {
		return fmt.Errorf("remove the rules of the nodes' network: %w", err)
	}
	if !owed {
		return nil
	}
	others, err := f.othersOwe()
	if err != nil || others {
		return err
	}
	return os.WriteFile(forwardingFile, []byte("0"), 0)
}

// othersOwe reports whether another fabric of this namespace found forwarding
// off.
func (f *Fabric) othersOwe() (bool, error) {
	links, err := complete(netlink.LinkList)
	if err != nil {
		return false, err
	}
	for _, link := range links {
		a := link.Attrs()
		if a.Name != f.bridge && strings.HasPrefix(a.Name, bridgePrefix) && a.Alias == forwardingWasOff {
			return true, nil
		}
	}
	return false, nil
}

// complete lists until nothing changed meanwhile: rtnetlink tells when a list is
// a mixture of before and after (NLM_F_DUMP_INTR, netlink(7)).
func complete[T any](list func() ([]T, error)) (all []T, err error) {
	for range 100 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

func (f *Fabric) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "dormouse-" + f.bridge}
}

// writeRules replaces the rules at once. With onlyOurs, nothing is forwarded but
// what is from or for a fabric. Where br_netfilter is loaded, what another bridge
// passes between its own ports comes by here, too, as if from that bridge to that
// bridge; it goes on.
func (f *Fabric) writeRules(onlyOurs bool) error {
	rules, err := nftables.New()
	if err != nil {
		return err
	}
	rules.DelTable(rules.AddTable(f.table()))
	table := rules.AddTable(f.table())
	sources := rules.AddChain(&nftables.Chain{Name: "sources", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	rules.AddRule(&nftables.Rule{Table: table, Chain: sources, Exprs: join(
		f.fromSubnet(), device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, f.bridge+"\x00"), []expr.Any{&expr.Masq{}})})
	passing := rules.AddChain(&nftables.Chain{Name: "passing", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	rules.AddRule(&nftables.Rule{Table: table, Chain: passing, Exprs: join(
		device(expr.MetaKeyIIFNAME, expr.CmpOpNeq, f.bridge+"\x00"), device(expr.MetaKeyOIFNAME, expr.CmpOpEq, f.bridge+"\x00"), noAnswer(), drop)})
	if onlyOurs {
		rules.AddRule(&nftables.Rule{Table: table, Chain: passing, Exprs: join(
			device(metaIIFKIND, expr.CmpOpEq, bridgeKind), device(metaOIFKIND, expr.CmpOpEq, bridgeKind), []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}})})
		rules.AddRule(&nftables.Rule{Table: table, Chain: passing, Exprs: join(
			device(expr.MetaKeyIIFNAME, expr.CmpOpNeq, bridgePrefix), device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, bridgePrefix), drop)})
	}
	return rules.Flush()
}

func join(parts ...[]expr.Any) (all []expr.Any) {
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

// device matches the name of the device a packet comes from or goes to, up to the
// length of name; with the zero byte at its end, all of it.
func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: []byte(name)}}
}

// fromSubnet matches packets that come from a node.
func (f *Fabric) fromSubnet() []expr.Any {
	const sourceOffset = 12 // RFC 791, 3.1
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: onSubnet(f.plan.Subnet.Addr()).Mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: f.plan.Subnet.Addr().AsSlice()},
	}
}

// noAnswer matches packets that belong to no connection that is known.
func noAnswer() []expr.Any {
	known := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: known, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
	}
}
