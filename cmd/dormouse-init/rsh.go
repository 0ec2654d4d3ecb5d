package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// rshFailed is ssh's exit status for its own failures.
const rshFailed = 255

// patience is how long dormouse-rsh tries to reach a task: the tasks of a job do
// not start at the same instant.
const patience = time.Minute

// remoteShell is dormouse-rsh: it runs a command in another task of the job and
// returns its exit status. It takes a command line as ssh does.
func remoteShell(args []string) int {
	beCapturable(pid1.RemoteShell)
	code, err := runRemote(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", pid1.RemoteShell, err)
		return rshFailed
	}
	return code
}

// beCapturable executes this program again unless it runs without what another
// node's processor may lack: it may live for as long as what it has started.
func beCapturable(name string) {
	if os.Getenv("GODEBUG") == plainCPU {
		return
	}
	if err := os.Setenv("GODEBUG", plainCPU); err != nil {
		return
	}
	// Outside of a sandbox there is no such file, and no checkpoint.
	_ = unix.Exec(inside(pid1.BinDir)+"/"+name, os.Args, os.Environ())
}

func runRemote(args []string) (int, error) {
	call, err := parseShell(args[1:])
	if err != nil {
		return 0, err
	}
	address, err := lookupHost(call.host, "/etc/hosts")
	if err != nil {
		return 0, err
	}
	secret, err := os.ReadFile(inside(pid1.SecretFile))
	if err != nil {
		return 0, fmt.Errorf("remote starts are for the user of a job with several tasks: %w", err)
	}
	link, err := connectRemote(netip.AddrPortFrom(address, pid1.RemotePort), call, secret)
	if err != nil {
		return 0, fmt.Errorf("cannot start a process in %s: %w", call.host, err)
	}
	defer link.file.Close()
	r := newRelay(link)
	code, err := r.converse(call.noInput)
	if err != nil {
		return 0, fmt.Errorf("the process in %s: %w", call.host, err)
	}
	return code, nil
}

// shellCall is a command line of ssh(1), as far as it means something here.
type shellCall struct {
	host, user string
	noInput    bool
	timeout    time.Duration
	command    string
}

// The options of ssh(1). Those about how ssh itself connects are taken and
// ignored, as launchers pass them by habit; those that ask for what a remote
// start does not offer are refused.
const (
	shellFlags   = "46ACKMTXYaknqvxy"
	shellValues  = "BEFIPbceimop"
	shellRefused = "DGJLNOQRSVWfgstw"
)

// parseShell understands [OPTION...] [USER@]HOST [OPTION...] COMMAND...
func parseShell(args []string) (*shellCall, error) {
	call := &shellCall{timeout: patience}
	for len(args) > 0 {
		switch arg := args[0]; {
		case arg == "--":
			args = args[1:]
			if call.host != "" || len(args) == 0 {
				return call, call.finish(args)
			}
			call.setHost(args[0])
			return call, call.finish(args[1:])
		case strings.HasPrefix(arg, "-") && arg != "-":
			rest, err := call.options(arg[1:], args[1:])
			if err != nil {
				return nil, err
			}
			args = rest
		case call.host == "":
			call.setHost(arg)
			args = args[1:]
		default:
			return call, call.finish(args)
		}
	}
	return call, call.finish(nil)
}

