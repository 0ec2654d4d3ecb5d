package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"dormouse/api/agentpb"
	"dormouse/controller/pki"
	"dormouse/controller/store"
)

// replacedGrace is how long a replaced certificate is good after the new one was
// shown: what the agent began on an older connection still arrives.
const replacedGrace = time.Minute

// joinAgain tells how an agent gets a certificate when it has none that is good.
const joinAgain = "with node.* in its state directory removed and a join token, as in `dormouse agent --token-file FILE`"

// certificates are those that a node's agent may show: the one it was given last
// and, since it may have died before it kept that one, the one that it showed when
// it asked. Older ones are revoked, whatever their end. The zero value is of a node
// that has shown none since they are recorded.
type certificates struct {
	// Generation and Last, a serial number, are of the certificate given last.
	Generation uint64 `json:"generation,omitempty"`
	Last       string `json:"last,omitempty"`
	// Replaced is a serial number, good until Until or, while Last has not been
	// shown, without end.
	Replaced string    `json:"replaced,omitempty"`
	Until    time.Time `json:"until,omitzero"`
}

func serial(certificate *x509.Certificate) string { return certificate.SerialNumber.Text(16) }

// accept reports whether a certificate that is shown now may be used, and notes
// what follows from its having been shown.
func (k *certificates) accept(shown *x509.Certificate, now time.Time) bool {
	number, generation := serial(shown), pki.Generation(shown)
	switch {
	case k.Last == "" || generation > k.Generation:
		// Our signature under a later one than we remember: the store is a
		// back-up that is older than the certificate.
		*k = certificates{Generation: generation, Last: number}
		return true
	case number == k.Last:
		if k.Replaced != "" && k.Until.IsZero() {
			k.Until = now.Add(replacedGrace)
		}
		return true
	default:
		return number == k.Replaced && (k.Until.IsZero() || now.Before(k.Until))
	}
}

// sign makes the next certificate of a node, which the record then has as the
// last and only one.
func (c *Controller) sign(n *nodeRecord, csr []byte) (*x509.Certificate, error) {
	generation := n.Certificates.Generation + 1
	certificate, err := c.parts.PKI.SignAgent(n.ID, csr, generation, c.parts.AgentLife)
	if err != nil {
		return nil, newProblem(http.StatusBadRequest, "%v", err)
	}
	n.Certificates = certificates{Generation: generation, Last: serial(certificate)}
	return certificate, nil
}

// shownBy returns the certificate that the peer has proved to be its own. Its
// common name is the node.
func shownBy(ctx context.Context) (*x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "the stream has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return nil, status.Error(codes.Unauthenticated, "an agent must show the certificate it was given when it joined")
	}
	return info.State.VerifiedChains[0][0], nil
}

// acceptCertificate refuses a certificate that is not one of its node's any more.
// The error is a status.
func (c *Controller) acceptCertificate(ctx context.Context, shown *x509.Certificate) error {
	var changed bool
	err := c.store.View(ctx, func(tx store.Tx) (err error) { // spares the writers' lock
		_, changed, err = c.checkCertificate(tx, shown)
		return err
	})
	if err == nil && changed {
		err = c.store.Update(ctx, func(tx store.Tx) error {
			n, _, err := c.checkCertificate(tx, shown)
			if err != nil {
				return err
			}
			return store.Put(tx, store.Nodes, n.ID, n)
		})
	}
	return agentStatus(err)
}

// checkCertificate returns the record of the node that shown is for, and whether
// it changed by its having been shown.
func (c *Controller) checkCertificate(tx store.Tx, shown *x509.Certificate) (n nodeRecord, changed bool, err error) {
	id := shown.Subject.CommonName
	n, err = store.Get[nodeRecord](tx, store.Nodes, id)
	if errors.Is(err, store.ErrNotFound) {
		return n, false, refused("node %s is not known: its agent must join again, %s", id, joinAgain)
	}
	if err != nil {
		return n, false, err
	}
	before := n.Certificates
	if !n.Certificates.accept(shown, c.clock.Now()) {
		return n, false, refused("the certificate of node %s was replaced by a newer one and is refused: if no other agent runs under this name, join again, %s", id, joinAgain)
	}
	return n, n.Certificates != before, nil
}

// agentStatus is err as agents get it.
func agentStatus(err error) error {
	var p *problem
	switch {
	case err == nil:
		return nil
	case errors.As(err, &p) && p.Status == http.StatusBadRequest:
		return status.Error(codes.InvalidArgument, p.Detail)
	case errors.As(err, &p):
		return status.Error(codes.PermissionDenied, p.Detail)
	default:
		return status.Error(codes.Unavailable, err.Error())
	}
}

// Renew implements agentpb.AgentServiceServer.
func (s *agentService) Renew(ctx context.Context, request *agentpb.RenewRequest) (*agentpb.RenewResponse, error) {
	c := s.c
	shown, err := shownBy(ctx)
	if err != nil {
		return nil, err
	}
	id := shown.Subject.CommonName
	var certificate *x509.Certificate
	err = c.store.Update(ctx, func(tx store.Tx) error {
		n, _, err := c.checkCertificate(tx, shown)
		if err != nil {
			return err
		}
		if certificate, err = c.sign(&n, request.GetCsr()); err != nil {
			return err
		}
		n.Certificates.Replaced = serial(shown)
		return store.Put(tx, store.Nodes, id, n)
	})
	if err != nil {
		return nil, agentStatus(err)
	}
	c.log.Info("certificate renewed", "node", id, "until", certificate.NotAfter)
	return &agentpb.RenewResponse{Certificate: certificate.Raw}, nil
}
