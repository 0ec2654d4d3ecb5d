package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"dormouse/agent/sandbox/pid1"
)

func TestLookupUser(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	write(t, passwd, "root:x:0:0:root:/root:/bin/sh\nbroken line\nana:x:1000:100:Ana:/home/ana:/bin/sh\n77:x:5:5::/:\n")
	write(t, group, "root:x:0:\nusers:x:100:\nvideo:x:44:bob,ana\nempty:x:45:\nwheel:x:10:ana\n")
	for spec, want := range map[string]account{
		"":         {name: "root", home: "/root", groups: []uint32{0}},
		"ana":      {name: "ana", home: "/home/ana", uid: 1000, gid: 100, groups: []uint32{100, 44, 10}},
		"1000":     {name: "ana", home: "/home/ana", uid: 1000, gid: 100, groups: []uint32{100, 44, 10}},
		"ana:44":   {name: "ana", home: "/home/ana", uid: 1000, gid: 44, groups: []uint32{44}},
		"4711":     {home: "/", uid: 4711, groups: []uint32{0}},
		"4711:12":  {home: "/", uid: 4711, gid: 12, groups: []uint32{12}},
		"ana:root": {name: "ana", home: "/home/ana", uid: 1000, gid: 0, groups: []uint32{0}},
		"77":       {home: "/", uid: 77, groups: []uint32{0}}, // there is an account of that name: a number is never one
	} {
		got, err := lookupUser(spec, passwd, group)
		if err != nil {
			t.Errorf("%q: %v", spec, err)
			continue
		}
		if got.name != want.name || got.home != want.home || got.uid != want.uid || got.gid != want.gid || !slices.Equal(got.groups, want.groups) {
			t.Errorf("%q: got %+v, want %+v", spec, *got, want)
		}
	}
	for _, spec := range []string{"bob", "ana:nogroup", "-1", "4294967295", "99999999999"} {
		var f *pid1.Failure
		if _, err := lookupUser(spec, passwd, group); !errors.As(err, &f) || f.Kind != pid1.KindRequest {
			t.Errorf("%q: got %v, want a refusal", spec, err)
		}
	}
}

func TestLookupUserWithoutFiles(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	got, err := lookupUser("0", none, none)
	if err != nil || got.uid != 0 || got.home != "/root" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestLookupCommandFollowsThePath(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a/tool", "b/tool", "b/other"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), "#!/bin/sh\n")
	}
	// The first tool is not executable, so the second is meant.
	for _, name := range []string{"b/tool", "b/other"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	run := &pid1.Run{WorkDir: dir, Env: []string{"PATH=" + dir + "/a:b"}}
	for name, want := range map[string]string{"tool": "b/tool", "other": "b/other", "./b/tool": "b/tool"} {
		if got, err := lookupCommand(run, name); err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%s: got %q, %v, want %s", name, got, err, want)
		}
	}
	stranger := &pid1.Run{WorkDir: dir, Env: run.Env, UID: 1234, GID: 1234}
	if _, err := lookupCommand(stranger, "other"); err == nil {
		t.Error("a user without permission may run it")
	}
}

func TestUniqueKeepsTheLast(t *testing.T) {
	got := unique([]string{"A=1", "B=2", "A=3"})
	if !slices.Equal(got, []string{"B=2", "A=3"}) {
		t.Errorf("got %v", got)
	}
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestNumberIsNeverAName: with numbers, what the root's own files say of names
// gives nobody another user's rights.
func TestNumberIsNeverAName(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	if err := os.WriteFile(passwd, []byte("1000:x:0:0::/root:/bin/sh\nmallory:x:1000:0::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(group, []byte("1000:x:0:\nroot:x:0:mallory,1000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	who, err := lookupUser("1000:1000", passwd, group)
	if err != nil || who.uid != 1000 || who.gid != 1000 || len(who.groups) != 1 || who.groups[0] != 1000 {
		t.Errorf("want 1000:1000 and no other group, got %+v, %v", who, err)
	}
}
