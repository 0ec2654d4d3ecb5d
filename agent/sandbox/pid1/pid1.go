// Package pid1 is what the agent and a sandbox's pid 1 (cmd/dormouse-init) say
// to each other: the files both know, the set-up that the agent hands over at
// birth, and the frames of the control connection. It holds no behaviour beyond
// reading and writing frames, and imports little, because all of it travels
// inside every sandbox.
//
// Birth. The agent starts `dormouse-init setup` in new namespaces with three
// descriptors: SetupFD gives a Setup as JSON, StatusFD takes one Report as JSON,
// NetNSFD is the network namespace to enter. The stage `setup` builds the
// sandbox and replaces itself by `/.dormouse/init run`, which runs the command
// and then answers on StatusFD. End of file without a Report means that it died.
//
// Control. Stage `run` listens on the unix socket ControlSocket. A connection
// carries one request and its answer, in frames of one type byte, a big-endian
// 32-bit length and that many bytes. Everything but exec and attach ends with
// the answer. See FrameType for what an exec session exchanges, and Quiesce
// there for how a session outlives its connection.
//
// The programs inside speak to a pid 1 in the same frames: dormouse-ctl on the
// unix socket AppSocket (see app.go), dormouse-rsh over TCP to the pid 1 of
// another task of the job (see remote.go).
package pid1

import (
	"encoding/binary"
	"fmt"
	"io"
	"syscall"
)

// Descriptors of the stage `setup`.
const (
	SetupFD  = 3
	StatusFD = 4
	NetNSFD  = 5
)

// Directory holds pid 1's own files inside the sandbox. It lies on the root, so
// it is in the overlay's upper layer and travels with every checkpoint.
const Directory = "/.dormouse"

// Files in Directory.
const (
	InitFile      = "init"        // the binary of pid 1
	RunFile       = "run.json"    // a Run
	StdoutFile    = "stdout"      // the command's output, append-only
	StderrFile    = "stderr"      // the command's errors, append-only
	InitLogFile   = "init.log"    // what pid 1 itself complains about
	ControlSocket = "ctl.sock"    // where pid 1 listens
	ExitFile      = "exit.json"   // an Exit; there from the command's end on
	EmptyDir      = "empty"       // covers what a sandbox must not see
	BinDir        = "bin"         // programs for the task, at the end of its PATH
	AppSocket     = "app.sock"    // where pid 1 listens to programs of the task
	ControlFifo   = "control"     // the same for programs that only write files
	ControlLog    = "control.log" // answers to what was written to ControlFifo, a JSON document a line
	ProgressFile  = "progress"    // how far the task says it has come, a number in the last line
	SecretFile    = "secret"      // what proves that two processes are of one job

	// Host files, for Open MPI and for MPICH's Hydra.
	OpenMPIHosts = "hosts.openmpi"
	HydraHosts   = "hosts.hydra"
)

// Programs in BinDir: links to pid 1's binary, which looks at its own name.
const (
	RemoteShell = "dormouse-rsh"
	Controller  = "dormouse-ctl"
)

// Setup is everything the stage `setup` needs to know.
type Setup struct {
	Hostname string `json:"hostname"`
	// Target is the directory on which the root is mounted, with the overlay
	// options of Overlay.
	Target  string   `json:"target"`
	Overlay string   `json:"overlay"`
	Volumes []Volume `json:"volumes,omitempty"`
	// Hosts and ResolvConf are the contents of /etc/hosts and /etc/resolv.conf.
	Hosts      string `json:"hosts"`
	ResolvConf string `json:"resolv_conf"`
	TmpBytes   int64  `json:"tmp_bytes,omitempty"`

	// Command is empty when the task has none of its own: then pid 1 serves
	// remote starts until it is killed.
	Command []string `json:"command,omitempty"`
	// Env is complete but for the defaults that depend on the user; RootEnv are
	// such defaults for root.
	Env     []string `json:"env"`
	RootEnv []string `json:"root_env,omitempty"`
	WorkDir string   `json:"work_dir,omitempty"`
	// MakeWorkDir is set when the working directory is an image's wish.
	MakeWorkDir bool   `json:"make_work_dir,omitempty"`
	User        string `json:"user,omitempty"`
	// Capabilities is the bounding set; Ambient are those of them that a
	// command of an ordinary user keeps as well.
	Capabilities []int `json:"capabilities"`
	Ambient      []int `json:"ambient,omitempty"`

	// Remote is the address to serve remote starts on, which those who know
	// Secret may ask for. Empty: they are not served.
	Remote string `json:"remote,omitempty"`
	Secret []byte `json:"secret,omitempty"`
	JobRun int64  `json:"job_run,omitempty"`
}

// Volume is a directory or file of the node, bound into the sandbox.
type Volume struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// Run is how the command and what is exec'ed beside it are started.
type Run struct {
	Command []string `json:"command"`
	Path    string   `json:"path"` // of the command's file
	Env     []string `json:"env"`
	WorkDir string   `json:"work_dir"`
	UID     uint32   `json:"uid"`
	GID     uint32   `json:"gid"`
	Groups  []uint32 `json:"groups"`
	Ambient []int    `json:"ambient,omitempty"`
	// Volumes are where the volumes came to lie, links resolved.
	Volumes []string `json:"volumes,omitempty"`
	User    string   `json:"user,omitempty"`    // UID's name, if it has one
	Remote  string   `json:"remote,omitempty"`  // as in Setup
	JobRun  int64    `json:"job_run,omitempty"` // which of the job's starts and restores this is
}

