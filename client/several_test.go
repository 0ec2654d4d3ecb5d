package client

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"dormouse/api"
)

// controllerAt is a server that answers with its name, and counts who asks.
type controllerAt struct {
	*httptest.Server
	mu    sync.Mutex
	count int
	fail  func(w http.ResponseWriter) // instead of answering
}

func (c *controllerAt) failWith(fail func(w http.ResponseWriter)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = fail
}

func (c *controllerAt) asked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

// ask counts a request and returns how to fail it, if at all.
func (c *controllerAt) ask() func(w http.ResponseWriter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	return c.fail
}

func newControllerAt(t *testing.T, name string) *controllerAt {
	t.Helper()
	c := &controllerAt{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fail := c.ask(); fail != nil {
			fail(w)
			return
		}
		status := http.StatusOK
		if r.Method == http.MethodPost {
			status = http.StatusCreated
		}
		answer(t, w, status, "application/json", api.JobDetail{Job: api.Job{ID: name}})
	}))
	t.Cleanup(c.Close)
	return c
}

// nobody is an address where nothing listens, nor will before the test ends: it
// is taken by a socket that is only bound.
func nobody(t *testing.T) string {
	t.Helper()
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(socket) })
	if err := unix.Bind(socket, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(socket)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("http://127.0.0.1:%d", address.(*unix.SockaddrInet4).Port)
}

func newClientOf(t *testing.T, urls ...string) *Client {
	t.Helper()
	c, err := New(Config{URL: strings.Join(urls, ", "), Patience: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestTheNextControllerIsAskedWhenOneIsAway(t *testing.T) {
	failures := map[string]func(w http.ResponseWriter){
		"broken connection": brokenAnswers["broken connection"],
		"no leader":         brokenAnswers["stopping controller"],
	}
	for name, fail := range failures {
		t.Run(name, func(t *testing.T) {
			first, second := newControllerAt(t, "first"), newControllerAt(t, "second")
			first.failWith(fail)
			c := newClientOf(t, nobody(t), first.URL, second.URL)
			for range 2 {
				if job, err := c.Job(t.Context(), "j"); err != nil || job.ID != "second" {
					t.Fatalf("want the answer of the second controller, got %v, %v", job, err)
				}
			}
			if _, err := c.Submit(t.Context(), api.JobSpec{Command: []string{"x"}}); err != nil {
				t.Fatal(err)
			}
			if first.asked() != 1 || second.asked() != 3 || c.URL() != second.URL {
				t.Errorf("want the one that answered to be asked from then on, got %d and %d requests", first.asked(), second.asked())
			}
			first.failWith(nil)
			second.failWith(fail)
			if job, err := c.Job(t.Context(), "j"); err != nil || job.ID != "first" {
				t.Errorf("want the answer of the first controller, got %v, %v", job, err)
			}
		})
	}
}

// An exec has no key: it may have been begun.
func TestWhatMayHaveBegunIsNotBegunElsewhere(t *testing.T) {
	first, second := newControllerAt(t, "first"), newControllerAt(t, "second")
	first.failWith(brokenAnswers["broken connection"])
	c := newClientOf(t, first.URL, second.URL)
	if _, err := c.Exec(t.Context(), "j", ExecRequest{Command: []string{"x"}}); !IsUnreachable(err) || second.asked() != 0 {
		t.Errorf("want the failure, got %v and %d requests to another", err, second.asked())
	}
}

func TestRefusalsOfOneControllerHold(t *testing.T) {
	first, second := newControllerAt(t, "first"), newControllerAt(t, "second")
	first.failWith(func(w http.ResponseWriter) {
		answer(t, w, http.StatusConflict, "application/problem+json", api.Problem{Status: http.StatusConflict, Detail: "no"})
	})
	if _, err := newClientOf(t, first.URL, second.URL).Job(t.Context(), "j"); !IsRefused(err) || second.asked() != 0 {
		t.Errorf("want the refusal, got %v and %d requests to another", err, second.asked())
	}
}

func TestAllControllersAway(t *testing.T) {
	last := nobody(t)
	_, err := newClientOf(t, nobody(t), last).Job(t.Context(), "j")
	if !IsUnreachable(err) || !strings.Contains(err.Error(), last) {
		t.Errorf("want that none could be reached, got %v", err)
	}
}

func TestEachOfSeveralAddressesMustBeOne(t *testing.T) {
	_, err := New(Config{URL: "https://a:1,b"})
	if err == nil || !strings.Contains(err.Error(), `"b"`) {
		t.Errorf("want the wrong address named, got %v", err)
	}
}
