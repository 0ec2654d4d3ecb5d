// Package etcdtest runs real etcd servers for tests: one member each, with a
// data directory of its own, on loopback ports that the kernel picked.
package etcdtest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"dormouse/internal/child"
)

// unpacked is where setup/etcd.sh puts the program.
const unpacked = "/opt/dormouse/etcd/bin/etcd"

// Server is an etcd that a test owns.
type Server struct {
	URL string // for clients

	program, peer string
	data, log     string
	tls           *tls.Config // of clients; nil: http
	arguments     []string
	command       *exec.Cmd
	exited        chan struct{}
}

// program finds etcd. Without one the test is skipped, but fails where CI is true.
func program(t testing.TB) string {
	t.Helper()
	if path, err := exec.LookPath("etcd"); err == nil {
		return path
	}
	if _, err := os.Stat(unpacked); err == nil {
		return unpacked
	}
	missing := "there is no etcd: `make setup` gets it"
	if os.Getenv("CI") == "true" {
		t.Fatal(missing)
	}
	t.Skip(missing)
	return ""
}

// Start starts an etcd, with further arguments when given, which ends with the test.
func Start(t testing.TB, arguments ...string) *Server { return start(t, "http", nil, arguments) }

// StartTLS starts an etcd with a certificate of an authority, which asks its
// clients for one of the same.
func StartTLS(t testing.TB, authority *Authority) *Server {
	t.Helper()
	cert, key := authority.Issue(t, "server")
	return start(t, "https", authority.config(t), []string{"--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", authority.CA})
}

func start(t testing.TB, scheme string, config *tls.Config, arguments []string) *Server {
	t.Helper()
	dir := t.TempDir()
	s := &Server{program: program(t), data: filepath.Join(dir, "data"), log: filepath.Join(dir, "etcd.log"), tls: config, arguments: arguments}
	t.Cleanup(s.Kill)
	// A port that was free may be taken before etcd gets it.
	for attempt := 1; ; attempt++ {
		s.URL, s.peer = scheme+"://"+freeAddress(t), "http://"+freeAddress(t)
		err := s.run(t.Context())
		if err == nil {
			return s
		}
		if attempt == 3 || !strings.Contains(err.Error(), "address already in use") {
			t.Fatal(err)
		}
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// Restart starts the server again after Kill, with what it had stored.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	if err := s.run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (s *Server) run(ctx context.Context) error {
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.command = exec.Command(s.program, append([]string{
		"--data-dir", s.data, "--name", "test",
		"--listen-client-urls", s.URL, "--advertise-client-urls", s.URL,
		"--listen-peer-urls", s.peer, "--initial-advertise-peer-urls", s.peer, "--initial-cluster", "test=" + s.peer,
	}, s.arguments...)...)
	s.command.Stdout, s.command.Stderr = log, log
	// A group of its own: an interrupt of the tests is for the tests to act on.
	s.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := child.Start(s.command, syscall.SIGKILL); err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	s.exited = make(chan struct{})
	go func() {
		s.command.Wait() // how it ended is in its log
		close(s.exited)
	}()
	if err := s.answers(ctx); err != nil {
		s.Kill()
		text, _ := os.ReadFile(s.log)
		return fmt.Errorf("etcd did not start: %w\n%s", err, text)
	}
	return nil
}

// answers waits for the server to serve.
func (s *Server) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{s.URL}, TLS: s.tls, Logger: zap.NewNop(), DialTimeout: 30 * time.Second})
	if err != nil {
		return err
	}
	defer client.Close()
	for {
		attempt, done := context.WithTimeout(ctx, time.Second)
		_, err := client.Get(attempt, "anything")
		done()
		if err == nil {
			return nil
		}
		select {
		case <-s.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Kill ends the server as a power cut would, if it runs.
func (s *Server) Kill() {
	if s.command == nil || s.command.Process == nil {
		return
	}
	s.command.Process.Kill() // fails when it has ended
	<-s.exited
}

// Pause stops the server where it is, and Continue lets it go on: to whoever
// talks to it, it is as if the network was cut.
func (s *Server) Pause() error { return s.command.Process.Signal(syscall.SIGSTOP) }

// Continue undoes Pause.
func (s *Server) Continue() error { return s.command.Process.Signal(syscall.SIGCONT) }

// Client is a client of the server, to look and to meddle; it ends with the test.
func (s *Server) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{s.URL}, TLS: s.tls, Logger: zap.NewNop(), DialTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}
