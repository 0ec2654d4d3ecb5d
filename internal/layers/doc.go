// Package layers holds the test that enforces which part of Dormouse may
// import which; see docs/design/README.md for the map.
package layers
