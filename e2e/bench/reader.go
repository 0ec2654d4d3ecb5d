package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"dormouse/internal/child"
)

// Those who read are a process of their own. The clients of a controller are
// elsewhere, and what they wait for is the controller and the network: not the
// thousand simulated agents and the submitters of this process, in which a reader
// would have to wait for its turn again once its answer is there.

// readerVerb is the argument of the process that reads.
const readerVerb = "fleet-reader"

// client makes requests of a controller.
type client struct {
	URL   string `json:"url"`
	Token string `json:"token"`
	CA    []byte `json:"ca"` // PEM

	roots *x509.CertPool
	http  *http.Client
}

// open makes a client of its exported fields.
func (c *client) open() error {
	c.roots = x509.NewCertPool()
	if !c.roots.AppendCertsFromPEM(c.CA) {
		return errors.New("the controller's CA is no certificate")
	}
	c.http = &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: c.roots, ServerName: serverName}, MaxIdleConnsPerHost: submitters + readers,
	}}
	return nil
}

// call makes one request and returns the body of its answer.
func (c *client) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, c.URL+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+c.Token)
	request.Header.Set("Content-Type", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: status %d: %s", method, path, response.StatusCode, text)
	}
	return text, err
}

// reading is a process that reads.
type reading struct {
	process *exec.Cmd
	result  bytes.Buffer

	mu    sync.Mutex
	input io.WriteCloser // the client, then the ids of jobs, one on each line
}

// startReading starts a process that asks for one kind of thing after the other.
func startReading(c *client) (*reading, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r := &reading{process: exec.Command(program, readerVerb)}
	r.process.Stdout, r.process.Stderr = &r.result, os.Stderr
	if r.input, err = r.process.StdinPipe(); err != nil {
		return nil, err
	}
	if err := child.Start(r.process, syscall.SIGKILL); err != nil {
		return nil, err
	}
	return r, json.NewEncoder(r.input).Encode(c)
}

// know tells the process of a job that it may ask for.
func (r *reading) know(job string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := io.WriteString(r.input, job+"\n")
	return err
}

// end ends the process and returns how long it waited for its answers, by kind,
// and the processor time that it took.
func (r *reading) end() (waited map[string]latency, cpu time.Duration, err error) {
	r.input.Close()
	if err := r.process.Wait(); err != nil {
		return nil, 0, fmt.Errorf("the process that reads: %w", err)
	}
	err = json.Unmarshal(r.result.Bytes(), &waited)
	return waited, r.process.ProcessState.UserTime() + r.process.ProcessState.SystemTime(), err
}

// serveReader is the process that reads: until its input ends.
func serveReader(in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	r := &reader{samples: make(map[string][]time.Duration)}
	if !lines.Scan() {
		return errors.New("nobody said where the controller is")
	}
	if err := json.Unmarshal(lines.Bytes(), &r.client); err != nil {
		return err
	}
	if err := r.client.open(); err != nil {
		return err
	}
	ctx, enough := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for range readers {
		all.Go(func() { r.ask(ctx) })
	}
	for lines.Scan() {
		r.know(lines.Text())
	}
	enough()
	all.Wait()
	waited := make(map[string]latency, len(r.samples))
	for kind, samples := range r.samples {
		waited[kind] = latencyOf(samples)
	}
	return errors.Join(r.failed, lines.Err(), json.NewEncoder(out).Encode(waited))
}

// reader is what the clients of one process that reads share.
type reader struct {
	client client

	mu      sync.Mutex
	jobs    []string
	samples map[string][]time.Duration // by kind
	failed  error                      // the first
}

func (r *reader) know(job string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.jobs = append(r.jobs, job)
}

// ask reads all kinds in turn until ctx ends.
func (r *reader) ask(ctx context.Context) {
	for ctx.Err() == nil {
		for kind, path := range r.questions() {
			at := time.Now()
			_, err := r.client.call(ctx, http.MethodGet, path, nil)
			took := time.Since(at)
			if ctx.Err() != nil {
				return
			}
			r.note(kind, took, err)
			select {
			case <-time.After(readPause):
			case <-ctx.Done():
				return
			}
		}
	}
}

func (r *reader) note(kind string, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = cmp.Or(r.failed, err)
	r.samples[kind] = append(r.samples[kind], took)
}

// questions are what the readers ask.
func (r *reader) questions() map[string]string {
	asked := map[string]string{
		"jobs, a page of 100": "/v1/jobs?limit=100", "nodes, a page of 100": "/v1/nodes?limit=100", "operations, a page of 100": "/v1/operations?limit=100",
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.jobs) > 0 {
		asked["one job"] = "/v1/jobs/" + r.jobs[rand.IntN(len(r.jobs))]
	}
	return asked
}
