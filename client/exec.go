package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
)

// execProtocol is what a connection is upgraded to for Exec.
const execProtocol = "dormouse-exec"

// The kinds of frame on an exec connection. A frame is one byte of kind, four
// bytes of length (big endian) and that many bytes.
const (
	frameStdin       = 0
	frameStdout      = 1
	frameStderr      = 2
	frameExit        = 3 // int32, big endian: the command's exit status
	frameResize      = 4 // rows and columns, uint16 each, big endian
	frameError       = 5 // text: why the command could not be run
	frameStdinClosed = 6
)

// maxFrame bounds what one frame may hold, so that a broken peer cannot make us
// allocate at will.
const maxFrame = 1 << 20

// stdinPiece is how much input one frame carries at most.
const stdinPiece = 32 << 10

// ExecRequest is a command to run beside a task, inside its sandbox.
type ExecRequest struct {
	Task       int
	Command    []string
	Env        []string // K=V
	TTY        bool
	Rows, Cols uint16 // of the terminal, with TTY
}

// Session is one command run by Exec.
type Session struct {
	conn    io.ReadWriteCloser
	writing sync.Mutex
}

// Exec starts a command in a running task's sandbox. The session must be closed.
func (c *Client) Exec(ctx context.Context, job string, exec ExecRequest) (*Session, error) {
	query := url.Values{"task": {strconv.Itoa(exec.Task)}, "cmd": exec.Command}
	if len(exec.Env) > 0 {
		query["env"] = exec.Env
	}
	if exec.TTY {
		query.Set("tty", "true")
		query.Set("rows", strconv.Itoa(int(exec.Rows)))
		query.Set("cols", strconv.Itoa(int(exec.Cols)))
	}
	response, err := c.do(ctx, func(base string) (*http.Request, error) {
		request, err := c.request(ctx, http.MethodPost, base+jobPath(job)+"/exec", query, nil)
		if err == nil {
			request.Header.Set("Connection", "Upgrade")
			request.Header.Set("Upgrade", execProtocol)
		}
		return request, err
	})
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		defer response.Body.Close()
		return nil, problem(response)
	}
	conn, ok := response.Body.(io.ReadWriteCloser)
	if !ok {
		response.Body.Close()
		return nil, errors.New("the controller's connection cannot be written to after the upgrade")
	}
	return &Session{conn: conn}, nil
}

// Close ends the session; a command that still runs is ended with it.
func (s *Session) Close() error { return s.conn.Close() }

// Resize tells the command's terminal its new size.
func (s *Session) Resize(rows, cols uint16) error {
	size := binary.BigEndian.AppendUint16(nil, rows)
	return s.write(frameResize, binary.BigEndian.AppendUint16(size, cols))
}

// Input copies from until its end, then closes the command's input. It returns
// early when the session ends.
func (s *Session) Input(from io.Reader) error {
	piece := make([]byte, stdinPiece)
	for {
		n, err := from.Read(piece)
		if n > 0 {
			if err := s.write(frameStdin, piece[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return s.CloseInput()
		}
		if err != nil {
			return err
		}
	}
}

// CloseInput tells the command that no more input comes.
func (s *Session) CloseInput() error { return s.write(frameStdinClosed, nil) }

// Output copies what the command writes until it has ended, and returns its
// exit status: 128+signal when a signal ended it.
func (s *Session) Output(stdout, stderr io.Writer) (int, error) {
	for {
		kind, body, err := readFrame(s.conn)
		if err != nil {
			return 0, fmt.Errorf("the connection to the command broke: %w", err)
		}
		switch kind {
		case frameStdout:
			_, err = stdout.Write(body)
		case frameStderr:
			_, err = stderr.Write(body)
		case frameError:
			return 0, errors.New(string(body))
		case frameExit:
			if len(body) != 4 {
				return 0, fmt.Errorf("the exit status of the command has %d bytes instead of 4", len(body))
			}
			return int(int32(binary.BigEndian.Uint32(body))), nil
		}
		if err != nil {
			return 0, fmt.Errorf("write the command's output: %w", err)
		}
	}
}

func (s *Session) write(kind byte, body []byte) error {
	frame := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)))
	s.writing.Lock()
	defer s.writing.Unlock()
	_, err := s.conn.Write(append(frame, body...))
	return err
}

func readFrame(from io.Reader) (kind byte, body []byte, err error) {
	head := [5]byte{}
	if _, err := io.ReadFull(from, head[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(head[1:])
	if length > maxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes is longer than the %d allowed", length, maxFrame)
	}
	body = make([]byte, length)
	if _, err := io.ReadFull(from, body); err != nil {
		return 0, nil, err
	}
	return head[0], body, nil
}
