package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Event is a point in CRIU's work at which it waits for the caller.
type Event string

// The events of a dump, in their order. During PostDump the tree is stopped;
// afterwards it runs on or is killed.
const (
	EventPreDump  Event = "pre-dump"
	EventPostDump Event = "post-dump"
)

// The events of a restore, in their order. Between PostRestore and PostResume
// all processes exist and none has run yet.
const (
	EventPreRestore          Event = "pre-restore"
	EventSetupNamespaces     Event = "setup-namespaces" // with the new init's pid
	EventPostSetupNamespaces Event = "post-setup-namespaces"
	EventPostRestore         Event = "post-restore" // with the new init's pid
	// TCP sockets leave repair mode right after EventNetworkUnlock: a distributed
	// restore waits here for the other nodes.
	EventNetworkUnlock   Event = "network-unlock"
	EventPreResume       Event = "pre-resume"
	EventPostResume      Event = "post-resume"
	EventOrphanPTSMaster Event = "orphan-pts-master"
)

// Notify is called at each event; pid is the tree's init where CRIU tells it,
// else 0. CRIU waits until it returns; an error makes the operation fail. CRIU
// knows more events than the constants here: return nil for those not known.
type Notify func(ctx context.Context, event Event, pid int) error

// swrkFD is the descriptor of the RPC socket in the criu child; further
// inherited files follow it.
const swrkFD = 3

// defaultGrace is how long a cancelled operation may take to undo itself.
const defaultGrace = 20 * time.Second

// session is one criu child process that serves one request.
type session struct {
	child *child
	sock  int
	grace time.Duration
	abort func(pid int)
	// answered is set once CRIU has given its final answer.
	answered *atomic.Bool
	kernel   *kernelFacts
	run      *os.File // CRIU's own /run, or nil
}

type sessionOptions struct {
	inherit []*os.File    // become descriptors swrkFD+1, ...
	grace   time.Duration // zero: defaultGrace
	// abort makes CRIU fail soon and in order; may be nil.
	abort func(pid int)
	// dying runs when CRIU is about to end without an answer, while it still
	// holds the processes it has stopped; see child.go. May be nil.
	dying func()
	// ownMounts lets CRIU have a mount namespace of its own, which must be no
	// process's that is dumped; session.show says what of ours it has to find there.
	// With it, netNS may be the network namespace that CRIU runs in.
	ownMounts bool
	netNS     *os.File
	cgroup    *os.File // that the process is born in, or nil
	tasks     []string // of v1 cgroups that it enters first
}

// start starts `criu swrk`. The caller must call session.call exactly once, or
// session.discard.
func (e *Engine) start(o sessionOptions) (*session, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	remote := os.NewFile(uintptr(pair[1]), "criu-rpc")
	defer remote.Close()

	// Not CommandContext: a cancelled context must not kill CRIU, see doc.go.
	// SIGXFSZ stays ignored across exec, for failLargeWrites; so does SIGPIPE, for
	// callers who read images through pipes and may die.
	// A process that writes 0 into the tasks of a v1 cgroup moves itself, cgroups(7).
	const script = `trap "" XFSZ PIPE; while [ "$1" != swrk ]; do echo 0 >"$1" || exit; shift; done; exec "$0" "$@"`
	cmd := exec.Command("/bin/sh", slices.Concat([]string{"-c", script, e.path}, o.tasks, []string{"swrk", strconv.Itoa(swrkFD)})...)
	cmd.Env = e.environ()
	cmd.Dir = "/"
	cmd.ExtraFiles = append([]*os.File{remote}, o.inherit...)
	// Its own process group: a terminal's ^C must not reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if o.cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(o.cgroup.Fd())
	}
	s := &session{sock: pair[0], grace: o.grace, abort: o.abort, answered: &atomic.Bool{}, kernel: e.kernel}
	if s.grace == 0 {
		s.grace = defaultGrace
	}
	var dying func()
	if o.dying != nil {
		dying = func() {
			if !s.answered.Load() {
				o.dying()
			}
		}
	}
	if o.ownMounts {
		s.child, s.run, err = e.kernel.start(cmd, dying, o.netNS, []string{cmd.Path, e.path, e.libexec})
	} else {
		s.child, err = startChild(cmd, dying)
	}
	if err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	return s, nil
}

// environ is CRIU's environment: nothing of ours but the helpers in PATH.
func (e *Engine) environ() []string {
	env := []string{
		"PATH=" + e.libexec + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/nonexistent", // no ~/.criu/default.conf
		"LC_ALL=C",
		// FI_NO_BREAKPOINTS (criu/include/fault-injection.h): CRIU finds the end of its
		// own code in other processes by their system calls and not by breakpoints, as
		// it does where there are none. To set the first one in a while takes the kernel
		// some 15 ms, in the pause of a dump, and each more about a millisecond.
		"CRIU_FAULT=130",
	}
	if e.shim != "" {
		env = append(env, "LD_PRELOAD="+e.shim)
	}
	return env
}

func (s *session) pid() int { return s.child.pid }

