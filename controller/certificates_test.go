package controller

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

// numbered is a certificate of a generation.
func numbered(generation, random int64) *x509.Certificate {
	number := new(big.Int).Lsh(big.NewInt(generation), 64)
	return &x509.Certificate{SerialNumber: number.Add(number, big.NewInt(random))}
}

func TestReplacedCertificateIsGoodUntilTheNewOneWasShown(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	first, second := numbered(1, 5), numbered(2, 6)
	k := certificates{Generation: 2, Last: serial(second), Replaced: serial(first)}
	for _, step := range []struct {
		after time.Duration
		shown *x509.Certificate
		want  bool
	}{
		{0, first, true},
		{300 * 24 * time.Hour, first, true}, // the agent died before it kept the second, and was off
		{time.Second, second, true},
		{replacedGrace / 2, first, true},
		{time.Second, second, true}, // which does not begin the grace anew
		{replacedGrace / 2, first, false},
		{0, second, true},
		{0, numbered(1, 7), false}, // one that was lost on its way to the agent
		{0, numbered(2, 7), false},
	} {
		now = now.Add(step.after)
		if got := k.accept(step.shown, now); got != step.want {
			t.Errorf("%s: serial %s: want %v, got %v with %+v", now, serial(step.shown), step.want, got, k)
		}
	}
}

func TestCertificateThatIsNewerThanTheStoreIsBelieved(t *testing.T) {
	backup := certificates{Generation: 2, Last: serial(numbered(2, 1)), Replaced: serial(numbered(1, 1))}
	if !backup.accept(numbered(3, 9), time.Now()) {
		t.Fatal("after the restore of a back-up the agent's certificate is refused")
	}
	if backup.accept(numbered(2, 1), time.Now()) {
		t.Error("the certificate before it is still believed")
	}
}

// renew asks for a certificate by showing the one of a.
func (a *simAgent) renew(ctx context.Context) (*tls.Certificate, error) {
	conn, err := a.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	response, err := agentpb.NewAgentServiceClient(conn).Renew(ctx, &agentpb.RenewRequest{Csr: csr})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{response.GetCertificate()}, PrivateKey: key}, nil
}

// sayHello opens a stream that shows the certificate of a, and closes it.
func (a *simAgent) sayHello(ctx context.Context) error {
	conn, err := a.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := agentpb.NewAgentServiceClient(conn).Connect(ctx)
	if err != nil {
		return err
	}
	stream.Send(&agentpb.FromAgent{Body: &agentpb.FromAgent_Hello{Hello: &agentpb.Hello{Node: a.node, Cloud: a.cloud}}})
	_, err = stream.Recv()
	return err
}

func (a *simAgent) showing(certificate *tls.Certificate) *simAgent {
	return &simAgent{world: a.world, node: a.node, cloud: a.cloud, certificate: certificate}
}

// renewable is a node that has joined, with its first certificate.
func renewable(t *testing.T, s *simulation) *simAgent {
	t.Helper()
	a := &simAgent{world: s.world, node: "metal-0", cloud: "metal"}
	if err := a.join(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a
}

func mustRenew(t *testing.T, a *simAgent) *simAgent {
	t.Helper()
	certificate, err := a.renew(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a.showing(certificate)
}

func wantRefused(t *testing.T, what string, err error, text string) {
	t.Helper()
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: want a refusal with %q, got %v", what, text, err)
	}
}

func TestAgentThatDiedBeforeItKeptItsNewCertificateRenewsAgain(t *testing.T) {
	s := newSimulation(t)
	first := renewable(t, s)
	lost := mustRenew(t, first)
	s.restart() // and the controller, right after the renewal
	kept := mustRenew(t, first)
	if err := first.sayHello(t.Context()); err != nil {
		t.Errorf("with the first certificate, while the new one was not shown: %v", err)
	}
	if err := kept.sayHello(t.Context()); err != nil {
		t.Errorf("with the new certificate: %v", err)
	}
	wantRefused(t, "the certificate that nobody kept", lost.sayHello(t.Context()), "was replaced by a newer one")
	_, err := lost.renew(t.Context())
	wantRefused(t, "a renewal by it", err, "was replaced by a newer one")
	mustRenew(t, kept)
	wantRefused(t, "the first certificate, two renewals later", first.sayHello(t.Context()), "--token-file")
}

func TestJoiningAgainRevokesWhatTheNodeHadBefore(t *testing.T) {
	s := newSimulation(t)
	stolen := renewable(t, s)
	again := renewable(t, s)
	wantRefused(t, "the certificate of before", stolen.sayHello(t.Context()), "was replaced by a newer one")
	if err := again.sayHello(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCertificateOfANodeThatIsNotKnownIsRefused(t *testing.T) {
	s := newSimulation(t)
	a := renewable(t, s)
	err := s.store.Update(t.Context(), func(tx store.Tx) error { return tx.Delete(store.Nodes, a.node) })
	if err != nil {
		t.Fatal(err)
	}
	wantRefused(t, "connect", a.sayHello(t.Context()), "must join again")
	_, err = a.renew(t.Context())
	wantRefused(t, "renew", err, "must join again")
	conn, err := a.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := agentpb.NewAgentServiceClient(conn).Attach(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	wantRefused(t, "attach", err, "must join again")
}

func TestRenewalNeedsACertificateAndAGoodRequest(t *testing.T) {
	s := newSimulation(t)
	a := renewable(t, s)
	_, err := a.showing(nil).renew(t.Context())
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a certificate: %v", err)
	}
	conn, err := a.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = agentpb.NewAgentServiceClient(conn).Renew(t.Context(), &agentpb.RenewRequest{Csr: []byte("x")})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "metal-0") {
		t.Errorf("a bad request: want it refused with the node named, got %v", err)
	}
	if err := a.sayHello(t.Context()); err != nil {
		t.Errorf("after a refused renewal: %v", err)
	}
}

func TestLifeOfAgentsCertificatesIsBounded(t *testing.T) {
	for life, ok := range map[time.Duration]bool{0: true, time.Hour: true, 59 * time.Minute: false, 6 * 365 * 24 * time.Hour: false} {
		c := Config{State: t.TempDir(), AgentCertificates: life}
		err := c.complete()
		if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "agent_certificates") {
			t.Errorf("%s: %v", life, err)
		}
	}
}
