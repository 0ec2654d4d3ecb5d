package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"dormouse/api"
	"dormouse/api/agentpb"
)

// controllers are where the agent may find the controller that leads: as the
// configuration names them, one after the other, but first where one that does
// not lead says. What it says is believed, because whoever answers there must
// show the same authority's certificate.
type controllers struct {
	known      []endpoint
	serverName string

	mu          sync.Mutex
	at          int                         // of known, tried now or next
	hint        *endpoint                   // tried before it
	connections map[string]*grpc.ClientConn // by address
	retired     []*grpc.ClientConn          // which only go on with what they carry
}

// parseControllers reads one or more addresses with commas between them.
func parseControllers(text, serverName string) (*controllers, error) {
	c := &controllers{serverName: serverName, connections: make(map[string]*grpc.ClientConn)}
	for _, one := range strings.Split(text, ",") {
		known, err := parseEndpoint(strings.TrimSpace(one), serverName)
		if err != nil {
			return nil, err
		}
		c.known = append(c.known, known)
	}
	return c, nil
}

// several reports whether there is another controller to go to.
func (c *controllers) several() bool { return len(c.known) > 1 }

// now is the one to talk to.
func (c *controllers) now() endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hint != nil {
		return *c.hint
	}
	return c.known[c.at]
}

// failed goes on to the next one: to the leader that trailer names, if it does.
func (c *controllers) failed(trailer metadata.MD) {
	c.mu.Lock()
	defer c.mu.Unlock()
	hinted := c.hint != nil
	c.hint = nil
	if named := trailer.Get(api.LeaderHeader); len(named) == 1 {
		if leader, err := parseEndpoint(named[0], c.serverName); err == nil {
			c.hint = &leader
			return
		}
	}
	if !hinted {
		c.at = (c.at + 1) % len(c.known)
	}
}

// client talks to the present controller, on a connection that lasts until close.
func (c *controllers) client(config *tls.Config) (agentpb.AgentServiceClient, endpoint, error) {
	to := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	connection := c.connections[to.address]
	if connection == nil {
		var err error
		if connection, err = to.connect(config); err != nil {
			return nil, to, err
		}
		c.connections[to.address] = connection
	}
	return agentpb.NewAgentServiceClient(connection), to, nil
}

// retire has everything new begin on new connections. gRPC hangs up by itself on
// those that have been without a stream for half an hour.
func (c *controllers) retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retired = slices.DeleteFunc(c.retired, func(connection *grpc.ClientConn) bool {
		done := connection.GetState() == connectivity.Idle
		if done {
			connection.Close()
		}
		return done
	})
	for address, connection := range c.connections {
		c.retired = append(c.retired, connection)
		delete(c.connections, address)
	}
}

func (c *controllers) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, connection := range c.retired {
		connection.Close()
	}
	c.retired = nil
	for address, connection := range c.connections {
		connection.Close()
		delete(c.connections, address)
	}
}

// ask calls one controller after the other until one that leads has answered, for
// as long as ctx lasts.
func (c *controllers) ask(ctx context.Context, config *tls.Config, call func(context.Context, agentpb.AgentServiceClient, ...grpc.CallOption) error) error {
	var last error
	for {
		client, to, err := c.client(config)
		if err != nil {
			return err
		}
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		var trailer metadata.MD
		err = call(attempt, client, grpc.Trailer(&trailer), grpc.WaitForReady(true))
		cancel()
		code := status.Code(err)
		if err == nil || code != codes.Unavailable && code != codes.DeadlineExceeded {
			return err
		}
		if last == nil || ctx.Err() == nil {
			last = fmt.Errorf("%s: %w", to.address, err)
		}
		c.failed(trailer)
		select {
		case <-ctx.Done():
			return last
		case <-time.After(firstPause):
		}
	}
}
