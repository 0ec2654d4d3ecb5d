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

// Files of an identity, all in the state directory and readable by root only.
const (
	keyFile  = "node.key"
	certFile = "node.crt"
	caFile   = "ca.crt"
)

// identity is what the agent proves itself with.
type identity struct {
	certificate tls.Certificate
	roots       *x509.CertPool
}

// loadIdentity returns the identity kept in dir, or fs.ErrNotExist.
func loadIdentity(dir string) (*identity, error) {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	if err != nil {
		return nil, err
	}
	if certificate.Leaf == nil {
		if certificate.Leaf, err = x509.ParseCertificate(certificate.Certificate[0]); err != nil {
			return nil, err
		}
	}
	if time.Now().After(certificate.Leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate in %s ran out on %s: %w",
			dir, certificate.Leaf.NotAfter.Format(time.DateOnly), fs.ErrNotExist)
	}
	roots, err := loadRoots(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	return &identity{certificate: certificate, roots: roots}, nil
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

// join returns the identity of earlier, or trades the join token for one.
func (a *Agent) join(ctx context.Context) (*identity, error) {
	id, err := loadIdentity(a.config.State)
	if err == nil {
		return id, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the node's certificate: %w", err)
	}
	token, err := a.config.joinToken()
	if err != nil {
		return nil, err
	}
	if a.config.CA == "" {
		return nil, errors.New("agent: the controller's CA certificate must be given to join")
	}
	roots, err := loadRoots(a.config.CA)
	if err != nil {
		return nil, fmt.Errorf("read the controller's CA: %w", err)
	}
	if err := a.requestIdentity(ctx, roots, token); err != nil {
		return nil, err
	}
	return loadIdentity(a.config.State)
}

func (c Config) joinToken() (string, error) {
	if c.Token != "" {
		return c.Token, nil
	}
	if c.TokenFile == "" {
		return "", errors.New("agent: this node has not joined yet: a join token is needed")
	}
	raw, err := os.ReadFile(c.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read the join token: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

// requestIdentity makes a key, has it certified and stores both. The key is
// written last, so that a half-stored identity is not taken for a whole one.
func (a *Agent) requestIdentity(ctx context.Context, roots *x509.CertPool, token string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: a.config.Node}}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
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
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name, kind string
		der        []byte
	}{
		{caFile, "CERTIFICATE", answer.GetCa()},
		{certFile, "CERTIFICATE", answer.GetCertificate()},
		{keyFile, "PRIVATE KEY", pkcs8},
	} {
		text := pem.EncodeToMemory(&pem.Block{Type: file.kind, Bytes: file.der})
		if err := writeDurably(filepath.Join(a.config.State, file.name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
