// Package pki holds the controller's keys: its certificate authority, its
// server certificate, and the key that signs checkpoints' manifests.
//
// All live in one directory, each key in a file that only its owner may read:
//
//	ca.pem, ca.key          the authority that signs the server's and all agents' certificates
//	server.pem, server.key  what the listener shows; made anew when its names change or its end is
//	                        near, also while the controller runs
//	manifest.key            ed25519 key of manifests (PKCS #8, PEM); losing it makes checkpoints unusable
//	manifest.pub            its public half
//
// An agent's certificate has the node's id as its common name; the controller
// believes nothing else about who an agent is. Which of a node's certificates it
// believes is in the node's record: their serial numbers rise.
//
// The authority's own certificate is made once and lasts for twenty years.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// ServerName is in every server certificate, so that it can be reached by any
// address (a unix socket, a tunnel) and still be checked.
const ServerName = "dormouse"

const (
	caLife     = 20 * 365 * 24 * time.Hour
	serverLife = 2 * 365 * 24 * time.Hour
	renewAhead = 60 * 24 * time.Hour
	clockSkew  = 5 * time.Minute // certificates begin so much in the past
)

// The life of agents' certificates. Agents renew them by themselves, so a short
// one costs little; the least leaves them room beyond the difference of clocks.
const (
	AgentLife      = 30 * 24 * time.Hour // unless the operator says otherwise
	LeastAgentLife = time.Hour
	MostAgentLife  = 5 * 365 * 24 * time.Hour
)

// PKI is an opened directory of keys.
type PKI struct {
	dir      string
	now      func() time.Time
	ca       *x509.Certificate
	caKey    crypto.Signer
	manifest ed25519.PrivateKey
}

// Open reads the keys in dir, making those that are not there.
func Open(dir string, now func() time.Time) (*PKI, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of keys: %w", err)
	}
	p := &PKI{dir: dir, now: now}
	if err := p.openCA(); err != nil {
		return nil, err
	}
	return p, p.openManifestKey()
}

// CAPath is the file of the authority's certificate.
func (p *PKI) CAPath() string { return filepath.Join(p.dir, "ca.pem") }

// CADER is the authority's certificate.
func (p *PKI) CADER() []byte { return p.ca.Raw }

// CAPEM is the authority's certificate.
func (p *PKI) CAPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.ca.Raw})
}

// Pool trusts this authority only.
func (p *PKI) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.ca)
	return pool
}

// ManifestKey signs manifests.
func (p *PKI) ManifestKey() ed25519.PrivateKey { return p.manifest }

func (p *PKI) openCA() error {
	certificate, key, err := p.load("ca")
	if errors.Is(err, fs.ErrNotExist) {
		return p.makeCA()
	}
	if err != nil {
		return err
	}
	p.ca, p.caKey = certificate, key
	return nil
}

func (p *PKI) makeCA() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make the authority's key: %w", err)
	}
	template := p.template("Dormouse CA", caLife)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("make the authority's certificate: %w", err)
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	p.caKey = key
	return p.save("ca", der, key)
}

// Server is the certificate of a listener, which is renewed while it is in use.
type Server struct {
	pki   *PKI
	hosts []string
	log   *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	again   time.Time // of the next try, after one that failed
}

// Server returns the certificate of a listener, valid for ServerName and for
// hosts, which are names or addresses.
func (p *PKI) Server(hosts []string, log *slog.Logger) (*Server, error) {
	s := &Server{pki: p, hosts: append([]string{ServerName, "localhost", "127.0.0.1", "::1"}, hosts...), log: log}
	certificate, key, err := p.load("server")
	if err == nil && p.serves(certificate, s.hosts) {
		s.current = &tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key, Leaf: certificate}
		return s, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	s.current, err = p.makeServer(s.hosts)
	return s, err
}

// Get is for tls.Config's GetCertificate. Connections made before a renewal go on.
// When it fails, the old certificate is shown to its end and the next hour's first
// connection tries again.
func (s *Server) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.pki.now()
	if now.Add(renewAhead).Before(s.current.Leaf.NotAfter) || now.Before(s.again) {
		return s.current, nil
	}
	renewed, err := s.pki.makeServer(s.hosts)
	if err != nil {
		s.again = now.Add(time.Hour)
		s.log.Error("cannot renew the controller's certificate", "until", s.current.Leaf.NotAfter, "error", err)
		return s.current, nil
	}
	s.current = renewed
	s.log.Info("the controller's certificate was renewed", "until", renewed.Leaf.NotAfter)
	return s.current, nil
}

