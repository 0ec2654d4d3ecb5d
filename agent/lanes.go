package agent

import (
	"sync"

	"dormouse/api/agentpb"
)

// lanes run functions: those of one key one after the other in their order,
// those of different keys side by side.
type lanes struct {
	mu     sync.Mutex
	queues map[string][]func()
	wg     sync.WaitGroup
}

func newLanes() *lanes { return &lanes{queues: map[string][]func(){}} }

// run queues f behind the earlier functions of key. A key exists as long as
// it has work.
func (l *lanes) run(key string, f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	queue, busy := l.queues[key]
	l.queues[key] = append(queue, f)
	if busy {
		return
	}
	l.wg.Add(1)
	go l.work(key)
}

func (l *lanes) work(key string) {
	defer l.wg.Done()
	for {
		l.mu.Lock()
		queue := l.queues[key]
		if len(queue) == 0 {
			delete(l.queues, key)
			l.mu.Unlock()
			return
		}
		f := queue[0]
		l.queues[key] = queue[1:]
		l.mu.Unlock()
		f()
	}
}

// wait returns when nothing runs any more.
func (l *lanes) wait() { l.wg.Wait() }

// answered is how many replies are remembered. The controller repeats only
// commands it has no answer to, of which there are few per task.
const answered = 4096

// answers remembers what was replied to which command, so that a repeated one
// is not executed again.
type answers struct {
	mu      sync.Mutex
	replies map[string]*agentpb.Reply // nil while the command runs
	order   []string                  // of those with a reply, oldest first
}

func newAnswers() *answers { return &answers{replies: map[string]*agentpb.Reply{}} }

// begin reports whether command id is new. Otherwise it returns its reply, nil
// while the command still runs.
func (a *answers) begin(id string) (fresh bool, reply *agentpb.Reply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	reply, known := a.replies[id]
	if known {
		return false, reply
	}
	a.replies[id] = nil
	return true, nil
}

func (a *answers) end(reply *agentpb.Reply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.replies[reply.GetId()] = reply
	a.order = append(a.order, reply.GetId())
	if len(a.order) > answered {
		delete(a.replies, a.order[0])
		a.order = a.order[1:]
	}
}
