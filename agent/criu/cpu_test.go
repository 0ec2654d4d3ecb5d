package criu

import (
	"slices"
	"strings"
	"testing"
)

func TestCheckCPUNamesWhatIsLacking(t *testing.T) {
	base := CPU{Arch: "amd64", Model: "old", Features: []string{"avx", "sse2"}, XFeatures: 7}
	more := CPU{Arch: "amd64", Model: "new", Features: []string{"avx", "avx512f", "avx512vl", "sse2"}, XFeatures: 0xe7}
	for _, c := range []struct {
		name       string
		have, need CPU
		want       string // empty: accepted
	}{
		{"the same", base, base, ""},
		{"more than needed", more, base, ""},
		{"features lacking", base, more, "lacks avx512f, avx512vl"},
		{"register state lacking", CPU{Arch: "amd64", Features: more.Features, XFeatures: 7}, more, "xfeatures 0xe0"},
		{"another architecture", CPU{Arch: "arm64"}, base, "this node's is arm64"},
	} {
		err := CheckCPU(c.have, c.need)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, expected %q", c.name, err, c.want)
		}
	}
}

func TestCPUInfoOfThisMachine(t *testing.T) {
	c, err := CPUInfo()
	if err != nil {
		t.Fatal(err)
	}
	if c.Arch == "amd64" && (!slices.Contains(c.Features, "sse2") || c.XSaveSize < 512 || c.XFeatures&3 != 3) {
		t.Errorf("implausible: %+v", c)
	}
	if err := CheckCPU(c, c); err != nil {
		t.Errorf("this machine is refused by itself: %v", err)
	}
}

func TestCPUInfoLeavesOutTheKernelsFlags(t *testing.T) {
	c := parseCPUInfo("vendor_id\t: GenuineIntel\nmodel name\t: X\nflags\t\t: sse2 vmx avx constant_tsc\n\nflags\t: sse2\n")
	if !slices.Equal(c.Features, []string{"avx", "sse2"}) || c.Vendor != "GenuineIntel" || c.Model != "X" {
		t.Errorf("got %+v", c)
	}
}
