package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestUpUnderstandsItsClouds(t *testing.T) {
	options := upOptions{clouds: []string{"east=2", "west=3"}, listen: defaultListen, cpus: 2, mem: 1 << 30, tunnel: "vxlan", onStarvation: "notify"}
	clouds, err := options.parse(true, true)
	if err != nil || len(clouds) != 2 {
		t.Fatalf("got %v, %v", clouds, err)
	}
	if east := clouds[0]; east.Name != "east" || east.Driver != "local" || east.Tunnel != "vxlan" || east.Local.Nodes != 2 || east.Local.CPUs != 2 || east.Local.MemBytes != 1<<30 {
		t.Errorf("the first cloud is %+v with %+v", east, east.Local)
	}
	options = upOptions{clouds: []string{"east=2..5"}, listen: defaultListen, cpus: 2, mem: 1 << 30, tunnel: "auto", onStarvation: "suspend"}
	clouds, err = options.parse(true, true)
	if err != nil || clouds[0].Local.Nodes != 2 || clouds[0].Local.MaxNodes != 5 {
		t.Errorf("east=2..5 is %+v, %v; want 2 nodes, and 5 at most", clouds[0].Local, err)
	}
	options = upOptions{clouds: []string{"local=1"}, listen: defaultListen, tunnel: "auto", onStarvation: "suspend"}
	clouds, err = options.parse(false, false)
	if err != nil || clouds[0].Local.CPUs != float64(runtime.NumCPU()) || clouds[0].Local.MemBytes < 64<<20 {
		t.Errorf("by default a node offers %+v, %v; want all processors and most of the memory", clouds[0].Local, err)
	}
}

func TestUpRefusesBadUsage(t *testing.T) {
	for line, want := range map[string]string{
		"up --cloud east":             "is not NAME=N",
		"up --cloud east=two":         "is not NAME=N",
		"up --cloud =2":               "name",
		"up --cloud East=2":           "name",
		"up --cloud a/b=2":            "name",
		"up --cloud east=0":           "cannot have 0 nodes",
		"up --cloud east=-1":          "cannot have -1 nodes",
		"up --cloud east=100000":      "cannot have 100000 nodes",
		"up --cloud east=2..1":        "cannot have 1 nodes at most",
		"up --cloud east=2..":         "nor NAME=N..MAX",
		"up --cloud a=1 --cloud a=2":  "given twice",
		"up --tunnel string":          "there is no tunnel \"string\": choose one of auto, wireguard, vxlan",
		"up --cpus 0":                 "cannot offer 0 processors",
		"up --cpus NaN":               "cannot offer NaN processors",
		"up --mem 1":                  "cannot offer 1 B of memory",
		"up --listen nonsense":        "is not HOST:PORT",
		"up extra":                    "one argument too many",
		"controller":                  "no configuration",
		"controller --config /absent": "no such file",
	} {
		dormouse(t, "", strings.Fields(line)...).check(t, exitUsage, "", want)
	}
}

func TestSecondUpOnOneStateIsRefused(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	first, err := lockState(state)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockState(state)
	if exitStatus(err) != exitRefused || !strings.Contains(fmt.Sprint(err), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("got %v, want a refusal that names the pid %d", err, os.Getpid())
	}
	if !stateLocked(state) {
		t.Error("the state does not look locked")
	}
	first.Close()
	if stateLocked(state) {
		t.Error("the state still looks locked after the first `up` has ended")
	}
	again, err := lockState(state)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	again.Close()
}

func TestFirstUpStaysTheMachinesOwn(t *testing.T) {
	out := &strings.Builder{}
	c := &cli{err: out, runDir: filepath.Join(t.TempDir(), "run")}
	one, two := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "two")
	lock, err := lockState(one)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := os.Mkdir(two, 0o700); err != nil {
		t.Fatal(err)
	}
	removeOne, err := c.publish(pointer{URL: "https://one", State: one, Pid: 1})
	if err != nil {
		t.Fatal(err)
	}
	removeTwo, err := c.publish(pointer{URL: "https://two", State: two, Pid: 2})
	if err != nil {
		t.Fatal(err)
	}
	shared, err := readPointer(filepath.Join(c.runDir, pointerFile))
	if err != nil || shared.URL != "https://one" {
		t.Errorf("the machine's pointer is %+v, %v; want the first `up`", shared, err)
	}
	if !strings.Contains(out.String(), "dormouse env --state "+two) {
		t.Errorf("said %q, want how to reach the second", out)
	}
	removeTwo()
	if _, err := readPointer(filepath.Join(c.runDir, pointerFile)); err != nil {
		t.Errorf("the end of the second took the first's pointer: %v", err)
	}
	removeOne()
	if _, err := readPointer(filepath.Join(c.runDir, pointerFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the first left its pointer behind: %v", err)
	}
}

func TestUpListensWhereTheKilledOneDid(t *testing.T) {
	state := t.TempDir()
	if address, found := addressBefore(state); found {
		t.Errorf("a fresh state directory names the address %s", address)
	}
	c := &cli{err: &strings.Builder{}, runDir: t.TempDir()}
	remove, err := c.publish(pointer{URL: "https://127.0.0.1:4711", State: state})
	if err != nil {
		t.Fatal(err)
	}
	if address, found := addressBefore(state); !found || address != "127.0.0.1:4711" {
		t.Errorf("found %q, %t; want the address of the one that did not end by itself", address, found)
	}
	remove()
	if _, found := addressBefore(state); found {
		t.Error("an `up` that ended by itself still holds its address")
	}
}

func TestPointerOfADeadUpIsReplaced(t *testing.T) {
	c := &cli{err: &strings.Builder{}, runDir: t.TempDir()}
	dead, live := t.TempDir(), t.TempDir()
	if _, err := c.publish(pointer{URL: "https://dead", State: dead}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.publish(pointer{URL: "https://live", State: live}); err != nil {
		t.Fatal(err)
	}
	shared, err := readPointer(filepath.Join(c.runDir, pointerFile))
	if err != nil || shared.URL != "https://live" {
		t.Errorf("the machine's pointer is %+v, %v; want the one that lives", shared, err)
	}
}

func TestCommandsFindTheUpOfThisMachine(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/jobs": []struct{}{}})
	run := t.TempDir()
	token := filepath.Join(run, "token")
	if err := os.WriteFile(token, []byte("found\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	encoded, _ := json.Marshal(pointer{URL: f.url, TokenFile: token})
	if err := os.WriteFile(filepath.Join(run, pointerFile), encoded, 0o600); err != nil {
		t.Fatal(err)
	}
	c := &cli{runDir: run, getenv: func(string) string { return "" }}
	config, err := c.localConfig()
	if err != nil || config.URL != f.url || config.Token != "found" {
		t.Fatalf("found %+v, %v", config, err)
	}
	controller, err := c.connect()
	if err != nil {
		t.Fatal(err)
	}
	defer controller.Close()
	if _, err := controller.Jobs(context.Background(), false); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(run, pointerFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.localConfig(); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged pointer: %v", err)
	}
}
