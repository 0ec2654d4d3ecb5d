package tcp

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"dormouse/agent/plugins"
	"dormouse/agent/plugins/plugintest"
	"dormouse/api"
	"dormouse/internal/child"
)

func TestConformance(t *testing.T) { plugintest.Run(t, newFixture) }

// Addresses of the conformance test: the task, another one of its job, and one
// outside. The last two are the test's.
const (
	taskAddress  = "10.9.0.1"
	otherAddress = "10.9.0.2"
	outside      = "192.0.2.9"
)

// program is the task's only process, in a network namespace of its own. It does
// what it is told (see runProgram).
type program struct {
	t      *testing.T
	cmd    *exec.Cmd
	orders io.WriteCloser
	said   *bufio.Reader
}

// asProgram makes the test binary the program of a task.
const asProgram = "DORMOUSE_TEST_TCP_PROGRAM"

// runProgram obeys lines: "echo ADDR" listens there, accepts one connection and sends back
// what comes; "dial ADDR" opens a connection; "hang-up" closes it; "pour ADDR" opens
// one, fills its queues and closes it.
func runProgram() error {
	orders := bufio.NewScanner(os.Stdin)
	var dialed net.Conn
	for orders.Scan() {
		order, address, _ := strings.Cut(orders.Text(), " ")
		var err error
		switch order {
		case "echo":
			err = echo(address)
		case "dial":
			dialed, err = net.Dial("tcp", address)
		case "pour":
			err = pour(address)
		case "hang-up":
			err = dialed.Close()
		}
		if err != nil {
			return err
		}
		fmt.Println("done")
	}
	return orders.Err()
}

func echo(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	go func() {
		if conn, err := listener.Accept(); err == nil {
			io.Copy(conn, conn)
		}
	}()
	return nil
}

func pour(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	_, err = stuff(conn)
	return errors.Join(err, conn.Close())
}

// stuff fills both queues of a connection, and returns what it has sent.
func stuff(conn net.Conn) (sent []byte, _ error) {
	block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	for {
		if err := conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return sent, err
		}
		n, err := conn.Write(block)
		sent = append(sent, block[:n]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
}

func startProgram(t *testing.T) *program {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	p := &program{t: t, cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), asProgram+"=1")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	p.cmd.Stderr = os.Stderr
	p.orders, err = p.cmd.StdinPipe()
	must(t, err)
	out, err := p.cmd.StdoutPipe()
	must(t, err)
	p.said = bufio.NewReader(out)
	must(t, child.Start(p.cmd, syscall.SIGKILL))
	t.Cleanup(p.end)
	return p
}

func (p *program) end() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

func (p *program) tell(order string) {
	p.t.Helper()
	_, err := fmt.Fprintln(p.orders, order)
	must(p.t, err)
	if said, err := p.said.ReadString('\n'); err != nil || said != "done\n" {
		p.t.Fatalf("the program answered %q, %v to %q", said, err, order)
	}
}

func (p *program) signal(s syscall.Signal, state string) {
	p.t.Helper()
	must(p.t, p.cmd.Process.Signal(s))
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		must(p.t, err)
		if _, rest, _ := strings.Cut(string(data), ") "); strings.ContainsAny(rest[:1], state) {
			return
		}
		if time.Now().After(limit) {
			p.t.Fatalf("the program is not in state %s after signal %v: %s", state, s, data)
		}
	}
}

// wire connects the program's network namespace with the test's, and returns
// the former.
func wire(t *testing.T, p *program) *os.File {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.cmd.Process.Pid))
	must(t, err)
	t.Cleanup(func() { file.Close() })
	here, err := netlink.NewHandle()
	must(t, err)
	t.Cleanup(here.Close)
	there, err := netlink.NewHandleAt(netns.NsHandle(file.Fd()))
	must(t, err)
	t.Cleanup(there.Close)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wire"}, PeerName: "wire", PeerNamespace: netlink.NsFd(int(file.Fd()))}
	must(t, here.LinkAdd(veth))
	t.Cleanup(func() { here.LinkDel(veth) })
	loopback, err := there.LinkByName("lo")
	must(t, err)
	must(t, there.LinkSetUp(loopback))
	for _, end := range []struct {
		links   *netlink.Handle
		address string
	}{{there, taskAddress}, {here, otherAddress}, {here, outside}} {
		link, err := end.links.LinkByName("wire")
		must(t, err)
		must(t, end.links.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(end.address), Mask: net.CIDRMask(24, 32)}}))
		must(t, end.links.LinkSetUp(link))
	}
	must(t, there.RouteAdd(&netlink.Route{Gw: net.ParseIP(otherAddress)}))
	return file
}

// newFixture is a task that sends back what another one of its job sends to it
// every millisecond.
func newFixture(t *testing.T) *plugintest.Fixture {
	t.Helper()
	needRoot(t)
	p := startProgram(t)
	ns := wire(t, p)
	p.tell("echo " + taskAddress + ":5000")
	conn, err := net.Dial("tcp", taskAddress+":5000")
	must(t, err)
	var echoed atomic.Int64
	must(t, conn.(*net.TCPConn).SetLinger(0)) // or the kernel would go on for a task that is gone
	t.Cleanup(func() { conn.Close() })
	go func() {
		for {
			if _, err := conn.Write([]byte("tick")); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	go func() {
		for buffer := make([]byte, 4096); ; {
			n, err := conn.Read(buffer)
			if err != nil {
				return
			}
			echoed.Add(int64(n))
		}
	}()
	return &plugintest.Fixture{
		Plugin: func() plugins.Plugin { return Plugin{} },
		Task: plugins.Task{
			Spec: &api.JobSpec{Tasks: 2}, Networks: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")},
			NetNS: ns, PIDs: []int{p.cmd.Process.Pid},
		},
		Progress: func() int { return int(echoed.Load()) },
		State:    func() string { return queues(t, p.cmd.Process.Pid) },
		Freeze:   func() { p.signal(unix.SIGSTOP, "T") },
		Thaw:     func() { p.signal(unix.SIGCONT, "SR") },
		Offend: func() ([]string, func()) {
			listener, err := net.Listen("tcp", outside+":0")
			must(t, err)
			t.Cleanup(func() { listener.Close() })
			p.tell("dial " + listener.Addr().String())
			says := []string{"from " + taskAddress + ":", "to " + listener.Addr().String(), "descriptor", fmt.Sprintf("process %d (", p.cmd.Process.Pid)}
			return says, func() { p.tell("hang-up") }
		},
		End: p.end,
	}
}

// queues are addresses, state and queues of all TCP sockets of a process's
// network namespace (proc(5), /proc/net/tcp).
func queues(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	must(t, err)
	var all []string
	for line := range strings.Lines(string(data)) {
		all = append(all, strings.Join(strings.Fields(line)[1:5], " "))
	}
	return strings.Join(all, "\n")
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	const why = "this test needs root: it makes network namespaces and ends connections in them"
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func isEnded(err error) bool {
	return errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ECONNRESET)
}
