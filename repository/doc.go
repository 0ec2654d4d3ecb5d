// Package repository stores checkpoints: the memory images and files of every
// task, in pieces that checkpoints share, on any backend.
package repository
