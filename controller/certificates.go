package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"dormouse/api/agentpb"
	"dormouse/controller/store"
)

// replacedGrace is how long a replaced certificate is good after the new one was
// shown: what the agent began on an older connection still arrives.
const replacedGrace = time.Minute

// certificates are the serial numbers of those that a node's agent may show: the
// one it was given last and, since it may have died before it kept that one, the
// one that it showed when it asked. The rest is revoked, whatever its end. Empty
// for nodes that joined before serial numbers were recorded.
type certificates struct {
	Last     string `json:"last,omitempty"`
	Replaced string `json:"replaced,omitempty"`
	// Until is the end of Replaced; zero while Last has not been shown.
	Until time.Time `json:"until,omitzero"`
}

func serial(certificate *x509.Certificate) string { return certificate.SerialNumber.Text(16) }

// accept reports whether the certificate with the serial number shown may be used
// now, and whether that changed what will be.
func (k *certificates) accept(shown string, now time.Time) (ok, changed bool) {
	switch {
	case k.Last == "":
		return true, false
	case shown == k.Last:
		changed = k.Replaced != "" && k.Until.IsZero()
		if changed {
			k.Until = now.Add(replacedGrace)
		}
		return true, changed
	default:
		return shown == k.Replaced && (k.Until.IsZero() || now.Before(k.Until)), false
	}
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
	id := shown.Subject.CommonName
	var changed bool
	err := c.store.View(ctx, func(tx store.Tx) (err error) { // spares the writers' lock
		_, changed, err = c.checkCertificate(tx, shown)
		return err
	})
	if err == nil && changed {
		err = c.store.Update(ctx, func(tx store.Tx) error {
			n, changed, err := c.checkCertificate(tx, shown)
			if err != nil || !changed {
				return err
			}
			return store.Put(tx, store.Nodes, id, n)
		})
	}
	return agentStatus(err)
}

// checkCertificate returns the record of the node that shown is for, with what is
// to be kept of its having been shown.
func (c *Controller) checkCertificate(tx store.Tx, shown *x509.Certificate) (nodeRecord, bool, error) {
	id := shown.Subject.CommonName
	n, err := store.Get[nodeRecord](tx, store.Nodes, id)
	if errors.Is(err, store.ErrNotFound) {
		return n, false, refused("node %s is not known: it must join first, with a join token", id)
	}
	if err != nil {
		return n, false, err
	}
	ok, changed := n.Certificates.accept(serial(shown), c.clock.Now())
	if !ok {
		return n, false, refused("the certificate of node %s was replaced by a newer one and is refused: if no other agent runs under this name, stop the agent, remove node.* in its state directory, and start it with a join token", id)
	}
	return n, changed, nil
}

// agentStatus is err as agents get it.
func agentStatus(err error) error {
	var p *problem
	switch {
	case err == nil:
		return nil
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
	certificate, err := c.parts.PKI.SignAgent(id, request.GetCsr(), c.parts.AgentLife)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	err = c.store.Update(ctx, func(tx store.Tx) error {
		n, _, err := c.checkCertificate(tx, shown)
		if err != nil {
			return err
		}
		n.Certificates = certificates{Last: serial(certificate), Replaced: serial(shown)}
		return store.Put(tx, store.Nodes, id, n)
	})
	if err != nil {
		return nil, agentStatus(fmt.Errorf("renew the certificate of node %s: %w", id, err))
	}
	c.log.Info("certificate renewed", "node", id, "until", certificate.NotAfter)
	return &agentpb.RenewResponse{Certificate: certificate.Raw}, nil
}
