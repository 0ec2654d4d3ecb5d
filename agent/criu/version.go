package criu

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// Version is a CRIU version; its text form is "4.2.1" (or "4.2").
type Version struct {
	Major, Minor, Sublevel int
}

// String is the dotted form, without a zero sublevel.
func (v Version) String() string {
	if v.Sublevel == 0 {
		return fmt.Sprintf("%d.%d", v.Major, v.Minor)
	}
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Sublevel)
}

// Compare is negative, zero or positive as v is older than, the same as or
// newer than o.
func (v Version) Compare(o Version) int {
	return cmp.Or(cmp.Compare(v.Major, o.Major), cmp.Compare(v.Minor, o.Minor), cmp.Compare(v.Sublevel, o.Sublevel))
}

// MarshalText implements encoding.TextMarshaler.
func (v Version) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (v *Version) UnmarshalText(text []byte) error {
	parsed, err := ParseVersion(string(text))
	if err != nil {
		return err
	}
	*v = parsed
	return nil
}

// ParseVersion reads "4.2" or "4.2.1".
func ParseVersion(s string) (Version, error) {
	parts := strings.Split(s, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return Version{}, fmt.Errorf("criu version %q: want MAJOR.MINOR or MAJOR.MINOR.SUBLEVEL", s)
	}
	var n [3]int
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return Version{}, fmt.Errorf("criu version %q: %q is not a number", s, p)
		}
		n[i] = int(v)
	}
	return Version{n[0], n[1], n[2]}, nil
}

// CheckVersion returns an error if images written by CRIU version dumped cannot
// be restored by this engine: CRIU reads images of older versions, never of
// newer ones (4.2 moved a field of the page map, for one).
func (e *Engine) CheckVersion(dumped Version) error {
	if e.version.Compare(dumped) >= 0 {
		return nil
	}
	return fmt.Errorf("the checkpoint was taken by CRIU %s and this node has %s, which cannot read it: update CRIU on this node",
		dumped, e.version)
}
