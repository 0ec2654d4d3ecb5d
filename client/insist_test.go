package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dormouse/api"
)

// brokenAnswers are servers that do not answer a request that they got.
var brokenAnswers = map[string]func(w http.ResponseWriter){
	"broken connection": func(w http.ResponseWriter) {
		if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
			conn.Close()
		}
	},
	"half an answer": func(w http.ResponseWriter) {
		if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
			conn.Write([]byte("HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"))
			conn.Close()
		}
	},
	"stopping controller": func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusServiceUnavailable)
		w.Write([]byte(`{"title":"Service Unavailable","status":503,"detail":"the controller is stopping: try again"}`))
	},
	"busy controller": func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		w.Write([]byte(`{"title":"Too Many Requests","status":429,"detail":"more than 1 request a second"}`))
	},
}

func TestCallThatGotNoAnswerIsRepeatedUnderItsKey(t *testing.T) {
	for name, fail := range brokenAnswers {
		t.Run(name, func(t *testing.T) {
			var keys []string
			c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
				if keys = append(keys, r.Header.Get("Idempotency-Key")); len(keys) == 1 {
					fail(w)
					return
				}
				answer(t, w, http.StatusCreated, "application/json", api.JobDetail{Job: api.Job{ID: "j-1"}})
			})
			job, err := c.Submit(t.Context(), api.JobSpec{Command: []string{"x"}})
			if err != nil || job.ID != "j-1" {
				t.Fatalf("want the second answer, got %v, %v", job, err)
			}
			if len(keys) != 2 || keys[0] == "" || keys[0] != keys[1] {
				t.Errorf("want two requests with one key, got %q", keys)
			}
		})
	}
}

func TestDifferentCallsHaveDifferentKeys(t *testing.T) {
	seen := map[string]bool{}
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		seen[r.Header.Get("Idempotency-Key")] = true
		answer(t, w, http.StatusAccepted, "application/json", api.Operation{})
	})
	for range 3 {
		if _, err := c.Suspend(t.Context(), "j"); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != 3 || seen[""] {
		t.Errorf("want three keys, got %v", seen)
	}
}

// TestQuestionIsAskedOnceMore: its connection broke, and whoever was there is there again.
func TestQuestionIsAskedOnceMore(t *testing.T) {
	var requests atomic.Int32
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 1 {
			brokenAnswers["broken connection"](w)
			return
		}
		answer(t, w, http.StatusOK, "application/json", api.JobDetail{Job: api.Job{ID: "j-1"}})
	})
	if job, err := c.Job(t.Context(), "j-1"); err != nil || job.ID != "j-1" {
		t.Errorf("want the second answer, got %v, %v", job, err)
	}
}

func TestQuestionsAndRefusalsAreNotRepeatedForLong(t *testing.T) {
	var requests atomic.Int32
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.Method == http.MethodGet {
			brokenAnswers["broken connection"](w)
			return
		}
		answer(t, w, http.StatusConflict, "application/problem+json", api.Problem{Status: 409, Detail: "no"})
	})
	if _, err := c.Suspend(t.Context(), "j"); !IsRefused(err) || requests.Load() != 1 {
		t.Errorf("a refusal: %v after %d requests", err, requests.Load())
	}
	// Twice; net/http itself may repeat a GET whose reused connection broke.
	before := requests.Load()
	if _, err := c.Jobs(t.Context(), false); !IsUnreachable(err) || requests.Load() > before+3 {
		t.Errorf("a question: %v after %d requests", err, requests.Load()-before)
	}
}

func TestPatienceEnds(t *testing.T) {
	var requests atomic.Int32
	c := newClient(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		brokenAnswers["stopping controller"](w)
	})
	c.patience = time.Second
	if _, err := c.Suspend(t.Context(), "j"); Status(err) != http.StatusServiceUnavailable {
		t.Errorf("want the last answer, got %v", err)
	}
	if n := requests.Load(); n < 2 {
		t.Errorf("want several requests in a second, got %d", n)
	}
}

// TestWhoGivesUpLearnsThatItMayBeDone: the request broke off, and then there was
// nobody any more.
func TestWhoGivesUpLearnsThatItMayBeDone(t *testing.T) {
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		server.Listener.Close()
		brokenAnswers["broken connection"](w)
	}))
	t.Cleanup(server.Close)
	c, err := New(Config{URL: server.URL, Patience: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	_, err = c.Suspend(t.Context(), "j")
	var unreachable *UnreachableError
	if !errors.As(err, &unreachable) || !unreachable.Sent || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("want an unreachable controller that was asked before, got %v", err)
	}
	if !strings.Contains(err.Error(), "look before you repeat it") {
		t.Errorf("the error does not tell that it may be done: %v", err)
	}
}

// TestCallWhoseUsedConnectionBreaksIsRepeated: the connection had carried an earlier
// call, so net/http repeats the request itself. It finds nobody, and that is all
// that it tells.
func TestCallWhoseUsedConnectionBreaksIsRepeated(t *testing.T) {
	var keys []string
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			answer(t, w, http.StatusOK, "application/json", []api.Job{})
			return
		}
		if keys = append(keys, r.Header.Get("Idempotency-Key")); len(keys) == 1 {
			brokenAnswers["broken connection"](w)
			return
		}
		answer(t, w, http.StatusCreated, "application/json", api.JobDetail{Job: api.Job{ID: "j-1"}})
	})
	dials, transport := 0, c.http.Transport.(*http.Transport)
	dial := transport.DialContext
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if dials++; dials == 2 {
			return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
		}
		return dial(ctx, network, address)
	}
	if _, err := c.Jobs(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	job, err := c.Submit(t.Context(), api.JobSpec{Command: []string{"x"}})
	if err != nil || job.ID != "j-1" {
		t.Fatalf("want the second answer, got %v, %v", job, err)
	}
	if dials != 3 || len(keys) != 2 || keys[0] == "" || keys[0] != keys[1] {
		t.Errorf("want two requests with one key, and a third connection, got %q after %d", keys, dials)
	}
}

func TestControllerThatWasNeverThereIsNotWaitedFor(t *testing.T) {
	c, err := New(Config{URL: nobody(t), Patience: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	var unreachable *UnreachableError
	if _, err := c.Suspend(t.Context(), "j"); !errors.As(err, &unreachable) || unreachable.Sent {
		t.Errorf("want an unreachable controller that was not asked, got %v", err)
	}
}
