package controller

import (
	"fmt"
	"time"

	"dormouse/controller/protocol"
)

// stragglerAfter is how long all tasks of a job may take for a step until those
// that are awaited are named.
const stragglerAfter = 2 * time.Second

// stragglers names tasks; nothing when there is none.
func stragglers(late []protocol.Task) string {
	if len(late) == 0 {
		return ""
	}
	who := fmt.Sprintf("task %d on node %s", late[0].Index, late[0].Node)
	if more := len(late) - 1; more > 0 {
		who += fmt.Sprintf(" and %d more", more)
	}
	return who
}
