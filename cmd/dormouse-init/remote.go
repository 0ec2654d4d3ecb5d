package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"dormouse/agent/sandbox/pid1"

	"golang.org/x/sys/unix"
)

// Bounds of the server for remote starts.
const (
	maxStrangers = 64  // connections that have not proved anything
	maxRemotes   = 256 // sessions
	// greetingTime is how long a stranger may take. A checkpoint may come between.
	greetingTime = time.Minute
)

// remote serves remote starts: it runs what dormouse-rsh in another task of the
// job asks for, as the task's user, with its environment and in its directory.
// The processes are children of this one, and all that connects the two ends
// lies inside the job, so a checkpoint takes it with everything else.
type remote struct {
	socket *os.File
	family *family
	run    *pid1.Run
	secret []byte

	mu                  sync.Mutex
	strangers, sessions int
}

// listenRemote returns nil for a task that serves no remote starts.
func listenRemote(f *family, run *pid1.Run) (*remote, error) {
	if run.Remote == "" {
		return nil, nil
	}
	secret, err := os.ReadFile(inside(pid1.SecretFile))
	if err != nil {
		return nil, fmt.Errorf("cannot read the job's secret: %w", err)
	}
	address, err := netip.ParseAddr(run.Remote)
	if err != nil {
		return nil, fmt.Errorf("cannot serve remote starts: %w", err)
	}
	socket, err := listenTCP(netip.AddrPortFrom(address, pid1.RemotePort))
	if err != nil {
		return nil, err
	}
	return &remote{socket: socket, family: f, run: run, secret: secret}, nil
}

func (r *remote) serve() {
	acceptAll(r.socket, func(link *conn) {
		if !r.admit(&r.strangers, maxStrangers) {
			_ = link.file.Close()
			return
		}
		go r.answer(link)
	})
}

// admit counts one more, unless there are most already.
func (r *remote) admit(count *int, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if *count >= most {
		return false
	}
	*count++
	return true
}

func (r *remote) dismiss(count *int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*count--
}

// answer serves one connection. One that breaks the rules is closed.
func (r *remote) answer(link *conn) {
	defer link.file.Close()
	request, err := r.greet(link)
	r.dismiss(&r.strangers)
	if err == nil && !r.admit(&r.sessions, maxRemotes) {
		err = fmt.Errorf("this task serves %d remote starts already", maxRemotes)
	} else if err == nil {
		defer r.dismiss(&r.sessions)
		err = r.converse(link, request)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		_ = link.sendJSON(pid1.FrameFailure, failureOf(err))
	}
}

// greet makes sure that the other side belongs to the job and learns what it
// wants.
func (r *remote) greet(link *conn) (*pid1.RemoteRequest, error) {
	if err := link.file.SetDeadline(time.Now().Add(greetingTime)); err != nil {
		return nil, err
	}
	link.noDelay()
	challenge := make([]byte, pid1.ChallengeSize)
	if _, err := unix.Getrandom(challenge, 0); err != nil {
		return nil, err
	}
	if err := link.send(pid1.FrameChallenge, challenge); err != nil {
		return nil, err
	}
	link.limit = pid1.MaxProof
	proof, err := link.want(pid1.FrameProof)
	if err != nil {
		return nil, err
	}
	if !pid1.Proves(proof, r.secret, challenge) {
		return nil, pid1.Refuse("the secret is not that of this job")
	}
	link.limit = pid1.MaxRemoteRequest
	payload, err := link.want(pid1.FrameRequest)
	if err != nil {
		return nil, err
	}
	link.limit = pid1.MaxRemoteFrame
	request, err := parseRemote(payload, r.run)
	if err != nil {
		return nil, err
	}
	return request, link.file.SetDeadline(time.Time{})
}

// parseRemote understands a request to a task that runs as run says.
func parseRemote(payload []byte, run *pid1.Run) (*pid1.RemoteRequest, error) {
	var request pid1.RemoteRequest
	if err := json.Unmarshal(payload, &request); err != nil {
		return nil, pid1.Refuse("the request cannot be understood: %v", err)
	}
	if u := request.User; u != "" && u != run.User && u != strconv.FormatUint(uint64(run.UID), 10) {
		return nil, pid1.Refuse("the tasks of this job run as user %d, and cannot start anything as %.64q", run.UID, u)
	}
	return &request, request.Check()
}

// converse runs the process until it or the connection ends.
func (r *remote) converse(link *conn, request *pid1.RemoteRequest) error {
	s, err := startSession(r.family, r.run, &pid1.Request{Command: []string{"/bin/sh", "-c", string(request.Command)}})
	if err != nil {
		return err
	}
	defer s.hangUp()
	if err := link.sendJSON(pid1.FrameOK, pid1.OK{}); err != nil {
		return err
	}
	s.converse(link)
	return nil
}