func (c *shellCall) setHost(arg string) {
	// As in ssh, an option decides over what stands before the host.
	if user, host, ok := cutLast(arg, "@"); ok {
		if arg = host; c.user == "" {
			c.user = user
		}
	}
	c.host = arg
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func (c *shellCall) finish(command []string) error {
	if c.host == "" {
		return errors.New("usage: dormouse-rsh [-n] [-l USER] [-o ConnectTimeout=SECONDS] [USER@]HOST COMMAND [ARG...]; HOST is another task of the job, such as task-1")
	}
	c.command = strings.Join(command, " ")
	return (&pid1.RemoteRequest{Command: []byte(c.command)}).Check()
}

// options takes one argument of options, and the values that follow it.
func (c *shellCall) options(letters string, rest []string) ([]string, error) {
	for i, letter := range letters {
		switch {
		case strings.ContainsRune(shellFlags, letter):
			c.noInput = c.noInput || letter == 'n'
		case letter == 'l' || strings.ContainsRune(shellValues, letter):
			value := letters[i+1:]
			if value == "" {
				if len(rest) == 0 {
					return nil, fmt.Errorf("the option -%c needs a value", letter)
				}
				value, rest = rest[0], rest[1:]
			}
			return rest, c.option(letter, value)
		case strings.ContainsRune(shellRefused, letter):
			return nil, fmt.Errorf("the option -%c asks for what a remote start does not offer: it runs a command without a terminal and waits for its end", letter)
		default:
			return nil, fmt.Errorf("the option -%c is none of ssh's", letter)
		}
	}
	return rest, nil
}

func (c *shellCall) option(letter rune, value string) error {
	switch letter {
	case 'l':
		c.user = value
	case 'o':
		key, text, ok := strings.Cut(value, "=")
		if !ok {
			key, text, _ = strings.Cut(value, " ")
		}
		if !strings.EqualFold(strings.TrimSpace(key), "ConnectTimeout") {
			return nil
		}
		seconds, err := strconv.ParseUint(strings.TrimSpace(text), 10, 20)
		if err != nil || seconds == 0 {
			return fmt.Errorf("ConnectTimeout is a number of seconds, not %q", text)
		}
		c.timeout = time.Duration(seconds) * time.Second
	}
	return nil
}

// lookupHost finds the address of a task. A task's own names mean its address
// on the job's network, because that is where its pid 1 listens.
func lookupHost(host, hosts string) (netip.Addr, error) {
	address, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err != nil {
		if address, err = hostIn(hosts, host); err != nil {
			return address, err
		}
	}
	if !address.IsLoopback() {
		return address, nil
	}
	own, err := os.Hostname()
	if err != nil {
		return address, fmt.Errorf("cannot tell this task's name: %w", err)
	}
	return hostIn(hosts, own)
}

// hostIn reads hosts(5).
func hostIn(file, host string) (netip.Addr, error) {
	hosts, err := os.Open(file)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("cannot look up %s: %w", host, err)
	}
	defer hosts.Close()
	lines := bufio.NewScanner(hosts)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		for i, name := range fields {
			if i == 0 || !strings.EqualFold(name, host) {
				continue
			}
			if address, err := netip.ParseAddr(fields[0]); err == nil {
				return address, nil
			}
		}
	}
	if err := lines.Err(); err != nil {
		return netip.Addr{}, fmt.Errorf("cannot look up %s: %w", host, err)
	}
	return netip.Addr{}, fmt.Errorf("%s is no task of this job: %s does not name it", host, file)
}

// errTryAgain marks what may be better in an instant.
var errTryAgain = errors.New("not ready")

// connectRemote connects, shows that it belongs to the job, and asks for the
// process. It tries for as long as the call allows.
func connectRemote(at netip.AddrPort, call *shellCall, secret []byte) (*conn, error) {
	pause := 20 * time.Millisecond
	for deadline := time.Now().Add(call.timeout); ; {
		link, err := tryRemote(at, call, secret, deadline)
		if err == nil {
			return link, nil
		}
		if !errors.Is(err, errTryAgain) || time.Now().Add(pause).After(deadline) {
			return nil, err
		}
		time.Sleep(pause)
		pause = min(pause*2, time.Second)
	}
}

func tryRemote(at netip.AddrPort, call *shellCall, secret []byte, deadline time.Time) (*conn, error) {
	link, err := dialTCP(at, deadline)
	if err != nil {
		return nil, err
	}
	err = request(link, call, secret, deadline)
	if err != nil {
		return nil, errors.Join(err, link.file.Close())
	}
	return link, nil
}

// dialTCP connects without blocking the thread, so that the deadline holds.
func dialTCP(at netip.AddrPort, deadline time.Time) (*conn, error) {
	address, family := socketAddress(at)
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make a socket: %w", err)
	}
	err = syscall.Connect(fd, address)
	link := &conn{file: os.NewFile(uintptr(fd), at.String()), limit: pid1.MaxFrame}
	if err == nil || err == syscall.EINPROGRESS {
		err = link.connected(deadline)
	}
	if err != nil {
		// The other task's pid 1 may not be there yet, nor the way to it.
		return nil, errors.Join(fmt.Errorf("%w: cannot connect to %s: %v", errTryAgain, at, err), link.file.Close())
	}
	link.noDelay()
	return link, nil
}

