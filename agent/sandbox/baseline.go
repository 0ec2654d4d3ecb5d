package sandbox

import "strings"

// A CPU baseline keeps libraries that choose code by processor from using what
// another cloud's processors lack. It works through the environment, so it
// reaches what honours these variables: glibc (string functions, and which
// glibc-hwcaps directory is searched), OpenBLAS and MKL.

// Features of each x86-64 psABI level beyond the one below, by glibc's names.
const (
	featuresV3 = "AVX AVX2 BMI1 BMI2 F16C FMA LZCNT MOVBE XSAVE XSAVEC OSXSAVE"
	featuresV4 = "AVX512F AVX512BW AVX512CD AVX512DQ AVX512VL"
	// In no level, but used where present.
	featuresOther = "AVX512ER AVX512PF AVX512VBMI AVX512_VBMI2 AVX_VNNI FMA4 RTM VAES VPCLMULQDQ"
)

// baselineEnv is the environment that enforces a level.
func baselineEnv(level string) (map[string]string, error) {
	switch level {
	case "", "native":
		return nil, nil
	case "x86-64-v2":
		return baseline("Nehalem", "SSE4_2", featuresV3, featuresV4, featuresOther), nil
	case "x86-64-v3":
		return baseline("Haswell", "AVX2", featuresV4, featuresOther), nil
	case "x86-64-v4":
		return baseline("SkylakeX", "AVX512", featuresOther), nil
	}
	return nil, refuse("the CPU baseline %q is none of native, x86-64-v2, x86-64-v3 or x86-64-v4", level)
}

func baseline(openblas, mkl string, without ...string) map[string]string {
	var masks []string
	for _, feature := range strings.Fields(strings.Join(without, " ")) {
		masks = append(masks, "-"+feature)
	}
	return map[string]string{
		"GLIBC_TUNABLES":          "glibc.cpu.hwcaps=" + strings.Join(masks, ","),
		"OPENBLAS_CORETYPE":       openblas,
		"MKL_ENABLE_INSTRUCTIONS": mkl,
	}
}
