// Package access decides who may do what. It does no I/O: tokens, requests and
// jobs come in as values, decisions come out.
//
// Whoever asks shows a token. A token has a role:
//
//	admin     everything
//	operator  everything about jobs and nodes, nothing about tokens, the audit
//	          log and what the controller itself is made of
//	user      the jobs of one user, and what belongs to them
//
// Every route of the REST API has a Rule (see Rules); one without is the
// admins'. A rule of Own lets users through to what is theirs: the controller
// looks up whose it is. What a user may submit is narrowed by Confine: jobs of
// users run as that user, and see of a node what that user could.
//
// Tokens are stored as SHA-256 of a secret of 256 random bits. A slow, salted
// hash, as for passwords, would add nothing: it makes guessing a secret that
// people chose costly, and this one cannot be guessed at any speed. It would cost
// every request its time.
package access

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"dormouse/api"
	"dormouse/internal/lazyregexp"
)

// prefix tells people, and tools that look for leaked secrets, what a token is.
const prefix = "dm_"

// NewSecret makes a token's secret: 256 random bits.
func NewSecret() string {
	var raw [32]byte
	rand.Read(raw[:]) // never fails: crypto/rand.Read
	return prefix + base64.RawURLEncoding.EncodeToString(raw[:])
}

// Hash is what is stored of a secret.
func Hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// Token is a token as it is stored, under the hash of its secret.
type Token struct {
	api.Token
	// UID and GID are the user's numbers; jobs run under them.
	UID uint32 `json:"uid,omitempty"`
	GID uint32 `json:"gid,omitempty"`
}

// Valid says why a token may not be used at a time; empty: it may.
func (t *Token) Valid(now time.Time) (why string) {
	switch {
	case t.Revoked != nil:
		return "the token was revoked"
	case t.Expires != nil && !now.Before(*t.Expires):
		return "the token has expired"
	}
	return ""
}

// Identity is who asks.
type Identity struct {
	Token     string // its id
	Name      string // what it is for, chosen by who made it
	Role      api.Role
	User      string // of the role user
	UID, GID  uint32
	AllowRoot bool
}

// Identity is who shows the token.
func (t *Token) Identity() Identity {
	return Identity{Token: t.ID, Name: t.Name, Role: t.Role, User: t.User, UID: t.UID, GID: t.GID, AllowRoot: t.AllowRoot}
}

// Owner is whose the jobs are that the identity submits: a user's, or, with an
// @ that no user's name has, a token's.
func (i Identity) Owner() string {
	if i.User != "" {
		return i.User
	}
	return "@" + i.Name
}

// Sees reports whether what belongs to owner is the identity's to see and touch.
func (i Identity) Sees(owner string) bool { return i.Role != api.RoleUser || owner == i.User }

// DeniedError says that a token may not do what was asked.
type DeniedError struct{ Reason string }

func (e *DeniedError) Error() string { return e.Reason }

func denied(format string, args ...any) error {
	return &DeniedError{Reason: fmt.Sprintf(format, args...)}
}

var (
	tokenName = lazyregexp.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	userName  = lazyregexp.New(`^[A-Za-z_][A-Za-z0-9._-]{0,31}$`)
)

// Check refuses what cannot be a token's name, role and user.
func Check(t api.Token) error {
	switch {
	case !tokenName.MatchString(t.Name):
		return fmt.Errorf("the token's name must be up to 63 letters, digits, dots, dashes and underscores, got %q", t.Name)
	case t.Role != api.RoleAdmin && t.Role != api.RoleOperator && t.Role != api.RoleUser:
		return fmt.Errorf("there is no role %q: known are admin, operator, user", t.Role)
	case t.Role == api.RoleUser && t.User == "":
		return fmt.Errorf("a token of the role user needs the user: name the account that its jobs run as")
	case t.Role != api.RoleUser && (t.User != "" || t.AllowRoot):
		return fmt.Errorf("only a token of the role user has a user, and may be allowed root: the role %s may submit as anyone", t.Role)
	case t.User != "" && !userName.MatchString(t.User):
		return fmt.Errorf("%q is not the name of a user", t.User)
	}
	return nil
}

