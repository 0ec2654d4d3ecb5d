package main

import (
	"os/exec"
	"testing"
)

func TestMachinAndGibbonsAgree(t *testing.T) {
	const lines = 5
	got, err := exec.Command("python3", "-c", piProgram, "5").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := piLines(lines); string(got) != want {
		t.Errorf("pi.py printed\n%s\nexpected\n%s", got, want)
	}
}
