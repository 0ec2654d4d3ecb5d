package api

import "time"

// Role is what the bearer of a token may do.
type Role string

// The roles.
const (
	RoleAdmin    Role = "admin"    // everything
	RoleOperator Role = "operator" // everything about jobs and nodes
	RoleUser     Role = "user"     // one user's own jobs
)

// Token lets whoever shows its secret use the controller.
type Token struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Role Role   `json:"role"`
	// User is the account that the jobs of a token of the role user run as, and
	// whose they are.
	User string `json:"user,omitempty"`
	// AllowRoot lets a user's jobs run as root, inside their sandboxes.
	AllowRoot bool       `json:"allow_root,omitempty"`
	Created   time.Time  `json:"created"`
	Expires   *time.Time `json:"expires,omitempty"`
	Revoked   *time.Time `json:"revoked,omitempty"`
}

// NewToken is a token that was just made: the only time that its secret is told.
type NewToken struct {
	Token
	Secret string `json:"secret"`
}

// TokenRequest asks for a token.
type TokenRequest struct {
	Name string `json:"name" doc:"what it is for"`
	Role Role   `json:"role" doc:"admin, operator or user"`
	User string `json:"user,omitempty" doc:"of the role user: the account, as the controller's machine knows it, or NAME:UID:GID"`
	// AllowRoot is for the role user only.
	AllowRoot bool `json:"allow_root,omitempty"`
	// ExpiresMS is for how long it is valid; 0: until it is revoked.
	ExpiresMS int64 `json:"expires_ms,omitempty"`
}

// AuditEntry is one request that changed something, or was refused.
type AuditEntry struct {
	ID      uint64    `json:"id"`
	Time    time.Time `json:"time"`
	Token   string    `json:"token,omitempty"` // its id; empty: none that is known was shown
	Name    string    `json:"name,omitempty"`
	Role    Role      `json:"role,omitempty"`
	User    string    `json:"user,omitempty"`
	Address string    `json:"address"` // that the request came from
	Method  string    `json:"method"`
	Path    string    `json:"path"`
	Status  int       `json:"status"`
	// Target is what came of it: the id of a job, an operation or a token.
	Target string `json:"target,omitempty"`
	Detail string `json:"detail,omitempty"` // why it was refused
	// Dropped is how many refusals before this one were too many to write down.
	Dropped int `json:"dropped,omitempty"`
}
