package network

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

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
	return n.holder.start(n.router, log, []string{m.options.Program, "network-holder", strconv.Itoa(mtu)}, m.node.file, listener)
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

// converse speaks WireGuard's configuration protocol with a holder
// (wireguard.com/xplatform) and returns the lines of its answer.
func (m *Manager) converse(ctx context.Context, key Key, request []string) ([]string, error) {
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

// settings writes a configuration in the protocol's words.
func settings(config wgtypes.Config) []string {
	lines := []string{"set=1"}
	if config.PrivateKey != nil {
		lines = append(lines, "private_key="+hex.EncodeToString(config.PrivateKey[:]))
	}
	if config.ListenPort != nil {
		lines = append(lines, "listen_port="+strconv.Itoa(*config.ListenPort))
	}
	for _, peer := range config.Peers {
		lines = append(lines, "public_key="+hex.EncodeToString(peer.PublicKey[:]))
		if peer.Remove {
			lines = append(lines, "remove=true")
			continue
		}
		if peer.UpdateOnly {
			lines = append(lines, "update_only=true")
		}
		if peer.Endpoint != nil {
			lines = append(lines, "endpoint="+peer.Endpoint.String())
		}
		if peer.PersistentKeepaliveInterval != nil {
			lines = append(lines, "persistent_keepalive_interval="+strconv.Itoa(int(peer.PersistentKeepaliveInterval.Seconds())))
		}
		if peer.ReplaceAllowedIPs {
			lines = append(lines, "replace_allowed_ips=true")
		}
		for _, allowed := range peer.AllowedIPs {
			lines = append(lines, "allowed_ip="+allowed.String())
		}
	}
	return lines
}

// parsePeers reads of each peer its key, keepalive and last handshake.
func parsePeers(lines []string) ([]wgtypes.Peer, error) {
	var peers []wgtypes.Peer
	for _, line := range lines {
		name, value, _ := strings.Cut(line, "=")
		if name == "public_key" {
			raw, err := hex.DecodeString(value)
			if err != nil || len(raw) != wgtypes.KeyLen {
				return nil, fmt.Errorf("the network's holder names a peer %q", value)
			}
			peers = append(peers, wgtypes.Peer{PublicKey: wgtypes.Key(raw)})
			continue
		}
		if len(peers) == 0 {
			continue // about the device
		}
		last := &peers[len(peers)-1]
		number, _ := strconv.ParseInt(value, 10, 64) // the rest are no numbers, and not wanted
		switch {
		case name == "persistent_keepalive_interval":
			last.PersistentKeepaliveInterval = time.Duration(number) * time.Second
		case name == "last_handshake_time_sec" && number > 0:
			last.LastHandshakeTime = time.Unix(number, 0)
		}
	}
	return peers, nil
}
