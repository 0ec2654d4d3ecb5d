package sandbox

import (
	"os"
	"testing"
)

func TestMakingNetworksLeavesTheProcessInItsOwn(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test makes network namespaces: it needs root")
		}
		t.Skip("this test makes network namespaces: it needs root")
	}
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		file, err := newNetwork("10.99.0.1")
		if err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("the process is in %s (%v), and was in %s", after, err, before)
	}
}
