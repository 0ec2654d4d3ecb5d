package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	"dormouse/api/agentpb"
)

// Files of an identity, all in the state directory and readable by root only. Key
// and certificate are one file, so that one rename replaces both.
const (
	identityFile = "node.pem"
	caFile       = "ca.crt"
)

// apart are the files of agents that kept their key and certificate apart.
var apart = struct{ certificate, key string }{"node.crt", "node.key"}

// clockMargin is how far the agent's clock may be ahead of the controller's, which
// decides whether a certificate has run out.
const clockMargin = 5 * time.Minute

// identity is what the agent proves itself with.
type identity struct {
	certificate tls.Certificate
	roots       *x509.CertPool
}

// end is when the certificate runs out.
func (id *identity) end() time.Time { return id.certificate.Leaf.NotAfter }

func (id *identity) ended(now time.Time) bool { return now.After(id.end().Add(clockMargin)) }

// loadIdentity returns the identity kept in dir, or fs.ErrNotExist.
func loadIdentity(dir string) (*identity, error) {
	file := filepath.Join(dir, identityFile)
	certificate, err := tls.LoadX509KeyPair(file, file)
	if errors.Is(err, fs.ErrNotExist) {
		certificate, err = tls.LoadX509KeyPair(filepath.Join(dir, apart.certificate), filepath.Join(dir, apart.key))
	}
	if err != nil {
		return nil, err
	}
	if certificate.Leaf == nil {
		if certificate.Leaf, err = x509.ParseCertificate(certificate.Certificate[0]); err != nil {
			return nil, err
		}
	}
	roots, err := loadRoots(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	return &identity{certificate: certificate, roots: roots}, nil
}

// mutualTLS shows the controller the identity that the agent has when the
// connection is made.
func (a *Agent) mutualTLS() *tls.Config {
	return &tls.Config{
		RootCAs: a.identity.Load().roots, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &a.identity.Load().certificate, nil
		},
	}
}

func loadRoots(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return roots, nil
}

// join takes up the identity of earlier, or trades the join token for one.
func (a *Agent) join(ctx context.Context) error {
	id, err := loadIdentity(a.config.State)
	switch {
	case err == nil && !id.ended(a.now()):
		a.identity.Store(id)
		return nil
	case err == nil:
		return a.joinAgain(ctx, id)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read the node's certificate: %w", err)
	}
	return a.joinAnew(ctx)
}

// joinAgain replaces an identity whose certificate ran out before it was renewed,
// because the agent was off or the controller was not to be reached.
func (a *Agent) joinAgain(ctx context.Context, id *identity) error {
	if err := a.joinAnew(ctx); err != nil {
		return fmt.Errorf("the certificate of node %s ran out on %s, and a new one was not to be had: %w; start the agent with a join token that is good, as in `dormouse agent --token-file FILE`",
			a.config.Node, id.end().UTC().Format(time.RFC3339), err)
	}
	return nil
}

func (a *Agent) joinAnew(ctx context.Context) error {
	token, err := a.config.joinToken()
	if err != nil {
		return err
	}
	if a.config.CA == "" {
		return errors.New("agent: the controller's CA certificate must be given to join")
	}
	roots, err := loadRoots(a.config.CA)
	if err != nil {
		return fmt.Errorf("read the controller's CA: %w", err)
	}
	if err := a.requestIdentity(ctx, roots, token); err != nil {
		return err
	}
	id, err := loadIdentity(a.config.State)
	if err != nil {
		return err
	}
	a.identity.Store(id)
	return nil
}

// stillGood joins again when the certificate has run out.
func (a *Agent) stillGood(ctx context.Context) error {
	if id := a.identity.Load(); id.ended(a.now()) {
		return a.joinAgain(ctx, id)
	}
	return nil
}

func (c Config) joinToken() (string, error) {
	if c.Token != "" {
		return c.Token, nil
	}
	if c.TokenFile == "" {
		return "", errors.New("agent: this node has no certificate: a join token is needed")
	}
	raw, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read the join token: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

// certificateRequest makes a key and asks for it to be certified. The controller
// decides on everything but the key.
func (a *Agent) certificateRequest() (key ed25519.PrivateKey, csr []byte, err error) {
	if _, key, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return nil, nil, err
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: a.config.Node}}
	csr, err = x509.CreateCertificateRequest(rand.Reader, template, key)
	return key, csr, err
}

// requestIdentity makes a key, has it certified and stores both. The authority is
// written first: without a key and certificate it is not taken for an identity.
func (a *Agent) requestIdentity(ctx context.Context, roots *x509.CertPool, token string) error {
	key, csr, err := a.certificateRequest()
	if err != nil {
		return err
	}
	defer a.masters.close()
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	var answer *agentpb.JoinResponse
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}
	err = a.masters.ask(ctx, config, func(ctx context.Context, client agentpb.AgentServiceClient, options ...grpc.CallOption) (err error) {
		answer, err = client.Join(ctx, &agentpb.JoinRequest{Token: token, Node: a.config.Node, Cloud: a.config.Cloud, Csr: csr}, options...)
		return err
	})
	if err != nil {
		return fmt.Errorf("join %s: %w", a.config.Join, err)
	}
	authority := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: answer.GetCa()})
	if err := writeDurably(filepath.Join(a.config.State, caFile), authority, 0o600); err != nil {
		return err
	}
	return a.keepCertificate(key, answer.GetCertificate())
}

// keepCertificate makes a key and its certificate those of the next start.
func (a *Agent) keepCertificate(key ed25519.PrivateKey, certificate []byte) error {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...)
	return writeDurably(filepath.Join(a.config.State, identityFile), text, 0o600)
}
