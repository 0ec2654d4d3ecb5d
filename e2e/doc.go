// Package e2e holds the end-to-end tests: the real binary, driven as a user
// drives it, with the programs of e2e/programs as its jobs.
//
// Most tests share one `dormouse up` of two clouds, which TestMain ends and
// checks for leftovers; tests that kill daemons start one of their own.
// Everything needs root and a CRIU that works.
package e2e
