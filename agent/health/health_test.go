package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"dormouse/api"
	"dormouse/monitor/policy"
)

var errSick = errors.New("sick")

// taken is what a checker says about a sequence of answers, one a second: +
// healthy, - not.
func taken(c *Checker, answers string) string {
	var said []string
	begun := time.Unix(1000, 0)
	for i, a := range answers {
		c.Changed = func(v Verdict) { said = append(said, fmt.Sprintf("%d %v %d", i, v.Healthy, v.Failures)) }
		err := errSick
		if a == '+' {
			err = nil
		}
		age := time.Duration(i) * time.Second
		c.take(err, begun.Add(age), age)
	}
	return strings.Join(said, ", ")
}

func TestAChangeIsSaidWhenItIsSure(t *testing.T) {
	for name, c := range map[string]struct {
		check     api.HealthCheck
		unhealthy bool
		answers   string
		want      string
	}{
		"always well":                         {api.HealthCheck{}, false, "++++", ""},
		"three failures in a row":             {api.HealthCheck{}, false, "+-----", "3 false 3"},
		"two are not enough":                  {api.HealthCheck{}, false, "--+--+--", ""},
		"one may be":                          {api.HealthCheck{Retries: 1}, false, "+-+", "1 false 1, 2 true 0"},
		"well again at once":                  {api.HealthCheck{}, false, "---+", "2 false 3, 3 true 0"},
		"it may take long to start":           {api.HealthCheck{StartDelayMS: 4500}, false, "--------", "7 false 3"},
		"but once it is up failures count":    {api.HealthCheck{StartDelayMS: 100000}, false, "-+---", "4 false 3"},
		"it was unhealthy before":             {api.HealthCheck{}, true, "----+", "4 true 0"},
		"and the start delay is of no moment": {api.HealthCheck{StartDelayMS: 100000}, true, "-+---", "1 true 0, 4 false 3"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := taken(New(c.check, c.unhealthy), c.answers); got != c.want {
				t.Errorf("%s says %q, want %q", c.answers, got, c.want)
			}
		})
	}
}

// run runs a checker with a probe in a world where time is quick.
func run(t *testing.T, check api.HealthCheck, probe Probe, excused func() string, then func(c *Checker, said func() []Verdict)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var said []Verdict
		c := New(check, false)
		c.Probe, c.Gate, c.Excused = probe, &Gate{}, excused
		c.Changed = func(v Verdict) {
			mu.Lock()
			defer mu.Unlock()
			said = append(said, v)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); c.Run(ctx) }()
		then(c, func() []Verdict {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return said
		})
		cancel()
		<-ended
	})
}

func never() string { return "" }

func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestAHungProbeIsAFailureAndProbesDoNotOverlap(t *testing.T) {
	var running atomic.Int32
	probe := func(ctx context.Context) error {
		if running.Add(1) > 1 {
			t.Error("two probes at a time")
		}
		defer running.Add(-1)
		return hang(ctx)
	}
	run(t, api.HealthCheck{PeriodMS: 1000, TimeoutMS: 3500}, probe, never, func(_ *Checker, said func() []Verdict) {
		time.Sleep(11 * time.Second)
		if got := said(); len(got) != 0 {
			t.Errorf("after less than three timeouts: %+v", got)
		}
		time.Sleep(3 * time.Second)
		if got := said(); len(got) != 1 || got[0].Healthy || got[0].Reason != "no answer within 3.5s" {
			t.Errorf("after three timeouts: %+v, want unhealthy", got)
		}
	})
}

func TestAShutGateEndsTheProbeAndNothingIsHeldAgainstTheTask(t *testing.T) {
	var begun, ended atomic.Int32
	probe := func(ctx context.Context) error {
		begun.Add(1)
		defer ended.Add(1)
		return hang(ctx)
	}
	run(t, api.HealthCheck{PeriodMS: 1000, TimeoutMS: 60000, Retries: 1}, probe, never, func(c *Checker, said func() []Verdict) {
		time.Sleep(1500 * time.Millisecond)
		for range 2 {
			c.Gate.Shut(context.Background(), "checkpoint")
			if begun.Load() != 1 || ended.Load() != 1 {
				t.Fatalf("%d probes began and %d have ended, want 1 and 1", begun.Load(), ended.Load())
			}
		}
		c.Gate.Shut(context.Background(), "look")
		c.Gate.Open("checkpoint")
		time.Sleep(time.Minute)
		if got := said(); begun.Load() != 1 || len(got) != 0 {
			t.Fatalf("while the gate is shut %d probes have begun, and it is said: %+v", begun.Load()-1, got)
		}
		c.Gate.Open("look")
		time.Sleep(90 * time.Second)
		if got := said(); begun.Load() < 2 || len(got) != 1 {
			t.Errorf("after that %d probes have begun, and it is said: %+v; want unhealthy", begun.Load()-1, got)
		}
	})
}

func TestATaskThatStandsStillIsExcused(t *testing.T) {
	var still atomic.Bool
	still.Store(true)
	excused := func() string {
		if still.Load() {
			return "frozen"
		}
		return ""
	}
	run(t, api.HealthCheck{PeriodMS: 1000, Retries: 1}, func(context.Context) error { return errSick }, excused, func(_ *Checker, said func() []Verdict) {
		time.Sleep(time.Minute)
		if got := said(); len(got) != 0 {
			t.Errorf("said while it stands still: %+v", got)
		}
		still.Store(false)
		time.Sleep(2 * time.Second)
		if got := said(); len(got) != 1 || got[0].Reason != "sick" {
			t.Errorf("said afterwards: %+v, want unhealthy", got)
		}
	})
}

func TestHTTPIsHealthyByItsStatus(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hang":
			<-r.Context().Done()
		case "/endless":
			for i := 0; i < 100; i++ {
				if _, err := w.Write(make([]byte, 32<<10)); err != nil {
					return
				}
			}
		case "/moved":
			http.Redirect(w, r, "/bad", http.StatusFound)
		case "/bad":
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer server.Close()
	at := netip.MustParseAddrPort(server.Listener.Addr().String())
	dial := func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	}
	for path, want := range map[string]string{"/": "", "/moved": "", "/endless": "", "/bad": "status 503", "/hang": "timeout"} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		err := HTTP(dial, at.Addr(), policy.Target{Port: at.Port(), Path: path})(ctx)
		cancel()
		if got := fmt.Sprint(err); want == "" && err != nil || !strings.Contains(got, want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	garbage, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer garbage.Close()
	go func() {
		for {
			conn, err := garbage.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write(slices.Repeat([]byte("x"), 1<<20))
			conn.Close()
		}
	}()
	at = netip.MustParseAddrPort(garbage.Addr().String())
	if err := HTTP(dial, at.Addr(), policy.Target{Port: at.Port(), Path: "/"})(t.Context()); err == nil {
		t.Error("garbage is healthy")
	}
}
