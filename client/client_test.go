package client

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

func answer(t *testing.T, w http.ResponseWriter, status int, kind string, body any) {
	t.Helper()
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		t.Error(err)
	}
}

func newClient(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	c, err := New(Config{URL: server.URL, Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestCallsCarryMethodPathTokenAndBody(t *testing.T) {
	ctx := context.Background()
	tests := []struct {
		name string
		call func(*Client) error
		want string // METHOD path?query body
	}{
		{"submit", func(c *Client) error {
			_, err := c.Submit(ctx, api.JobSpec{Command: []string{"true"}})
			return err
		}, `POST /v1/jobs {"command":["true"]}`},
		{"jobs", func(c *Client) error { _, err := c.Jobs(ctx, true); return err }, `GET /v1/jobs?all=true`},
		{"job", func(c *Client) error { _, err := c.Job(ctx, "a/b"); return err }, `GET /v1/jobs/a%2Fb`},
		{"remove", func(c *Client) error { return c.RemoveJob(ctx, "j-1") }, `DELETE /v1/jobs/j-1`},
		{"wait", func(c *Client) error {
			_, err := c.WaitJob(ctx, "j-1", api.PhaseRunning, time.Second)
			return err
		}, `GET /v1/jobs/j-1/wait?for=running&timeout=1s`},
		{"suspend", func(c *Client) error { _, err := c.Suspend(ctx, "j-1"); return err }, `POST /v1/jobs/j-1/suspend {}`},
		{"resume", func(c *Client) error {
			_, err := c.Resume(ctx, "j-1", Wake{Cloud: "west", From: "c-1"})
			return err
		}, `POST /v1/jobs/j-1/resume {"cloud":"west","from":"c-1"}`},
		{"restart", func(c *Client) error { _, err := c.Restart(ctx, "j-1", Wake{}); return err }, `POST /v1/jobs/j-1/restart {}`},
		{"kill", func(c *Client) error { _, err := c.Kill(ctx, "j-1", "SIGTERM"); return err }, `POST /v1/jobs/j-1/kill {"signal":"SIGTERM"}`},
		{"checkpoint", func(c *Client) error { _, err := c.Checkpoint(ctx, "j-1", "x"); return err }, `POST /v1/jobs/j-1/checkpoints {"label":"x"}`},
		{"checkpoints of one", func(c *Client) error { _, err := c.Checkpoints(ctx, "j-1"); return err }, `GET /v1/jobs/j-1/checkpoints`},
		{"checkpoints of all", func(c *Client) error { _, err := c.Checkpoints(ctx, ""); return err }, `GET /v1/checkpoints`},
		{"get checkpoint", func(c *Client) error { _, err := c.GetCheckpoint(ctx, "c-1"); return err }, `GET /v1/checkpoints/c-1`},
		{"remove checkpoint", func(c *Client) error { return c.RemoveCheckpoint(ctx, "c-1") }, `DELETE /v1/checkpoints/c-1`},
		{"verify one", func(c *Client) error { _, err := c.Verify(ctx, "c-1"); return err }, `POST /v1/checkpoints/c-1/verify {}`},
		{"verify all", func(c *Client) error { _, err := c.Verify(ctx, ""); return err }, `POST /v1/verify {}`},
		{"clone", func(c *Client) error { _, err := c.Clone(ctx, "c-1", "west", "x"); return err }, `POST /v1/checkpoints/c-1/clone {"cloud":"west","name":"x"}`},
		{"operations", func(c *Client) error { _, err := c.Operations(ctx); return err }, `GET /v1/operations`},
		{"operation", func(c *Client) error { _, err := c.Operation(ctx, "o-1", 2*time.Second); return err }, `GET /v1/operations/o-1?wait=2s`},
		{"nodes", func(c *Client) error { _, err := c.Nodes(ctx); return err }, `GET /v1/nodes`},
		{"kill node", func(c *Client) error { return c.KillNode(ctx, "east-0") }, `POST /v1/nodes/east-0/kill`},
		{"start node", func(c *Client) error { return c.StartNode(ctx, "east-0") }, `POST /v1/nodes/east-0/start`},
		{"clouds", func(c *Client) error { _, err := c.Clouds(ctx); return err }, `GET /v1/clouds`},
		{"version", func(c *Client) error { _, err := c.Version(ctx); return err }, `GET /v1/version`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, token := "", ""
			c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
				got, token = r.Method+" "+r.URL.RequestURI(), r.Header.Get("Authorization")
				body := json.RawMessage{}
				if json.NewDecoder(r.Body).Decode(&body) == nil {
					got += " " + string(body)
				}
				answer(t, w, http.StatusOK, "application/json", nil)
			})
			if err := test.call(c); err != nil {
				t.Fatal(err)
			}
			if got != test.want {
				t.Errorf("sent %s, want %s", got, test.want)
			}
			if token != "Bearer secret" {
				t.Errorf("the Authorization header is %q", token)
			}
		})
	}
}

