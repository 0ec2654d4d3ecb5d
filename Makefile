# Two commands on a bare Debian 12 or 13 with Go, gcc, make and root:
#
#   make demo    a redis with data and a long computation lose their node and go on elsewhere
#   make test    every test
#
# Both set up first what they need (see setup/). The rest:
#
#   make setup   only the setting up
#   make build   bin/dormouse, bin/dormouse-init, bin/libdormouse-criu.so
#   make lint    formatting, go vet, staticcheck
#   make nightly the longest end-to-end tests: ten rounds of twenty checkpoints, half
#                an hour of healthy jobs, twenty minutes of chaos
#   make bench   measure checkpoints and restores against plain CRIU, jobs of
#                several tasks, their network, and MPI against plain mpirun,
#                and one controller with a thousand simulated agents
#   make fuzz    every fuzz test for FUZZTIME (10s) each
#   make generate  Go code from the .proto files
#   make clean   remove what was built; what was set up stays

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := build
.PHONY: setup setup-demo build demo test nightly lint bench fuzz generate clean
MAKEFLAGS += --no-builtin-rules

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOBUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
SHIM := $(wildcard agent/criu/shim/*.c)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME ?= 10s

setup:
	@setup/setup.sh test

setup-demo:
	@setup/setup.sh demo

# Go decides by itself what has to be built again.
build: $(if $(SHIM),bin/libdormouse-criu.so)
	$(GOBUILD) -o bin/dormouse ./cmd/dormouse
	$(GOBUILD) -o bin/dormouse-init ./cmd/dormouse-init

bin/libdormouse-criu.so: $(SHIM)
	@mkdir -p bin
	gcc -shared -fPIC -O2 -Wall -Wextra -Werror -o $@ $(SHIM)

demo: setup-demo
	@$(MAKE) --no-print-directory build
	go run ./e2e/demo

# The end-to-end tests start whole installations, so they run alone. With the tag
# failpoint the agent's tests kill it at each of its steps.
test: setup
	@$(MAKE) --no-print-directory build
	@unit=0 e2e=0; \
	setup/gotest.sh -tags failpoint -count=1 -timeout 10m $$(go list ./... | grep -v '/e2e\(/\|$$\)') || unit=$$?; \
	setup/gotest.sh -count=1 -timeout 40m -p 1 ./e2e/... || e2e=$$?; \
	exit $$((unit ? unit : e2e))

nightly: setup
	@$(MAKE) --no-print-directory build
	DORMOUSE_E2E_ROUNDS=10 setup/gotest.sh -count=1 -timeout 3h -tags nightly -run 'TestTwentyCheckpoints|TestStarvingJobsAreFound|TestHealthyJobsAreLeftAlone|TestChaos' ./e2e

lint:
	@unformatted=$$(gofmt -l .); \
	[ -z "$$unformatted" ] || { echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; }
	@for script in setup/*.sh .ci/run; do bash -n $$script; done
	go vet ./...
	go vet -tags failpoint ./agent/... ./internal/...
	go vet -tags nightly ./e2e
	go run $(STATICCHECK) ./...
	go run $(STATICCHECK) -tags nightly ./e2e

bench: setup
	@$(MAKE) --no-print-directory build
	go run ./e2e/bench
	go run ./e2e/bench -parallel
	go run ./e2e/bench -fleet
	go run ./e2e/bench -monitor

fuzz:
	@grep -rl '^func Fuzz' --include='*_test.go' . | xargs -r -n 1 dirname | sort -u | while read -r dir; do \
		for name in $$(cd $$dir && go test -list '^Fuzz' . | grep '^Fuzz'); do \
			echo "$$dir $$name"; \
			go test -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME) $$dir; \
		done; \
	done

# Needs protoc (package protobuf-compiler); the versions of the plugins are
# those that wrote the code which is checked in.
generate:
	@command -v protoc >/dev/null || { echo "protoc is missing: apt-get install protobuf-compiler"; exit 1; }
	GOBIN=$(CURDIR)/bin/tools go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
	GOBIN=$(CURDIR)/bin/tools go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
	PATH=$(CURDIR)/bin/tools:$$PATH go generate ./...

clean:
	rm -rf bin
