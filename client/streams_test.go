package client

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"dormouse/api"
)

func TestEventsAreReadInOrder(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query(); got.Get("job") != "j-1" || got.Get("follow") != "" {
			t.Errorf("asked with %v", got)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, ": hello\n\nid: 1\nevent: submitted\ndata: {\"id\":1,\"type\":\"submitted\"}\n\n")
		io.WriteString(w, "data: {\"id\":2,\r\ndata: \"type\":\"started\"}\r\n\r\ndata: {\"id\":3")
	})
	got := []string{}
	err := c.Events(context.Background(), "j-1", false, func(event api.Event) error {
		got = append(got, fmt.Sprintf("%d %s", event.ID, event.Type))
		return nil
	})
	if err != nil || strings.Join(got, ",") != "1 submitted,2 started" {
		t.Errorf("got %v, %v; want events 1 and 2, and the unfinished third dropped", got, err)
	}
}

func TestFollowedEventsThatEndAreAnError(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {})
	err := c.Events(context.Background(), "", true, func(api.Event) error { return nil })
	if !IsUnreachable(err) {
		t.Errorf("got %v, want an UnreachableError: the controller went away", err)
	}
}

func TestLogsAreReadToTheirEnd(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.RawQuery; got != "follow=true&task=2" {
			t.Errorf("asked with %s", got)
		}
		io.WriteString(w, `{"task":2,"stream":"stdout","data":"aGk="}`+"\n"+`{"task":2,"stream":"stderr","data":"AP8="}`+"\n")
	})
	out := map[string]string{}
	err := c.Logs(context.Background(), "j-1", LogOptions{Task: 2, Follow: true}, func(chunk LogChunk) error {
		out[chunk.Stream] += string(chunk.Data)
		return nil
	})
	if err != nil || out["stdout"] != "hi" || out["stderr"] != "\x00\xff" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestLogsThatBreakSayWhy(t *testing.T) {
	for body, want := range map[string]string{
		`{"error":"the node east-0 is unreachable"}`: "the node east-0 is unreachable",
		`{"task":0,"stre`: "unexpected EOF",
	} {
		c := newClient(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, body) })
		err := c.Logs(context.Background(), "j-1", LogOptions{Task: AllTasks}, func(LogChunk) error { return nil })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("after %s: got %v, want it to say %q", body, err, want)
		}
	}
}

// upgraded serves one exec connection with serve.
func upgraded(t *testing.T, serve func(r *http.Request, conn *bufio.ReadWriter)) *Client {
	return newClient(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != execProtocol {
			t.Errorf("the Upgrade header is %q", r.Header.Get("Upgrade"))
		}
		conn, buffered, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(buffered, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", execProtocol)
		serve(r, buffered)
		buffered.Flush()
	})
}

func TestExecCarriesInputOutputAndStatus(t *testing.T) {
	c := upgraded(t, func(r *http.Request, conn *bufio.ReadWriter) {
		if got := r.URL.RawQuery; got != "cmd=tr&cmd=a&cmd=b+c&cols=80&env=K%3DV&rows=24&task=1&tty=true" {
			t.Errorf("asked with %s", got)
		}
		conn.Flush()
		input := []byte{}
		for {
			kind, body, err := readFrame(conn)
			if err != nil {
				t.Error(err)
				return
			}
			if kind == frameStdinClosed {
				break
			}
			if kind == frameStdin {
				input = append(input, body...)
			}
		}
		// Wire fixtures, so that the format cannot drift with the code.
		fmt.Fprintf(conn, "\x01\x00\x00\x00%c%s", len(input), input)
		conn.WriteString("\x02\x00\x00\x00\x03err")
		conn.WriteString("\x03\x00\x00\x00\x04\x00\x00\x00\x89")
	})
	session, err := c.Exec(context.Background(), "j-1", ExecRequest{Task: 1, Command: []string{"tr", "a", "b c"}, Env: []string{"K=V"}, TTY: true, Rows: 24, Cols: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	if err := session.Resize(30, 100); err != nil {
		t.Fatal(err)
	}
	if err := session.Input(strings.NewReader("hello")); err != nil {
		t.Fatal(err)
	}
	out, errs := bytes.Buffer{}, bytes.Buffer{}
	status, err := session.Output(&out, &errs)
	if err != nil || status != 137 || out.String() != "hello" || errs.String() != "err" {
		t.Errorf("got status %d, %v, output %q, errors %q", status, err, &out, &errs)
	}
}

func TestExecRefusalIsAProblem(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		answer(t, w, http.StatusConflict, "application/problem+json", api.Problem{Detail: "j-1 is suspended"})
	})
	if _, err := c.Exec(context.Background(), "j-1", ExecRequest{Command: []string{"ls"}}); !IsRefused(err) {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestExecErrorsEndTheOutput(t *testing.T) {
	for wire, want := range map[string]string{
		"\x05\x00\x00\x00\x07no such": "no such",
		"\x01\xff\xff\xff\xff":        "longer than",
		"\x03\x00\x00\x00\x01\x00":    "instead of 4",
		"":                            "the connection to the command broke",
	} {
		c := upgraded(t, func(_ *http.Request, conn *bufio.ReadWriter) { conn.WriteString(wire) })
		session, err := c.Exec(context.Background(), "j-1", ExecRequest{Command: []string{"ls"}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = session.Output(io.Discard, io.Discard)
		session.Close()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("after %q: got %v, want it to say %q", wire, err, want)
		}
	}
}

func FuzzReadEventsNeverPanics(f *testing.F) {
	f.Add([]byte("data: {}\n\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		readEvents(bytes.NewReader(stream), func([]byte) error { return nil })
	})
}
