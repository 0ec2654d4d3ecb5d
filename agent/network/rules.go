package network

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A rule is written as parts, each a test or, last, what to do; nft(8) shows
// them again in its own words.
type parts []expr.Any

// rule appends a rule to a chain.
func rule(conn *nftables.Conn, chain *nftables.Chain, list ...parts) {
	var all []expr.Any
	for _, p := range list {
		all = append(all, p...)
	}
	conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: all})
}

// named compares a device's name, or, of one that ends in '-', its beginning.
func named(key expr.MetaKey, op expr.CmpOp, name string) parts {
	data := []byte(name)
	if name[len(name)-1] != '-' {
		data = make([]byte, unix.IFNAMSIZ)
		copy(data, name)
	}
	return parts{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

func from(name string) parts  { return named(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }
func to(name string) parts    { return named(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }
func notTo(name string) parts { return named(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name) }

// Offsets in the IPv4 header, RFC 791.
const (
	sourceAddress      = 12
	destinationAddress = 16
)

// inPrefix tests the address at an offset of the IPv4 header.
func inPrefix(offset uint32, op expr.CmpOp, prefix netip.Prefix) parts {
	network := prefix.Masked().Addr().As4()
	return parts{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: ipNet(prefix).Mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: network[:]},
	}
}

func sourceIn(prefix netip.Prefix) parts    { return inPrefix(sourceAddress, expr.CmpOpEq, prefix) }
func sourceNotIn(prefix netip.Prefix) parts { return inPrefix(sourceAddress, expr.CmpOpNeq, prefix) }
func destinationIn(prefix netip.Prefix) parts {
	return inPrefix(destinationAddress, expr.CmpOpEq, prefix)
}

// protocol numbers, RFC 1700.
var protocols = map[string]byte{"icmp": unix.IPPROTO_ICMP, "tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}

func protocol(name string) parts {
	return parts{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocols[name]}}}
}

func port(name string, number int) parts {
	return append(protocol(name),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(uint16(number))})
}

// toNode tests for addresses of the namespace itself.
func toNode() parts {
	return parts{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// tracked tests bits of what connection tracking says.
func tracked(key expr.CtKey, bits uint32) parts {
	return parts{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func answers() parts {
	return tracked(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}
func invalid() parts { return tracked(expr.CtKeySTATE, expr.CtStateBitINVALID) }

// redirected: IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
func redirected() parts { return tracked(expr.CtKeySTATUS, 1<<5) }

func accept() parts     { return parts{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() parts       { return parts{&expr.Verdict{Kind: expr.VerdictDrop}} }
func masquerade() parts { return parts{&expr.Masq{}} }
func untracked() parts  { return parts{&expr.Notrack{}} }

// redirect changes the destination.
func redirect(address netip.Addr, port int) parts {
	return parts{
		&expr.Immediate{Register: 1, Data: address.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(uint16(port))},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
	}
}

// clampMSS lowers the segment size that a TCP handshake announces to what the
// route's MTU carries: `tcp flags syn tcp option maxseg size set rt mtu`.
func clampMSS() parts {
	const flags, syn, optionMSS = 13, 0x02, 2
	return append(protocol("tcp"),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: optionMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	)
}