// connected waits for the outcome of connect(2).
func (c *conn) connected(deadline time.Time) error {
	if err := c.file.SetDeadline(deadline); err != nil {
		return err
	}
	raw, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(poll, 0); err == nil && n == 0 {
			return false
		}
		var number int
		if number, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); failed == nil && number != 0 {
			failed = syscall.Errno(number)
		}
		return true
	})
	return errors.Join(err, failed)
}

// request goes through the beginning of a connection.
func request(link *conn, call *shellCall, secret []byte, deadline time.Time) error {
	if err := link.file.SetDeadline(deadline); err != nil {
		return err
	}
	challenge, err := link.want(pid1.FrameChallenge)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("%w: it hung up at once", errTryAgain) // it is busy with others
	}
	if err == nil {
		err = link.send(pid1.FrameProof, pid1.Proof(secret, challenge))
	}
	if err == nil {
		err = link.sendJSON(pid1.FrameRequest, pid1.RemoteRequest{Command: []byte(call.command), User: call.user})
	}
	if err == nil {
		err = answered(link)
	}
	if err != nil {
		return err
	}
	return link.file.SetDeadline(time.Time{})
}

// answered reads whether a request was granted.
func answered(link *conn) error {
	kind, payload, err := link.read()
	switch {
	case err != nil:
		return fmt.Errorf("there was no answer: %w", err)
	case kind == pid1.FrameFailure:
		return failureIn(payload)
	case kind != pid1.FrameOK:
		return fmt.Errorf("it was answered with frame %d", kind)
	}
	return nil
}

func failureIn(payload []byte) error {
	var f pid1.Failure
	if err := json.Unmarshal(payload, &f); err != nil {
		return fmt.Errorf("a failure was reported that cannot be read: %w", err)
	}
	return &f
}

// relay is the near end of a session: it carries this process's input, output
// and signals.
type relay struct {
	link *conn

	mu             sync.Mutex
	acknowledged   *sync.Cond
	sent, consumed uint64 // bytes of input
}

func newRelay(link *conn) *relay {
	r := &relay{link: link}
	r.acknowledged = sync.NewCond(&r.mu)
	return r
}

// converse relays until the process has ended, and returns its exit status. What
// it leaves running ends with this program.
func (r *relay) converse(noInput bool) (int, error) {
	signals := make(chan os.Signal, 16)
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2} {
		if !signal.Ignored(s) { // as nohup and a shell's background do
			signal.Notify(signals, s)
		}
	}
	go func() {
		for s := range signals {
			_ = r.link.send(pid1.FrameSignal, []byte{byte(s.(syscall.Signal))})
		}
	}()
	if noInput {
		if err := r.link.send(pid1.FrameStdin, nil); err != nil {
			return 0, fmt.Errorf("the connection was lost: %w", err)
		}
	} else {
		go r.sendInput(os.Stdin)
	}
	for {
		kind, payload, err := r.link.read()
		if err != nil {
			return 0, fmt.Errorf("the connection was lost: %w", err)
		}
		switch kind {
		case pid1.FrameStdout:
			_, _ = os.Stdout.Write(payload) // a reader that went away ends this program by SIGPIPE
		case pid1.FrameStderr:
			_, _ = os.Stderr.Write(payload)
		case pid1.FrameAck:
			r.acknowledge(payload)
		case pid1.FrameFailure:
			return 0, failureIn(payload)
		case pid1.FrameExit:
			var exit pid1.Exit
			if err := json.Unmarshal(payload, &exit); err != nil {
				return 0, fmt.Errorf("its exit status cannot be read: %w", err)
			}
			return exit.Code, nil
		}
	}
}

func (r *relay) acknowledge(payload []byte) {
	if len(payload) != 8 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.consumed = binary.BigEndian.Uint64(payload)
	r.acknowledged.Broadcast()
}

// sendInput sends what comes, no further ahead of the process than pid1.Window.
func (r *relay) sendInput(input io.Reader) {
	buffer := make([]byte, 16<<10)
	for {
		n, err := input.Read(buffer)
		if n > 0 {
			r.mu.Lock()
			for r.sent+uint64(n) > r.consumed+pid1.Window {
				r.acknowledged.Wait()
			}
			r.sent += uint64(n)
			r.mu.Unlock()
			if r.link.send(pid1.FrameStdin, buffer[:n]) != nil {
				return
			}
		}
		if err != nil {
			// However the input ended, the process sees its end.
			_ = r.link.send(pid1.FrameStdin, nil)
			return
		}
	}
}