// show makes sure that CRIU sees these files of ours.
func (s *session) show(files []string) error {
	if s.run == nil {
		return nil // it has our mounts
	}
	return showMounts(s.pid(), files)
}

// discard ends a child to which nothing has been sent yet. It holds nothing, so it is
// killed: one that stands still in a frozen cgroup would not see the connection's end.
func (s *session) discard() {
	s.child.kill()
	s.child.close()
	unix.Close(s.sock)
	s.kernel.learn(s.run)
}

// message is one packet from CRIU, with a descriptor if it brought one.
type message struct {
	resp *rpc.CriuResp
	fd   *os.File
	err  error
}

// call sends the request, answers CRIU's notifications and returns its final
// answer. When it returns, CRIU has ended. The error is a transport error,
// ErrDied, a cancelled context's cause or the notify function's; an
// unsuccessful answer is no error here.
func (s *session) call(ctx context.Context, req *rpc.CriuReq, notify Notify) (*rpc.CriuResp, error) {
	messages := make(chan message)
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() { s.read(messages, stop) })
	reader.Go(func() {
		// A child of CRIU's may hold its end of the socket open longer.
		<-s.child.exited
		_ = unix.Shutdown(s.sock, unix.SHUT_RD)
	})
	defer func() {
		s.finish()
		close(stop)
		reader.Wait()
		unix.Close(s.sock)
	}()

	if err := s.send(req); err != nil {
		return nil, fmt.Errorf("send request: %w", err)
	}
	var failure error // the reason why notifications are refused
	cancelled := ctx.Done()
	var deadline <-chan time.Time
	for {
		select {
		case <-cancelled:
			cancelled = nil
			if failure == nil {
				failure = context.Cause(ctx)
			}
			if s.abort != nil {
				s.abort(s.pid())
			}
			timer := time.NewTimer(s.grace)
			defer timer.Stop()
			deadline = timer.C
		case <-deadline:
			// The last resort; read sees the end of the connection next.
			s.child.kill()
			deadline = nil
		case m := <-messages:
			if m.err != nil {
				return nil, errors.Join(failure, m.err)
			}
			if m.resp.GetType() != rpc.CriuReqType_NOTIFY {
				return m.resp, failure
			}
			if failure == nil {
				failure = notifyOnce(ctx, notify, m)
			}
			m.close()
			if err := s.answer(failure == nil); err != nil {
				return nil, errors.Join(failure, ErrDied)
			}
		}
	}
}

func (m message) close() {
	if m.fd != nil {
		m.fd.Close()
	}
}

func notifyOnce(ctx context.Context, notify Notify, m message) error {
	if notify == nil {
		return nil
	}
	event := Event(m.resp.GetNotify().GetScript())
	if err := notify(ctx, event, int(m.resp.GetNotify().GetPid())); err != nil {
		return fmt.Errorf("at %s: %w", event, err)
	}
	return nil
}

// answer tells CRIU to go on, or to fail.
func (s *session) answer(ok bool) error {
	kind := rpc.CriuReqType_NOTIFY
	return s.send(&rpc.CriuReq{Type: &kind, NotifySuccess: proto.Bool(ok)})
}

func (s *session) send(req *rpc.CriuReq) error {
	packet, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	return unix.Sendto(s.sock, packet, unix.MSG_NOSIGNAL, nil)
}

// read delivers CRIU's packets until its final answer or the connection's end.
func (s *session) read(out chan<- message, stop <-chan struct{}) {
	for {
		m := s.receive()
		if m.err == nil && m.resp.GetType() != rpc.CriuReqType_NOTIFY {
			s.answered.Store(true)
		}
		select {
		case out <- m:
		case <-stop:
			m.close()
			return
		}
		if m.err != nil || s.answered.Load() {
			return
		}
	}
}

// maxPacket is larger than any answer of CRIU's: the largest carries one line
// of the log.
const maxPacket = 64 << 10

func (s *session) receive() message {
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	for {
		var err error
		n, oobn, _, _, err = unix.Recvmsg(s.sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return message{err: fmt.Errorf("%w: %w", ErrDied, err)}
		}
	}
	if n == 0 {
		return message{err: ErrDied}
	}
	m := message{resp: &rpc.CriuResp{}, fd: passedFile(oob[:oobn])}
	if err := proto.Unmarshal(buf[:n], m.resp); err != nil {
		m.close()
		return message{err: fmt.Errorf("unreadable answer from CRIU: %w", err)}
	}
	return m
}

func passedFile(oob []byte) *os.File {
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(controls) == 0 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&controls[0])
	if err != nil || len(fds) == 0 {
		return nil
	}
	return os.NewFile(uintptr(fds[0]), "from-criu")
}

// finish waits for the child's end. The socket is shut down first, so that a
// CRIU which waits for us fails; one that still does not end is killed.
func (s *session) finish() {
	_ = unix.Shutdown(s.sock, unix.SHUT_RDWR)
	timer := time.AfterFunc(s.grace, s.child.kill)
	s.child.close()
	timer.Stop()
	s.kernel.learn(s.run)
}
