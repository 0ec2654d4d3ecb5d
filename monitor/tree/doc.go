// Package tree carries what nodes measure and find up a tree of nodes.
package tree
