// Package lazyregexp compiles regular expressions when they are first used. The
// program is one for all commands, and most of them use few of its expressions:
// to compile all of them was a sixth of the time that a command takes to start.
package lazyregexp

import (
	"regexp"
	"sync"
)

// Regexp is a regular expression; safe for concurrent use.
type Regexp struct{ compile func() *regexp.Regexp }

// New makes one of an expression, which must be right: see regexp.MustCompile.
func New(expression string) *Regexp {
	return &Regexp{sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })}
}

// MatchString is regexp.Regexp.MatchString.
func (r *Regexp) MatchString(s string) bool { return r.compile().MatchString(s) }

// FindStringSubmatch is regexp.Regexp.FindStringSubmatch.
func (r *Regexp) FindStringSubmatch(s string) []string { return r.compile().FindStringSubmatch(s) }
