package main

// What `make build` puts beside this program.
const (
	initName = "dormouse-init"
	shimName = "libdormouse-criu.so"
)

// defaultState is where `up` keeps what it must remember.
const defaultState = "/var/lib/dormouse/up"
