package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dormouse/api/agentpb"
)

func TestRenewalIsDueInTheTenthOfTheLifeBeforeTwoThirds(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const life = 30 * 24 * time.Hour
	days := make(map[int]bool)
	for range 1000 {
		number, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
		must(t, err)
		certificate := &x509.Certificate{SerialNumber: number, NotBefore: begin, NotAfter: begin.Add(life)}
		due := renewalDue(certificate)
		if at := due.Sub(begin); at < 17*24*time.Hour-time.Second || at > 20*24*time.Hour {
			t.Fatalf("serial number %x: due after %s", number, at)
		}
		if again := renewalDue(certificate); !again.Equal(due) {
			t.Fatalf("serial number %x: due on %s and on %s", number, due, again)
		}
		days[int(due.Sub(begin)/(24*time.Hour))] = true
	}
	if len(days) < 3 {
		t.Errorf("1000 renewals are not spread over the three days, but over %v", days)
	}
}

func TestRenewalDueOfAnySerialNumber(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, number := range []int64{0, 1, 1 << 62} {
		due := renewalDue(&x509.Certificate{SerialNumber: big.NewInt(number), NotBefore: begin, NotAfter: begin.Add(time.Hour)})
		if at := due.Sub(begin); at < 34*time.Minute-time.Second || at > 40*time.Minute {
			t.Errorf("serial number %d: due after %s", number, at)
		}
	}
}

func TestFailedRenewalIsTriedAgainManyTimesBeforeTheEnd(t *testing.T) {
	for _, left := range []time.Duration{20 * time.Minute, 10 * 24 * time.Hour} {
		tries := 0
		for ; left > 0; tries++ {
			left -= renewPause(left)
		}
		if tries < 15 {
			t.Errorf("only %d tries", tries)
		}
	}
}

// aged replaces the certificate of a node whose agent does not run by one that is
// due to be renewed, and returns its serial number.
func (n *node) aged() string {
	n.c.t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	must(n.c.t, err)
	a := &Agent{config: Config{State: n.state}}
	must(n.c.t, a.keepCertificate(key, n.c.certify(n.name, public, 2*time.Hour)))
	return n.kept().certificate.Leaf.SerialNumber.String()
}

func (n *node) kept() *identity {
	n.c.t.Helper()
	id, err := loadIdentity(n.state)
	must(n.c.t, err)
	return id
}

// awaitRenewed waits until the node says hello with the certificate that was given
// out last.
func (c *controller) awaitRenewed() {
	c.t.Helper()
	c.await("a hello with the renewed certificate", func() bool {
		return len(c.issued) > 1 && len(c.shown) > 0 && c.shown[len(c.shown)-1] == c.issued[len(c.issued)-1]
	})
}

func TestAgentRenewsItsCertificateAndItsTasksRunOn(t *testing.T) {
	c := newController(t)
	n := c.addNode("east-0")
	ref := c.start("east-0", "j-renew", counter())
	c.awaitLog("east-0", ref, "10 lines", counted(10))
	n.kill()
	n.aged()
	old := n.kept()
	n.spawn()
	c.awaitRenewed()

	kept := n.kept()
	if kept.certificate.Leaf.Equal(old.certificate.Leaf) || bytes.Equal(kept.certificate.Leaf.RawSubjectPublicKeyInfo, old.certificate.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("the certificate was renewed with the old key")
	}
	info, err := os.Stat(filepath.Join(n.state, identityFile))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %o, expected 600", info.Mode().Perm())
	}
	last, err := countsUp(c.logs("east-0", ref, false))
	must(t, err)
	if _, err := countsUp(c.awaitLog("east-0", ref, "more lines after the renewal", counted(last+10))); err != nil {
		t.Error(err)
	}
	c.mustDo("east-0", ref, &agentpb.DestroyTask{})
}

func TestExpiredCertificateSaysHowToJoinAgain(t *testing.T) {
	c := newController(t)
	n := &node{c: c, name: "east-0", state: t.TempDir()}
	must(t, os.WriteFile(filepath.Join(n.state, caFile), readAll(t, filepath.Join(c.dir, "ca.pem")), 0o600))
	n.aged()
	end := n.kept().end()
	a := &Agent{
		config: Config{Node: "east-0", Cloud: "test", State: n.state, Join: "unix://" + c.socket(), CA: filepath.Join(c.dir, "ca.pem")},
		log:    slog.New(slog.DiscardHandler), after: time.After,
	}
	var err error
	a.masters, err = parseControllers(a.config.Join, "")
	must(t, err)

	a.now = func() time.Time { return end.Add(clockMargin / 2) }
	if err := a.join(t.Context()); err != nil {
		t.Errorf("by a clock that is a little ahead: %v", err)
	}
	a.now = func() time.Time { return end.Add(clockMargin * 2) }
	for token, why := range map[string]string{"": "a join token is needed", "old": "the join token is wrong"} {
		a.config.Token = token
		for what, join := range map[string]error{"at its start": a.join(t.Context()), "while it runs": a.stillGood(t.Context())} {
			for _, want := range []string{"east-0", end.UTC().Format(time.RFC3339), why, "dormouse agent --token-file"} {
				if join == nil || !strings.Contains(join.Error(), want) {
					t.Errorf("%s, with the token %q: expected %q in %v", what, token, want, join)
				}
			}
		}
	}
	a.config.Token = "open sesame"
	must(t, a.stillGood(t.Context()))
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := n.kept().certificate.Leaf.SerialNumber.String(); len(c.issued) != 1 || got != c.issued[0] {
		t.Errorf("the agent keeps %s, and was given %v", got, c.issued)
	}
}

func TestIdentityOfAnAgentThatKeptKeyAndCertificateApartIsFound(t *testing.T) {
	c := newController(t)
	n := &node{c: c, name: "east-0", state: t.TempDir()}
	if _, err := loadIdentity(n.state); !os.IsNotExist(err) {
		t.Fatalf("in an empty directory: expected %v, got %v", fs.ErrNotExist, err)
	}
	want := n.agedApart()
	if got := n.kept().certificate.Leaf.SerialNumber.String(); got != want {
		t.Errorf("expected certificate %s, got %s", want, got)
	}
}

// agedApart keeps an identity as agents before did.
func (n *node) agedApart() string {
	t := n.c.t
	t.Helper()
	must(t, os.WriteFile(filepath.Join(n.state, caFile), readAll(t, filepath.Join(n.c.dir, "ca.pem")), 0o600))
	number := n.aged()
	both := filepath.Join(n.state, identityFile)
	text := readAll(t, both)
	for _, name := range []string{apart.certificate, apart.key} { // PEM: each reader takes its block
		must(t, os.WriteFile(filepath.Join(n.state, name), text, 0o600))
	}
	must(t, os.Remove(both))
	return number
}

func readAll(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	return text
}
