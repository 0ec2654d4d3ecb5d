package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dormouse/controller/pki"
)

func open(t *testing.T, dir string) *pki.PKI {
	t.Helper()
	p, err := pki.Open(dir, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func request(t *testing.T, name string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestAgentCertificateHasTheNodesNameWhateverWasAskedFor(t *testing.T) {
	p := open(t, t.TempDir())
	certificate, err := p.SignAgent("east-0", request(t, "admin"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if certificate.Subject.CommonName != "east-0" || certificate.IsCA {
		t.Errorf("the certificate is for %q, CA %v", certificate.Subject.CommonName, certificate.IsCA)
	}
	options := x509.VerifyOptions{Roots: p.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := certificate.Verify(options); err != nil {
		t.Errorf("as a client: %v", err)
	}
	options.KeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if _, err := certificate.Verify(options); err == nil {
		t.Error("an agent's certificate passes for a server's")
	}
}

func TestBadRequestIsRefused(t *testing.T) {
	p := open(t, t.TempDir())
	csr := request(t, "x")
	csr[len(csr)-1] ^= 1
	for _, bad := range [][]byte{nil, []byte("x"), csr} {
		if _, err := p.SignAgent("east-0", bad, time.Hour); err == nil || !strings.Contains(err.Error(), "east-0") {
			t.Errorf("want a refusal naming the node, got %v", err)
		}
	}
}

func TestServerCertificateIsKeptWhileItServesTheNames(t *testing.T) {
	dir := t.TempDir()
	first, err := open(t, dir).Server([]string{"10.1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := open(t, dir).Server([]string{"10.1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	if !first.Leaf.Equal(again.Leaf) {
		t.Error("the certificate was made anew without need")
	}
	other, err := open(t, dir).Server([]string{"controller.example"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"controller.example", "dormouse", "localhost", "127.0.0.1"} {
		if err := other.Leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	later := func() time.Time { return time.Now().Add(2*365*24*time.Hour - 24*time.Hour) }
	p, err := pki.Open(dir, later)
	if err != nil {
		t.Fatal(err)
	}
	renewed, err := p.Server([]string{"controller.example"})
	if err != nil {
		t.Fatal(err)
	}
	if renewed.Leaf.Equal(other.Leaf) {
		t.Error("a certificate that is about to end was not renewed")
	}
}

func TestDamagedFilesAreNamed(t *testing.T) {
	for _, name := range []string{"ca.pem", "ca.key", "manifest.key"} {
		dir := t.TempDir()
		open(t, dir)
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.Open(dir, time.Now); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: want an error naming it, got %v", name, err)
		}
	}
}