func (p *PKI) serves(certificate *x509.Certificate, hosts []string) bool {
	if certificate.CheckSignatureFrom(p.ca) != nil || p.now().Add(renewAhead).After(certificate.NotAfter) {
		return false
	}
	return !slices.ContainsFunc(hosts, func(host string) bool { return certificate.VerifyHostname(host) != nil })
}

func (p *PKI) makeServer(hosts []string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the server's key: %w", err)
	}
	template := p.template(ServerName, serverLife)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key.Public(), p.caKey)
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	if err := p.save("server", der, key); err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}

// SignAgent signs the certificate request (PKCS #10, DER) of the agent of a
// node; the certificate ends after life. Only the request's key is used: the name
// is the controller's word. Of two certificates of one node, the one with the
// greater Generation was given later, whatever clocks did.
func (p *PKI) SignAgent(node string, csr []byte, generation uint64, life time.Duration) (*x509.Certificate, error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("the certificate request of node %s cannot be read: %w", node, err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the certificate request of node %s is not signed by its own key: %w", node, err)
	}
	template := p.template(node, life)
	template.SerialNumber = serialOf(generation)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, request.PublicKey, p.caKey)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of node %s: %w", node, err)
	}
	return x509.ParseCertificate(der)
}

// serialOf is a generation and 64 random bits, so that no serial number can be
// told beforehand.
func serialOf(generation uint64) *big.Int {
	random := make([]byte, 8)
	rand.Read(random) // never fails: it ends the program instead
	number := binary.BigEndian.AppendUint64(nil, generation)
	return new(big.Int).SetBytes(append(number, random...))
}

// Generation is the one that an agent's certificate was signed with.
func Generation(certificate *x509.Certificate) uint64 {
	return new(big.Int).Rsh(certificate.SerialNumber, 64).Uint64()
}

func (p *PKI) template(name string, life time.Duration) *x509.Certificate {
	// A serial of 128 random bits; CreateCertificate refuses one of zero.
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		serial = big.NewInt(p.now().UnixNano())
	}
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: p.now().Add(-clockSkew), NotAfter: p.now().Add(life),
	}
}

func (p *PKI) openManifestKey() error {
	name := filepath.Join(p.dir, "manifest.key")
	key, err := readKey(name)
	if errors.Is(err, fs.ErrNotExist) {
		return p.makeManifestKey(name)
	}
	if err != nil {
		return err
	}
	manifest, ok := key.(ed25519.PrivateKey)
	if !ok {
		return fmt.Errorf("the key in %s is not an ed25519 key: put back the right file", name)
	}
	p.manifest = manifest
	return nil
}

func (p *PKI) makeManifestKey(name string) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("make the manifests' key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(p.dir, "manifest.pub"), "PUBLIC KEY", der, 0o644); err != nil {
		return err
	}
	p.manifest = private
	return writeKey(name, private)
}

// load reads NAME.pem and NAME.key.
func (p *PKI) load(name string) (*x509.Certificate, crypto.Signer, error) {
	file := filepath.Join(p.dir, name+".pem")
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, fmt.Errorf("read a certificate: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, nil, fmt.Errorf("%s holds no certificate: put back the right file", file)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("%s holds a damaged certificate: %w", file, err)
	}
	key, err := readKey(filepath.Join(p.dir, name+".key"))
	return certificate, key, err
}

// save writes the key first: a certificate without its key would be worse than
// neither.
func (p *PKI) save(name string, certificate []byte, key crypto.Signer) error {
	if err := writeKey(filepath.Join(p.dir, name+".key"), key); err != nil {
		return err
	}
	return writeFile(filepath.Join(p.dir, name+".pem"), "CERTIFICATE", certificate, 0o644)
}

func readKey(file string) (crypto.Signer, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read a key: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s holds no key: put back the right file", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s holds a damaged key: %w", file, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s holds a key that cannot sign", file)
	}
	return signer, nil
}

func writeKey(file string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode a key: %w", err)
	}
	return writeFile(file, "PRIVATE KEY", der, 0o600)
}

// writeFile replaces file as a whole, so that a crash leaves the old or the new.
func writeFile(file, kind string, der []byte, mode os.FileMode) error {
	temporary, err := os.CreateTemp(filepath.Dir(file), ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	defer os.Remove(temporary.Name())
	err = errors.Join(
		temporary.Chmod(mode),
		pem.Encode(temporary, &pem.Block{Type: kind, Bytes: der}),
		temporary.Sync(),
		temporary.Close(),
	)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return os.Rename(temporary.Name(), file)
}
