package local

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Large objects go past the page cache (O_DIRECT, open(2)): they are written once
// and read seldom and on another machine as a rule, and the memory that they would
// take is the tasks'. It saves a copy, too, and the wait for a new page to put it
// in, which in a virtual machine may cost more than the disk.

// directAlign is what offset, length and memory must be multiples of: the largest
// block of common disks.
const directAlign = 4096

// aligned reports whether p can be read or written directly at an offset.
func aligned(p []byte, offset int64) bool {
	return len(p) > 0 && (uintptr(unsafe.Pointer(unsafe.SliceData(p)))|uintptr(len(p))|uintptr(offset))%directAlign == 0
}

// directly does I/O with what is aligned past the page cache, if the file system
// can do that.
func directly(f *os.File, p []byte, offset int64, do func([]byte, int64) (int, error)) (n int, err error) {
	if whole := p[:len(p)&^(directAlign-1)]; aligned(whole, offset) && setDirect(f, true) == nil {
		n, err = do(whole, offset)
		if off := setDirect(f, false); off != nil {
			return n, errors.Join(err, off)
		}
		// EINVAL: larger blocks, or the end of a file that is no multiple of them.
		if err != nil && !errors.Is(err, unix.EINVAL) || n == len(p) {
			return n, err
		}
	}
	m, err := do(p[n:], offset+int64(n))
	return n + m, err
}

// cached reports whether the whole stretch of a file is in the page cache:
// cachestat(2), since Linux 6.5.
func cached(f *os.File, offset int64, length int) bool {
	var stat unix.Cachestat_t
	stretch := unix.CachestatRange{Off: uint64(offset), Len: uint64(length)}
	if err := unix.Cachestat(uint(f.Fd()), &stretch, &stat, 0); err != nil {
		return false
	}
	page := int64(os.Getpagesize())
	first, last := offset/page, (offset+int64(length)-1)/page
	return stat.Cache == uint64(last-first+1)
}

func setDirect(f *os.File, on bool) error {
	flags := 0
	if on {
		flags = unix.O_DIRECT
	}
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, flags)
	return err
}
