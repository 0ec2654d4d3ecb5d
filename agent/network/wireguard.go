package network

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The UDP ports of WireGuard tunnels: the network in slot N has firstPort+N,
// or the next one that is free.
const (
	firstPort = 51820
	portCount = 8192
)

// keepalive makes both ends of a tunnel shake hands as soon as both are
// connected, so that no task's packet waits for it, and keeps a NAT in between
// from forgetting: wg(8), PersistentKeepalive.
const keepalive = 25 * time.Second

// freePort finds a UDP port of the node for the tunnel of a slot.
func (m *Manager) freePort(slot int) (uint16, error) {
	for i := range portCount {
		port := firstPort + (slot+i)%portCount
		err := within(m.node.file, func() error { return bindOnce("udp", port) })
		if err == nil {
			return uint16(port), nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("find a UDP port for the tunnel: %w", err)
		}
	}
	return 0, fmt.Errorf("no UDP port from %d to %d is free for the tunnel", firstPort, firstPort+portCount-1)
}

// hosts are prefixes of one address each: what a peer may send from and be
// sent to.
func hosts(addresses []netip.Addr) []netip.Prefix {
	list := make([]netip.Prefix, 0, len(addresses))
	for _, a := range addresses {
		list = append(list, netip.PrefixFrom(a, a.BitLen()))
	}
	return list
}

// connectWireGuard makes the tunnel know exactly these peers. Sessions with
// peers that stay are kept.
func (m *Manager) connectWireGuard(ctx context.Context, n *network, peers []Peer) error {
	for _, peer := range peers {
		if len(peer.Endpoint.PublicKey) != wgtypes.KeyLen || !peer.Endpoint.Address.IsValid() {
			return fmt.Errorf("node %s gave no key or no address for its tunnel: prepare the network there first", peer.Node)
		}
	}
	if n.Tunnel == tunnelKernel {
		return n.connectKernel(peers)
	}
	return m.connectUserspace(ctx, n, peers)
}

// tunDevice is what a userspace tunnel is made of.
const tunDevice = "/dev/net/tun"

// controlSocket is where a holder listens, in the network's directory.
const controlSocket = "wireguard.sock"

// startUserspace starts a holder that runs the tunnel. It inherits the node's
// namespace, for its UDP socket, and the socket it is configured through.
func (m *Manager) startUserspace(ctx context.Context, n *network, log string) error {
	mtu, err := m.tunnelMTU(wireguardOverhead)
	if err != nil {
		return err
	}
	listener, err := m.listenControl(ctx, n.Key)
	if err != nil {
		return err
	}
	defer listener.Close()
	return n.holder.start(log, []string{m.options.Program, "network-holder", strconv.Itoa(mtu)}, m.node.file, listener)
}

// listenControl makes the control socket. Its path goes through a descriptor,
// as that of a socket may have 107 bytes only: unix(7).
func (m *Manager) listenControl(ctx context.Context, key Key) (*os.File, error) {
	dir, err := os.Open(m.directory(key))
	if err != nil {
		return nil, fmt.Errorf("make the holder's control socket: %w", err)
	}
	defer dir.Close()
	if err := os.Remove(filepath.Join(m.directory(key), controlSocket)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make the holder's control socket: %w", err)
	}
	listening := net.ListenConfig{}
	listener, err := listening.Listen(ctx, "unix", throughDescriptor(dir))
	if err != nil {
		return nil, fmt.Errorf("make the holder's control socket: %w", err)
	}
	defer listener.Close()
	unixListener := listener.(*net.UnixListener)
	unixListener.SetUnlinkOnClose(false) // the holder goes on listening
	return unixListener.File()
}

func throughDescriptor(dir *os.File) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), controlSocket)
}

// buildUserspace gives the holder its key and port.
func (m *Manager) buildUserspace(ctx context.Context, n *network) error {
	port, err := m.freePort(n.Slot)
	if err != nil {
		return err
	}
	_, err = m.configure(ctx, n.Key, "set=1", "private_key="+hex.EncodeToString(n.PrivateKey), "listen_port="+strconv.Itoa(int(port)))
	if err != nil {
		return fmt.Errorf("set the tunnel up: %w", err)
	}
	n.Port = port
	return nil
}

func (m *Manager) connectUserspace(ctx context.Context, n *network, peers []Peer) error {
	present, err := m.configure(ctx, n.Key, "get=1")
	if err != nil {
		return fmt.Errorf("ask the tunnel for its peers: %w", err)
	}
	wanted := map[string]bool{}
	for _, peer := range peers {
		wanted[hex.EncodeToString(peer.Endpoint.PublicKey)] = true
	}
	request := []string{"set=1"}
	for _, line := range present {
		if key, ok := strings.CutPrefix(line, "public_key="); ok && !wanted[key] {
			request = append(request, line, "remove=true")
		}
	}
	for _, peer := range peers {
		request = append(request,
			"public_key="+hex.EncodeToString(peer.Endpoint.PublicKey),
			"endpoint="+peer.Endpoint.Address.String(),
			"persistent_keepalive_interval="+strconv.Itoa(int(keepalive.Seconds())),
			"replace_allowed_ips=true")
		for _, host := range hosts(peer.Addresses) {
			request = append(request, "allowed_ip="+host.String())
		}
	}
	if _, err := m.configure(ctx, n.Key, request...); err != nil {
		return fmt.Errorf("tell the tunnel its peers: %w", err)
	}
	return nil
}

// configure speaks WireGuard's configuration protocol with a holder
// (wireguard.com/xplatform) and returns the lines of its answer.
func (m *Manager) configure(ctx context.Context, key Key, request ...string) ([]string, error) {
	conn, err := m.dialControl(ctx, key)
	if err != nil {
		return nil, m.holderError(ctx, key, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write([]byte(strings.Join(request, "\n") + "\n\n")); err != nil {
		return nil, m.holderError(ctx, key, err)
	}
	var answer []string
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		line := lines.Text()
		if code, ok := strings.CutPrefix(line, "errno="); ok {
			return answer, configureError(code)
		}
		answer = append(answer, line)
	}
	return nil, m.holderError(ctx, key, lines.Err())
}

func (m *Manager) dialControl(ctx context.Context, key Key) (net.Conn, error) {
	dir, err := os.Open(m.directory(key))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	dialer := net.Dialer{}
	return dialer.DialContext(ctx, "unix", throughDescriptor(dir))
}

// configureError: errors come as negative numbers of errno(3).
func configureError(code string) error {
	number, err := strconv.Atoi(code)
	if err != nil {
		return fmt.Errorf("the network's holder answers %q", code)
	}
	if number == 0 {
		return nil
	}
	return unix.Errno(max(number, -number))
}

// holderError explains a conversation that broke off, by what the holder said
// last.
func (m *Manager) holderError(ctx context.Context, key Key, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	said, _ := os.ReadFile(filepath.Join(m.directory(key), "holder.log"))
	if last := strings.TrimSpace(string(said)); last != "" {
		return fmt.Errorf("the network's holder ended: %s", last)
	}
	if err != nil {
		return fmt.Errorf("the network's holder does not answer: %w", err)
	}
	return errors.New("the network's holder ended without an answer")
}
