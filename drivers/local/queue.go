package local

import (
	"context"
	"sync"

	"dormouse/drivers"
)

// queue hands events to one slow reader without losing any or holding up
// those who add.
type queue struct {
	mu     sync.Mutex
	events []drivers.Event
	closed bool
	wake   chan struct{} // holds a token while there is something to see
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) add(e drivers.Event) {
	q.mu.Lock()
	q.events = append(q.events, e)
	q.mu.Unlock()
	q.signal()
}

func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue) take() (events []drivers.Event, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	events, q.events = q.events, nil
	return events, q.closed
}

// channel returns the events from the first one on.
func (q *queue) channel(ctx context.Context) <-chan drivers.Event {
	out := make(chan drivers.Event)
	go func() {
		defer close(out)
		for {
			events, closed := q.take()
			for _, e := range events {
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			}
			if closed {
				return
			}
			select {
			case <-q.wake:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
