package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
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
	certificate, err := p.SignAgent("east-0", request(t, "admin"), 7, time.Hour)
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
		if _, err := p.SignAgent("east-0", bad, 7, time.Hour); err == nil || !strings.Contains(err.Error(), "east-0") {
			t.Errorf("want a refusal naming the node, got %v", err)
		}
	}
}

func TestLaterCertificateHasTheGreaterGeneration(t *testing.T) {
	p := open(t, t.TempDir())
	seen := make(map[string]bool)
	for _, generation := range []uint64{0, 1, 1, 2, 1<<64 - 1} {
		certificate, err := p.SignAgent("east-0", request(t, "east-0"), generation, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if got := pki.Generation(certificate); got != generation {
			t.Errorf("want generation %d, got %d", generation, got)
		}
		if number := certificate.SerialNumber.String(); seen[number] {
			t.Errorf("serial number %s was given twice", number)
		} else {
			seen[number] = true
		}
	}
}

// shown is the certificate that a listener shows now.
func shown(t *testing.T, p *pki.PKI, hosts ...string) (*pki.Server, *x509.Certificate) {
	t.Helper()
	server, err := p.Server(hosts, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return server, get(t, server)
}

func get(t *testing.T, server *pki.Server) *x509.Certificate {
	t.Helper()
	certificate, err := server.Get(nil)
	if err != nil {
		t.Fatal(err)
	}
	return certificate.Leaf
}

func TestServerCertificateIsKeptWhileItServesTheNames(t *testing.T) {
	dir := t.TempDir()
	_, first := shown(t, open(t, dir), "10.1.2.3")
	_, again := shown(t, open(t, dir), "10.1.2.3")
	if !first.Equal(again) {
		t.Error("the certificate was made anew without need")
	}
	_, other := shown(t, open(t, dir), "controller.example")
	for _, name := range []string{"controller.example", "dormouse", "localhost", "127.0.0.1"} {
		if err := other.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
}

func TestServerCertificateIsRenewedWhileItIsInUse(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	p, err := pki.Open(dir, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	server, first := shown(t, p, "controller.example")
	now = first.NotAfter.Add(-61 * 24 * time.Hour)
	if !get(t, server).Equal(first) {
		t.Error("the certificate was renewed long before its end")
	}
	now = first.NotAfter.Add(-59 * 24 * time.Hour)
	second := get(t, server)
	if second.Equal(first) || second.NotAfter.Before(now.Add(365*24*time.Hour)) {
		t.Fatalf("59 days before its end the certificate that ends on %s was followed by one that ends on %s", first.NotAfter, second.NotAfter)
	}
	if _, err := second.Verify(x509.VerifyOptions{Roots: p.Pool(), DNSName: "controller.example", CurrentTime: now}); err != nil {
		t.Error(err)
	}
	if _, kept := shown(t, p, "controller.example"); !kept.Equal(second) {
		t.Error("a controller that is started again shows another certificate than the renewed one")
	}
}

func TestServerCertificateThatCannotBeRenewedIsShownUntilItCan(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	p, err := pki.Open(dir, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	server, first := shown(t, p)
	now = first.NotAfter.Add(-24 * time.Hour)
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	if !get(t, server).Equal(first) {
		t.Error("a certificate that is not on disk is shown")
	}
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	now = now.Add(61 * time.Minute)
	if get(t, server).Equal(first) {
		t.Error("the renewal was not tried again")
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
