package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"

	"dormouse/agent/sandbox/pid1"
)

// control is the server on the control socket.
type control struct {
	socket *os.File
	family *family
	run    *pid1.Run
	apps   *apps

	mu          sync.Mutex
	closed      *sync.Cond // a connection was
	connections int
	last        uint64
	sessions    map[uint64]*session
}

func listen(f *family, run *pid1.Run, apps *apps) (*control, error) {
	socket, err := listenUnix(inside(pid1.ControlSocket), 0o600)
	if err != nil {
		return nil, err
	}
	c := &control{socket: socket, family: f, run: run, apps: apps, sessions: map[uint64]*session{}}
	c.closed = sync.NewCond(&c.mu)
	return c, nil
}

// serve answers connections for the life of the process.
func (c *control) serve() {
	acceptAll(c.socket, func(link *conn) {
		c.count(1)
		go c.answer(link)
	})
}

// answer serves one connection. When the agent is gone there is nobody to tell
// about an error.
func (c *control) answer(link *conn) {
	defer c.count(-1)
	defer link.file.Close()
	payload, err := link.want(pid1.FrameRequest)
	if err != nil {
		return
	}
	var request pid1.Request
	if err := json.Unmarshal(payload, &request); err != nil {
		return
	}
	if request.Op == pid1.OpListen {
		c.apps.tell(link)
		return
	}
	s, err := c.do(&request)
	if err != nil {
		_ = link.sendJSON(pid1.FrameFailure, failureOf(err))
		return
	}
	if s == nil {
		_ = link.sendJSON(pid1.FrameOK, pid1.OK{})
		return
	}
	if err := link.sendJSON(pid1.FrameOK, pid1.OK{Session: s.id}); err != nil {
		c.end(s)
		return
	}
	if !s.converse(link) {
		c.end(s)
		return
	}
	c.detached(s)
	_ = link.send(pid1.FrameDetached, nil)
}

func (c *control) count(change int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connections += change
	c.closed.Broadcast()
}

// waitQuiet returns when the asker's is the only connection.
func (c *control) waitQuiet() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.connections > 1 {
		c.closed.Wait()
	}
}

// do carries out a request and returns the session it opened or found.
func (c *control) do(r *pid1.Request) (*session, error) {
	switch r.Op {
	case pid1.OpSignal:
		return nil, c.family.signal(r.Signal)
	case pid1.OpAnswer:
		return nil, c.apps.answer(r.ID, r.Outcome)
	case pid1.OpRestored:
		return nil, c.apps.restored(r.JobRun, r.Outcome)
	case pid1.OpKeep:
		c.keep(r.Sessions)
		return nil, nil
	case pid1.OpQuiet:
		c.waitQuiet()
		return nil, nil
	case pid1.OpAttach:
		return c.attach(r.Session)
	case pid1.OpExec:
		return c.exec(r)
	}
	return nil, fmt.Errorf("pid 1 of this sandbox is older than the agent: it does not know the request %q", r.Op)
}

func (c *control) exec(r *pid1.Request) (*session, error) {
	if len(r.Command) == 0 {
		return nil, pid1.Refuse("no command was given")
	}
	s, err := startSession(c.family, c.run, r)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	s.id, s.attached = c.last, true
	c.sessions[s.id] = s
	return s, nil
}

func (c *control) attach(id uint64) (*session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.sessions[id]
	if !ok || s.attached {
		return nil, fmt.Errorf("there is no waiting session %d in this sandbox", id)
	}
	s.attached = true
	return s, nil
}

// keep hangs up every session that waits for an agent who will not come back:
// all but ids. The agent says so after a restore and after each checkpoint.
func (c *control) keep(ids []uint64) {
	var drop []*session
	c.mu.Lock()
	for id, s := range c.sessions {
		if !s.attached && !slices.Contains(ids, id) {
			s.attached = true // nobody else may take it
			drop = append(drop, s)
		}
	}
	c.mu.Unlock()
	for _, s := range drop {
		c.end(s)
	}
}

// detached marks s as waiting for an attach.
func (c *control) detached(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.attached = false
}

func (c *control) end(s *session) {
	c.mu.Lock()
	delete(c.sessions, s.id)
	c.mu.Unlock()
	s.hangUp()
}
