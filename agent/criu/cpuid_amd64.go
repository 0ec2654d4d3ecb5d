package criu

func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

func xgetbv() (eax, edx uint32)

// xsave returns the parts of the extended processor state that the kernel has
// switched on (XCR0) and the size in bytes of an area that holds them (Intel
// SDM vol. 1, 13.2: CPUID leaf 0DH). Both are 0 without XSAVE.
func xsave() (parts uint64, size int) {
	const osxsave = 1 << 27
	if _, _, ecx, _ := cpuid(1, 0); ecx&osxsave == 0 {
		return 0, 0
	}
	low, high := xgetbv()
	_, ebx, _, _ := cpuid(0xd, 0)
	return uint64(high)<<32 | uint64(low), int(ebx)
}
