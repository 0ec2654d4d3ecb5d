package criu

import (
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"strings"
)

// CPU describes what programs can rely on of a processor. A running program has
// chosen its code paths by it and does not look again after a restore.
type CPU struct {
	Arch   string `json:"arch"` // GOARCH
	Vendor string `json:"vendor"`
	Model  string `json:"model"`
	// Features are those that change what a program may execute, named as in
	// /proc/cpuinfo, sorted.
	Features []string `json:"features"`
	// XFeatures are the parts of the extended register state (x86's XCR0) that
	// are switched on; a process's saved registers may hold any of them.
	XFeatures uint64 `json:"xfeatures,omitempty"`
	// XSaveSize is the bytes that these registers take.
	XSaveSize int `json:"xsave_size,omitempty"`
}

// CPUInfo describes this machine's processor.
func CPUInfo() (CPU, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return CPU{}, err
	}
	c := parseCPUInfo(string(data))
	if len(c.Features) == 0 {
		return CPU{}, fmt.Errorf("/proc/cpuinfo names no CPU features")
	}
	c.Arch = runtime.GOARCH
	c.XFeatures, c.XSaveSize = xsave()
	return c, nil
}

// parseCPUInfo reads the first processor's entry.
func parseCPUInfo(text string) CPU {
	var c CPU
	first, _, _ := strings.Cut(text, "\n\n")
	for line := range strings.Lines(first) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id", "CPU implementer":
			c.Vendor = value
		case "model name":
			c.Model = value
		case "flags":
			c.Features = slices.DeleteFunc(strings.Fields(value), func(f string) bool { return !x86Instructions[f] })
		case "Features": // arm64 lists only what programs can use
			c.Features = strings.Fields(value)
		}
	}
	slices.Sort(c.Features)
	c.Features = slices.Compact(c.Features)
	return c
}

// x86Instructions are the flags that give unprivileged programs instructions or
// registers. The others describe the kernel's side (vmx, mitigations, power).
var x86Instructions = func() map[string]bool {
	const flags = `fpu tsc cx8 cmov mmx mmxext fxsr fxsr_opt sse sse2 syscall rdtscp lm 3dnow 3dnowext 3dnowprefetch
		pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand lahf_lm abm sse4a misalignsse
		xop fma4 tbm lwp fsgsbase bmi1 bmi2 hle rtm avx2 erms fsrm rdseed adx clflush clflushopt clwb clzero sha_ni sha512
		sm3 sm4 xsaveopt xsavec xgetbv1 pku ospke waitpkg gfni vaes vpclmulqdq rdpid movdiri movdir64b enqcmd cldemote
		serialize tsxldtrk uintr user_shstk ptwrite rdpru monitorx
		avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni
		avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_bf16 avx512_fp16
		avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert avx10 cmpccxadd
		amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex`
	set := map[string]bool{}
	for _, f := range strings.Fields(flags) {
		set[f] = true
	}
	return set
}()

// CheckCPU returns an error naming what a processor lacks that programs from
// another may have relied on. More than was there is no obstacle.
func CheckCPU(have, need CPU) error {
	if have.Arch != need.Arch {
		return fmt.Errorf("the checkpoint was taken on a %s CPU and this node's is %s: choose a node of the same kind", need.Arch, have.Arch)
	}
	var lacking []string
	for _, f := range need.Features {
		if !slices.Contains(have.Features, f) {
			lacking = append(lacking, f)
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("this node's CPU (%s) lacks %s, which the checkpoint's programs may use (they ran on %s): choose a node that has it",
			have.Model, strings.Join(lacking, ", "), need.Model)
	}
	if missing := need.XFeatures &^ have.XFeatures; missing != 0 {
		return fmt.Errorf("this node does not save %d part(s) of the CPU state (xfeatures %#x) that the checkpoint's processes hold: choose a node that does",
			bits.OnesCount64(missing), missing)
	}
	return nil
}
