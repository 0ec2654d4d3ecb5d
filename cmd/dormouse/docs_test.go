package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReferenceIsCurrent(t *testing.T) {
	const dir = "../../docs/cli"
	want := reference(newRoot(&cli{}))
	for name, text := range want {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Errorf("%v: run `make generate`", err)
			continue
		}
		if string(content) != text {
			t.Errorf("docs/cli/%s is not what the command says now: run `make generate`", name)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if _, known := want[entry.Name()]; !known {
			t.Errorf("docs/cli/%s describes no command: remove it", entry.Name())
		}
	}
}
