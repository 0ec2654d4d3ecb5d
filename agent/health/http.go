package health

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"dormouse/monitor/policy"
)

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 64 << 10

// HTTP asks the target at address by connections that dial makes.
func HTTP(dial func(context.Context, netip.AddrPort) (net.Conn, error), address netip.Addr, target policy.Target) Probe {
	to := netip.AddrPortFrom(address, target.Port)
	return func(ctx context.Context) error {
		conn, err := dial(ctx, to)
		if err != nil {
			return err
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		status, err := get(conn, to, target.Path)
		if err != nil {
			return fmt.Errorf("ask %s: %w", to, err)
		}
		if status < 200 || status > 399 {
			return fmt.Errorf("%s answers with status %d", to, status)
		}
		return nil
	}
}

// get asks for a path, and reads what comes until the end or the bound, so that
// the connection ends without a reset.
func get(conn net.Conn, to netip.AddrPort, path string) (status int, err error) {
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: dormouse-health\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, to)
	if err != nil {
		return 0, err
	}
	limited := io.LimitReader(conn, maxAnswer)
	answer, err := http.ReadResponse(bufio.NewReader(limited), nil)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	// A body that does not come is no matter: the status has.
	_, _ = io.Copy(io.Discard, answer.Body)
	return answer.StatusCode, nil
}