func TestProblemsKeepStatusAndDetail(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		answer(t, w, http.StatusNotFound, "application/problem+json", api.Problem{Title: "Not Found", Status: 404, Detail: "there is no job x"})
	})
	_, err := c.Job(context.Background(), "x")
	if !IsNotFound(err) || err.Error() != "there is no job x" {
		t.Errorf("got %v (status %d), want the controller's own sentence and 404", err, Status(err))
	}
}

func TestAnswerThatIsNoProblemDocumentIsNamed(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "<html>", http.StatusBadGateway) })
	_, err := c.Job(context.Background(), "x")
	if Status(err) != 502 || !strings.Contains(err.Error(), "502 Bad Gateway to GET /v1/jobs/x") {
		t.Errorf("got %v, want the status line and the call", err)
	}
}

func TestListsAreNeverNil(t *testing.T) {
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) { answer(t, w, http.StatusOK, "application/json", nil) })
	jobs, err := c.Jobs(context.Background(), false)
	if err != nil || jobs == nil {
		t.Errorf("got %v, %v; want an empty list", jobs, err)
	}
}

func TestDeadControllerIsUnreachable(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close()
	c, err := New(Config{URL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Jobs(context.Background(), false)
	if !IsUnreachable(err) || !strings.Contains(err.Error(), "is `dormouse up` running?") {
		t.Errorf("got %v, want an UnreachableError that asks for `dormouse up`", err)
	}
}

func TestCancelledCallReturnsTheContextsError(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	c := newClient(t, func(http.ResponseWriter, *http.Request) { <-release })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Jobs(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want context.DeadlineExceeded", err)
	}
}

func TestOnlyThePinnedAuthorityIsTrusted(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer(t, w, http.StatusOK, "application/json", []api.Node{})
	}))
	defer server.Close()
	server.Config.ErrorLog = nil
	right := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(right, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}

	pinned, err := New(Config{URL: server.URL, CAFile: right})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pinned.Nodes(context.Background()); err != nil {
		t.Errorf("with the controller's own CA: %v", err)
	}

	unpinned, err := New(Config{URL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	_, err = unpinned.Nodes(context.Background())
	var certificate *CertificateError
	if !errors.As(err, &certificate) || !strings.Contains(err.Error(), "DORMOUSE_CA") {
		t.Errorf("without the CA: got %v, want a CertificateError that names DORMOUSE_CA", err)
	}
}

func TestNewRefusesBadConfigurations(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage.pem")
	if err := os.WriteFile(garbage, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, config := range []Config{
		{URL: ""}, {URL: "127.0.0.1:7117"}, {URL: "ftp://x"}, {URL: "https://"},
		{URL: "https://x", CAFile: garbage}, {URL: "https://x", CAFile: garbage + ".absent"},
	} {
		if _, err := New(config); err == nil {
			t.Errorf("New(%+v) succeeded", config)
		}
	}
}
