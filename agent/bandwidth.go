package agent

import (
	"context"
	"io"

	"golang.org/x/time/rate"

	"dormouse/repository/backend"
)

// sendAtOnce is how much is sent to the repository without looking at the
// limit in between.
const sendAtOnce = 64 << 10

// bandwidth limits what this node sends to the repository, all uploads
// together. The controller changes the limit as uploads come and go in the
// node's cloud.
type bandwidth struct{ *rate.Limiter }

func newBandwidth() bandwidth { return bandwidth{rate.NewLimiter(rate.Inf, sendAtOnce)} }

// set limits it to so many bytes per second; 0: not at all.
func (b bandwidth) set(bytes int64) {
	limit := rate.Limit(bytes)
	if bytes <= 0 {
		limit = rate.Inf
	}
	if limit != b.Limit() {
		b.SetLimit(limit)
	}
}

// throttled is a backend to which no more is sent than the bandwidth allows.
type throttled struct {
	backend.Backend
	bandwidth bandwidth
}

// Save implements backend.Backend.
func (t throttled) Save(ctx context.Context, h backend.Handle, rd io.Reader, size int64) error {
	return t.Backend.Save(ctx, h, &throttledReader{ctx, rd, t.bandwidth}, size)
}

type throttledReader struct {
	ctx       context.Context // of the Save that reads
	rd        io.Reader
	bandwidth bandwidth
}

func (r *throttledReader) Read(p []byte) (int, error) {
	n, err := r.rd.Read(p[:min(len(p), sendAtOnce)])
	if waited := r.bandwidth.WaitN(r.ctx, n); waited != nil {
		return n, waited
	}
	return n, err
}

// WriteTo implements io.WriterTo: what lies in memory is passed on where it is.
func (r *throttledReader) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(&throttledWriter{r.ctx, w, r.bandwidth}, r.rd)
}

type throttledWriter struct {
	ctx       context.Context
	w         io.Writer
	bandwidth bandwidth
}

func (w *throttledWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		step := p[n:]
		if w.bandwidth.Limit() != rate.Inf {
			step = step[:min(len(step), sendAtOnce)]
			if err := w.bandwidth.WaitN(w.ctx, len(step)); err != nil {
				return n, err
			}
		}
		m, err := w.w.Write(step)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