// Kind classifies a failure for the agent.
type Kind string

// The kinds. A KindRequest is the user's mistake.
const (
	KindBroken   Kind = "broken"
	KindRequest  Kind = "request"
	KindNotFound Kind = "not_found"
)

// Failure is an error that crosses from pid 1 to the agent.
type Failure struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
}

func (f *Failure) Error() string { return f.Message }

// Refuse makes a Failure that is the user's mistake.
func Refuse(format string, args ...any) error {
	return &Failure{Kind: KindRequest, Message: fmt.Sprintf(format, args...)}
}

// NotFound makes a Failure for a command that is not there.
func NotFound(format string, args ...any) error {
	return &Failure{Kind: KindNotFound, Message: fmt.Sprintf(format, args...)}
}

// Report is the outcome of a birth.
type Report struct {
	Failure *Failure `json:"failure,omitempty"`
	Volumes []string `json:"volumes,omitempty"` // as in Run
}

// Exit is how the command ended.
type Exit struct {
	Code   int            `json:"code"` // 128+signal when a signal ended it
	Signal syscall.Signal `json:"signal,omitempty"`
}

// ExitOf translates what wait4(2) says.
func ExitOf(status syscall.WaitStatus) Exit {
	if status.Signaled() {
		return Exit{Code: 128 + int(status.Signal()), Signal: status.Signal()}
	}
	return Exit{Code: status.ExitStatus()}
}

// FrameType says what a frame carries.
type FrameType byte

// The frames. A session is the exec'ed process with its pipes or terminal; it
// belongs to pid 1 and outlives connections that end by Quiesce.
const (
	FrameRequest   FrameType = iota // agent: a Request, first on every connection
	FrameStdin                      // agent: input; empty is its end
	FrameStdout                     // pid 1
	FrameStderr                     // pid 1
	FrameExit                       // pid 1: an Exit; the last of a session
	FrameResize                     // agent: rows and columns, 16 bits each
	FrameFailure                    // pid 1: a Failure; the last
	FrameAck                        // pid 1: 64 bits, how much input the process has been given in all
	FrameQuiesce                    // agent: its last frame; pid 1 sends what it has read and answers Detached
	FrameDetached                   // pid 1: its last frame; the session waits for Attach
	FrameOK                         // pid 1: the request was done; an OK
	FrameSignal                     // dormouse-rsh: one byte, a signal for the process group
	FrameApp                        // pid 1: an AppRequest, on a connection that listens
	FrameChallenge                  // pid 1: random bytes, first on a connection by TCP
	FrameProof                      // dormouse-rsh: Proof of the challenge
	FrameKill                       // agent: kill the process of a Whole session, and all it started
)

// Window is how many bytes of input the agent may send beyond the last Ack, so
// that pid 1 can always take what comes and reach the Quiesce behind it.
const Window = 64 << 10

// MaxFrame bounds a frame's length.
const MaxFrame = 1 << 20

// Op names a request.
type Op string

// The requests.
const (
	OpExec   Op = "exec"   // start a process; the connection becomes its session
	OpAttach Op = "attach" // go on with session Session
	OpKeep   Op = "keep"   // hang up all detached sessions but Sessions
	OpSignal Op = "signal" // send Signal to the command
	OpQuiet  Op = "quiet"  // answer when this is the only connection left

	OpListen   Op = "listen"   // send a FrameApp for each AppRequest that is not answered yet, until FrameQuiesce
	OpAnswer   Op = "answer"   // end the AppRequest named ID with Outcome
	OpRestored Op = "restored" // this is a copy, restored as run JobRun from Outcome.Checkpoint
)

// Request is the first frame of a connection.
type Request struct {
	Op       Op             `json:"op"`
	Signal   syscall.Signal `json:"signal,omitempty"`
	Session  uint64         `json:"session,omitempty"`
	Sessions []uint64       `json:"sessions,omitempty"`
	Command  []string       `json:"command,omitempty"`
	Env      []string       `json:"env,omitempty"` // added to the command's
	TTY      bool           `json:"tty,omitempty"`
	// Whole: at the end of the process, or of a connection that does not end by
	// Quiesce, all that it started is killed, but for what began a session of its own.
	Whole   bool     `json:"whole,omitempty"`
	Rows    uint16   `json:"rows,omitempty"`
	Cols    uint16   `json:"cols,omitempty"`
	ID      string   `json:"id,omitempty"`
	JobRun  int64    `json:"job_run,omitempty"`
	Outcome *Outcome `json:"outcome,omitempty"`
}

// OK answers a request that was done.
type OK struct {
	Session uint64 `json:"session,omitempty"`
}

// WriteFrame writes one frame with a single Write.
func WriteFrame(w io.Writer, kind FrameType, payload []byte) error {
	frame := make([]byte, 5+len(payload))
	frame[0] = byte(kind)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	copy(frame[5:], payload)
	_, err := w.Write(frame)
	return err
}

// ReadFrame reads one frame. It returns io.EOF only between frames.
func ReadFrame(r io.Reader) (FrameType, []byte, error) { return ReadFrameMax(r, MaxFrame) }

// ReadFrameMax is ReadFrame with a bound of its own, in bytes.
func ReadFrameMax(r io.Reader, limit uint32) (FrameType, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(head[1:])
	if size > limit {
		return 0, nil, fmt.Errorf("a frame of %d bytes is longer than the %d allowed", size, limit)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return FrameType(head[0]), payload, nil
}
