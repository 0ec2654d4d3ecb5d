package agent

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"dormouse/api/agentpb"
	"dormouse/internal/failpoint"
)

// A certificate is renewed in the tenth of its life that ends at two thirds of
// it. When is told by its serial number, which is random: nodes that joined
// together do not renew together, and an agent that starts anew keeps to it.
const (
	renewBefore = 2.0 / 3
	renewSpread = 1.0 / 10
)

// Pauses of renewals.
const (
	// longestNap bounds each wait for the day: timers stand still while the
	// machine sleeps, and somebody may set its clock.
	longestNap = time.Hour
	// After a renewal that failed the next is tried when a tenth of what is left
	// of the certificate has passed, within these bounds.
	shortestRenewPause = time.Minute
	longestRenewPause  = time.Hour
	renewTimeout       = 20 * time.Second
)

// errRenewed ends a session for one that shows the new certificate.
var errRenewed = errors.New("the certificate was renewed")

// renewalDue is when a certificate is to be renewed.
func renewalDue(certificate *x509.Certificate) time.Time {
	life := certificate.NotAfter.Sub(certificate.NotBefore)
	var random [8]byte
	number := certificate.SerialNumber.Bytes()
	copy(random[:], number[max(0, len(number)-8):])
	early := float64(binary.BigEndian.Uint64(random[:])) / (1 << 64) * renewSpread
	return certificate.NotBefore.Add(time.Duration((renewBefore - early) * float64(life)))
}

// renewPause is how long to wait after a renewal failed with so much left.
func renewPause(left time.Duration) time.Duration {
	return min(max(left/10, shortestRenewPause), longestRenewPause)
}

// renewCertificates keeps the agent's certificate from running out until ctx ends.
func (a *Agent) renewCertificates(ctx context.Context) {
	for {
		id := a.identity.Load()
		wait := renewalDue(id.certificate.Leaf).Sub(a.now())
		if wait <= 0 {
			wait = a.renewNow(ctx, id)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.after(min(wait, longestNap)):
		}
	}
}

// renewNow renews the certificate of id and returns how long to wait before
// looking again.
func (a *Agent) renewNow(ctx context.Context, id *identity) time.Duration {
	left := id.end().Sub(a.now())
	if id.ended(a.now()) {
		return shortestRenewPause // the next session joins again
	}
	err := a.renew(ctx)
	if err == nil {
		a.log.Info("renewed the certificate", "until", a.identity.Load().end())
		return shortestRenewPause // however wrong the clock is
	}
	pause := renewPause(left)
	if ctx.Err() == nil {
		a.log.Error("cannot renew the certificate", "until", id.end(), "error", err, "again_in", pause)
	}
	return pause
}

// renew trades the certificate for one with a new key. A kill at any instant
// leaves the agent with one that the controller accepts: the old one until it has
// seen the new one.
func (a *Agent) renew(ctx context.Context) error {
	key, csr, err := a.certificateRequest()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	client, to, err := a.masters.client(a.mutualTLS())
	if err != nil {
		return err
	}
	answer, err := client.Renew(ctx, &agentpb.RenewRequest{Csr: csr})
	if err != nil {
		return fmt.Errorf("ask controller %s: %w", to.address, err)
	}
	failpoint.Hit("agent.renew.issued")
	if err := a.keepCertificate(key, answer.GetCertificate()); err != nil {
		return fmt.Errorf("keep the new one: %w", err)
	}
	failpoint.Hit("agent.renew.kept")
	id, err := loadIdentity(a.config.State)
	if err != nil {
		return fmt.Errorf("read the new one: %w", err)
	}
	a.identity.Store(id)
	a.masters.retire()
	a.endSession(errRenewed)
	return nil
}
