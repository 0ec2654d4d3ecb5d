package access

import (
	"sync"
	"time"
)

// mostBuckets bounds the memory of a Limiter.
const mostBuckets = 10_000

// Limiter bounds how often each of many askers may ask: each has a bucket of
// Burst tokens, of which a request takes one, and which fills at Rate a second.
// It is safe for concurrent use.
type Limiter struct {
	rate, burst float64

	mu      sync.Mutex
	buckets map[string]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

// NewLimiter makes a Limiter of rate requests a second, and bursts of burst.
func NewLimiter(rate, burst float64) *Limiter {
	return &Limiter{rate: rate, burst: max(burst, 1), buckets: make(map[string]bucket)}
}

// Take takes one token for who. When there is none, it reports after how long
// there will be.
func (l *Limiter) Take(who string, now time.Time) (wait time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, known := l.buckets[who]
	if !known {
		l.makeRoom(now)
		b = bucket{left: l.burst, at: now}
	}
	b.left = l.filled(b, now)
	b.at = now
	if ok = b.left >= 1; ok {
		b.left--
	} else {
		wait = time.Duration((1 - b.left) / l.rate * float64(time.Second))
	}
	l.buckets[who] = b
	return wait, ok
}

// Return gives back the token that was taken last: it need not have been.
func (l *Limiter) Return(who string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b, known := l.buckets[who]; known {
		b.left = min(b.left+1, l.burst)
		l.buckets[who] = b
	}
}

func (l *Limiter) filled(b bucket, now time.Time) float64 {
	return min(l.burst, b.left+max(now.Sub(b.at).Seconds(), 0)*l.rate)
}

// makeRoom forgets the buckets that are full again, as new ones would be; and
// all when so many ask at once that there are no such.
func (l *Limiter) makeRoom(now time.Time) {
	if len(l.buckets) < mostBuckets {
		return
	}
	for who, b := range l.buckets {
		if l.filled(b, now) >= l.burst {
			delete(l.buckets, who)
		}
	}
	if len(l.buckets) >= mostBuckets {
		clear(l.buckets)
	}
}
