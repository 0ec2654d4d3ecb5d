package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"dormouse/internal/emptyroot"
)

// Descriptors that a holder inherits: see startUserspace.
const (
	holderNode    = 3
	holderControl = 4
)

// RunHolder is the process that runs a job's WireGuard tunnel where the kernel
// cannot: `dormouse network-holder MTU`. It was started in the router's
// namespace, makes tun0 there, and takes its configuration from the socket it
// inherited until it is killed. It returns only when it cannot go on.
func RunHolder(args []string) error {
	if len(args) != 1 {
		return errors.New("network-holder is started by the dormouse agent; it is of no use by hand")
	}
	mtu, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("network-holder: %q is no MTU", args[0])
	}
	unix.CloseOnExec(holderNode)
	listener, err := net.FileListener(os.NewFile(holderControl, "control"))
	if err != nil {
		return fmt.Errorf("network-holder: no control socket: %w", err)
	}
	defer listener.Close()
	made, err := tun.CreateTUN(tunnelName, mtu)
	if err != nil {
		return fmt.Errorf("network-holder: make the TUN device: %w", err)
	}
	if err := emptyroot.Enter(); err != nil {
		return fmt.Errorf("network-holder: let go of the mounts: %w", err)
	}
	bind := &nodeBind{Bind: conn.NewStdNetBind(), node: os.NewFile(holderNode, "node")}
	tunnel := device.NewDevice(made, bind, device.NewLogger(device.LogLevelSilent, ""))
	defer tunnel.Close()
	if err := tunnel.Up(); err != nil {
		return fmt.Errorf("network-holder: start WireGuard: %w", err)
	}
	go func() {
		<-tunnel.Wait() // the device was removed from under it
		listener.Close()
	}()
	for {
		connection, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("network-holder: the tunnel ended: %w", err)
		}
		go tunnel.IpcHandle(connection) // ends with the connection
	}
}

// nodeBind is WireGuard's own way to send and receive, but with sockets of the
// node's namespace.
type nodeBind struct {
	conn.Bind
	node *os.File
}

// Open makes the sockets on a thread of the node's namespace: a socket belongs to
// the namespace of the thread that made it, for ever.
func (b *nodeBind) Open(port uint16) (receivers []conn.ReceiveFunc, actual uint16, err error) {
	err = within(b.node, func() (err error) {
		receivers, actual, err = b.Bind.Open(port)
		return err
	})
	return receivers, actual, err
}
