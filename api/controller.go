package api

// Controller is one of the controllers that share a store.
type Controller struct {
	Name    string `json:"name"`
	URL     string `json:"url"`
	Version string `json:"version"`
	Leads   bool   `json:"leads"` // it alone writes and talks to agents; the others forward
}

// LeaderHeader carries the URL of the controller that leads, in the answer of one
// that does not to an agent.
const LeaderHeader = "dormouse-leader"
