package capture

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyStep bounds how long a copy goes on after its context was cancelled.
const copyStep = 8 << 20

// copyFile copies the data of the regular file from to the new file to, holes
// as holes, and returns how many bytes of data there were.
func copyFile(ctx context.Context, from, to string) (copied int64, err error) {
	src, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	info, err := src.Stat()
	if err != nil {
		return 0, err
	}
	return copyData(ctx, dst, src, info.Size())
}

// copyData copies the data among the first size bytes of src to dst, which is new,
// holes as holes.
func copyData(ctx context.Context, dst, src *os.File, size int64) (copied int64, err error) {
	if err := dst.Truncate(size); err != nil {
		return 0, err
	}
	for at := int64(0); at < size; {
		data, hole, err := nextData(src, at, size)
		if err != nil {
			return copied, err
		}
		for data < hole {
			if err := ctx.Err(); err != nil {
				return copied, err
			}
			n, err := copyPart(dst, src, data, min(hole-data, copyStep))
			if err != nil {
				return copied, err
			}
			if n == 0 { // it shrank: the caller will see that from its identity
				return copied, nil
			}
			copied += n
			data += n
		}
		at = hole
	}
	return copied, nil
}

// nextData returns the first stretch of data at or after at: lseek(2),
// SEEK_DATA. File systems without holes answer with all of the file.
func nextData(f *os.File, at, size int64) (data, hole int64, err error) {
	data, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // only a hole is left
		return size, size, nil
	}
	if errors.Is(err, unix.EINVAL) {
		return at, size, nil
	}
	if err != nil {
		return 0, 0, os.NewSyscallError("lseek", err)
	}
	hole, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) { // it shrank: the caller will see that from its identity
		return size, size, nil
	}
	if err != nil {
		return 0, 0, os.NewSyscallError("lseek", err)
	}
	return min(data, size), min(hole, size), nil
}

// copyPart copies up to length bytes at offset of both files, inside the
// kernel where it can: copy_file_range(2).
func copyPart(dst, src *os.File, offset, length int64) (int64, error) {
	in, out := offset, offset
	n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(length), 0)
	if err == nil && n > 0 {
		return int64(n), nil
	}
	if err != nil && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EINVAL) &&
		!errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return 0, os.NewSyscallError("copy_file_range", err)
	}
	copied, err := io.Copy(io.NewOffsetWriter(dst, offset), io.NewSectionReader(src, offset, length))
	return copied, err
}
