package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Bounds of talking to the controller.
const (
	joinTimeout = 20 * time.Second
	// attemptTimeout bounds the try of one controller of several.
	attemptTimeout = 5 * time.Second
	// maxMessage holds the manifest of a job with many thousand tasks.
	maxMessage = 64 << 20
)

// endpoint is where the controller listens.
type endpoint struct {
	network    string // tcp or unix
	address    string // HOST:PORT or path
	serverName string
}

// parseEndpoint reads https://HOST:PORT, HOST:PORT or unix:///PATH.
func parseEndpoint(text, serverName string) (endpoint, error) {
	if path, ok := strings.CutPrefix(text, "unix://"); ok {
		if path == "" {
			return endpoint{}, fmt.Errorf("agent: %q names no socket", text)
		}
		if serverName == "" {
			serverName = "dormouse"
		}
		return endpoint{network: "unix", address: path, serverName: serverName}, nil
	}
	address := text
	if strings.Contains(text, "://") {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "https" {
			return endpoint{}, fmt.Errorf("agent: controller %q is neither https://HOST:PORT nor unix:///PATH", text)
		}
		address = u.Host
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return endpoint{}, fmt.Errorf("agent: controller %q has no port", text)
	}
	if serverName == "" {
		serverName = host
	}
	return endpoint{network: "tcp", address: address, serverName: serverName}, nil
}

// connect prepares a connection; it is dialled when first used and again
// whenever it breaks.
func (e endpoint) connect(config *tls.Config) (*grpc.ClientConn, error) {
	config = config.Clone()
	config.ServerName = e.serverName
	// gRPC would otherwise retry with pauses of up to two minutes, longer than
	// any lease.
	pauses := backoff.DefaultConfig
	pauses.BaseDelay, pauses.MaxDelay = 100*time.Millisecond, 2*time.Second
	return grpc.NewClient("passthrough:///"+e.address,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, e.network, e.address)
		}),
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithAuthority(e.serverName),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: 5 * time.Second}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
}