// Limits are what an admin allows users; the configuration's.
type Limits struct {
	// Paths are where the volumes and roots of users' jobs may be. {user} stands
	// for the user's name. None: nowhere.
	Paths []string
	// Priority is the highest that a user may ask for.
	Priority int
}

// Confine narrows what a user submits, or refuses it; what others submit is
// left alone.
func Confine(who Identity, limits Limits, spec *api.JobSpec) error {
	spec.Confined = who.Role == api.RoleUser
	if !spec.Confined {
		return nil
	}
	if err := runAs(who, spec); err != nil {
		return err
	}
	switch {
	case len(spec.CapAdd) > 0 && !who.AllowRoot:
		return denied("a job of user %s gets no further capabilities: %s was asked for", who.User, strings.Join(spec.CapAdd, ", "))
	case spec.Priority > limits.Priority:
		return denied("a job of a user has a priority of at most %d, got %d", limits.Priority, spec.Priority)
	}
	for _, p := range spec.Publish {
		if p.Port < 1024 && !who.AllowRoot {
			return denied("a job of user %s publishes ports from 1024 on, got %d", who.User, p.Port)
		}
	}
	for _, v := range spec.Volumes {
		if err := limits.within(who, "volume", v.Source); err != nil {
			return err
		}
	}
	if path := rootPath(spec.Root); path != "" {
		return limits.within(who, "root", path)
	}
	return nil
}

// runAs gives the job its user, by number: a root of the user's making may
// call anybody by any name.
func runAs(who Identity, spec *api.JobSpec) error {
	own := fmt.Sprintf("%d:%d", who.UID, who.GID)
	name, group, _ := strings.Cut(spec.User, ":")
	root := name == "root" || strings.Trim(name, "0") == "" && name != ""
	switch {
	case spec.User == "", spec.User == who.User, spec.User == own, group == "" && name == fmt.Sprint(who.UID):
		if who.UID == 0 && !who.AllowRoot {
			return denied("user %s is root, and an admin has not allowed this token that (--allow-root)", who.User)
		}
		spec.User = own
		return nil
	case root && who.AllowRoot:
		spec.User = "0:0"
		return nil
	case root:
		return denied("a job of user %s does not run as root: an admin has not allowed this token that (--allow-root)", who.User)
	}
	return denied("a job of user %s runs as that user, not as %s", who.User, spec.User)
}

// rootPath is the path on the node that a root is made from; empty: none.
func rootPath(root string) string {
	for _, kind := range []api.RootKind{api.RootDir, api.RootOCI} {
		if rest, ok := strings.CutPrefix(root, string(kind)+":"); ok && strings.HasPrefix(rest, "/") {
			return rest
		} else if ok && kind == api.RootOCI && strings.HasPrefix(rest, ".") {
			return rest // relative to the agent: never within anything
		}
	}
	if strings.HasPrefix(root, "/") {
		return root
	}
	return ""
}

// within refuses a path of a node that is not below one that users may have.
// Links are the agent's to refuse (see api.JobSpec.Confined).
func (l Limits) within(who Identity, what, path string) error {
	for _, pattern := range l.Paths {
		base := clean(strings.ReplaceAll(pattern, "{user}", who.User))
		if p := clean(path); p == base || strings.HasPrefix(p, strings.TrimSuffix(base, "/")+"/") {
			return nil
		}
	}
	if len(l.Paths) == 0 {
		return denied("the %s %s is not allowed: the controller's configuration names no paths for users (access.paths)", what, path)
	}
	return denied("the %s %s is not below a path that users may have: %s", what, path, strings.Join(l.Paths, ", "))
}
