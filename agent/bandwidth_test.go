package agent

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"dormouse/repository/backend"
	"dormouse/repository/backend/backendtest"
	"dormouse/repository/backend/local"
)

func throttledLocal(t *testing.T, b bandwidth) backend.Backend {
	be, err := local.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return throttled{be, b}
}

func TestThrottledBackendIsABackend(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return throttledLocal(t, newBandwidth()) })
}

func TestUploadsGoNoFasterThanTheLimitAllTogether(t *testing.T) {
	b := newBandwidth()
	b.set(512 << 10)
	b.AllowN(time.Now(), sendAtOnce) // what may go at once has gone
	be := throttledLocal(t, b)
	const size = 128 << 10
	begun, failed := time.Now(), make(chan error)
	for _, name := range []string{"one", "two"} {
		go func() {
			failed <- be.Save(t.Context(), backend.Handle{Kind: backend.Pack, Name: name}, bytes.NewReader(make([]byte, size)), size)
		}()
	}
	if err := errors.Join(<-failed, <-failed); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 400*time.Millisecond {
		t.Errorf("256 KiB at 512 KiB/s took %s, want half a second", took)
	}
}

func TestUploadThatWaitsForItsShareEndsWithItsContext(t *testing.T) {
	b := newBandwidth()
	b.set(1)
	b.AllowN(time.Now(), sendAtOnce)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- throttledLocal(t, b).Save(ctx, backend.Handle{Kind: backend.Pack, Name: "one"}, bytes.NewReader(make([]byte, 100)), 100)
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("want the end of the context, got %v", err)
	}
}

func TestLimitOfZeroIsNone(t *testing.T) {
	b := newBandwidth()
	b.set(1)
	b.set(0)
	begun := time.Now()
	const size = 8 << 20
	if err := throttledLocal(t, b).Save(t.Context(), backend.Handle{Kind: backend.Pack, Name: "one"}, bytes.NewReader(make([]byte, size)), size); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > time.Minute {
		t.Errorf("8 MiB without a limit took %s", took)
	}
}
