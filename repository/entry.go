package repository

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"
)

// EntryType is what kind of node an entry of a tree is.
type EntryType string

// The types of entries.
const (
	TypeFile     EntryType = "file"
	TypeDir      EntryType = "dir"
	TypeSymlink  EntryType = "symlink"
	TypeHardlink EntryType = "hardlink" // another name of an earlier entry
	TypeFifo     EntryType = "fifo"
	TypeSocket   EntryType = "socket" // the node, not the connection
	TypeChar     EntryType = "char"   // 0:0 is an overlay's whiteout
	TypeBlock    EntryType = "block"
)

// Entry describes one name in a tree. Hard links have Path, Type and Target only.
type Entry struct {
	// Path is relative to the tree, with slashes, without "." or ".." elements;
	// "." is the tree's own root. It may have any bytes but NUL.
	Path    string
	Type    EntryType
	Mode    uint32 // the bits of 07777
	UID     uint32
	GID     uint32
	ModTime int64 // nanoseconds since 1970
	Size    int64 // of a file, in bytes
	// Target is the text of a symlink, or the Path of the entry that a hard
	// link is another name of.
	Target string
	Major  uint32 // of devices
	Minor  uint32
	Xattrs map[string][]byte
}

// TreeEntry is an entry on its way into the repository.
type TreeEntry struct {
	Entry
	// Key is the identity of the original file. The zero Key is never cached.
	Key FileKey
	// Open opens the content of a file: the file itself, or a copy that was
	// made while its writers stood still. It is called from several goroutines,
	// once for every few megabytes, and not at all for what is not read again.
	Open func() (*os.File, error)
	// Reread says that the content may have changed without the Key, as it does
	// when it is written through a shared mapping.
	Reread bool
}

// FileKey is what identifies a file with unchanged content.
type FileKey struct {
	Dev, Ino     uint64
	Size         int64
	Mtime, Ctime int64 // nanoseconds since 1970
}

// FileKeyOf takes the key from what Lstat or Stat returned.
func FileKeyOf(fi os.FileInfo) FileKey {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return FileKey{}
	}
	return FileKey{Dev: uint64(st.Dev), Ino: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}
}

// entryRecord is an entry as it is stored: one JSON object per line.
type entryRecord struct {
	Path     text          `json:"path"`
	Type     EntryType     `json:"type"`
	Mode     uint32        `json:"mode,omitempty"`
	UID      uint32        `json:"uid,omitempty"`
	GID      uint32        `json:"gid,omitempty"`
	ModTime  int64         `json:"mtime_ns,omitempty"`
	Size     int64         `json:"size,omitempty"`
	Target   text          `json:"target,omitempty"`
	Major    uint32        `json:"major,omitempty"`
	Minor    uint32        `json:"minor,omitempty"`
	Xattrs   []xattrRecord `json:"xattrs,omitempty"`
	Segments []segmentRef  `json:"segments,omitempty"`
}

type xattrRecord struct {
	Name  text   `json:"name"`
	Value []byte `json:"value"`
}

// text is a string of any bytes. In JSON it is a string, or {"base64": "..."}
// when it is not UTF-8.
type text string

type base64Text struct {
	Base64 []byte `json:"base64"`
}

func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(base64Text{[]byte(t)})
}

func (t *text) UnmarshalJSON(p []byte) error {
	if len(p) > 0 && p[0] == '{' {
		var b base64Text
		err := json.Unmarshal(p, &b)
		*t = text(b.Base64)
		return err
	}
	var s string
	err := json.Unmarshal(p, &s)
	*t = text(s)
	return err
}

func recordOf(e *Entry) *entryRecord {
	r := &entryRecord{
		Path: text(e.Path), Type: e.Type, Mode: e.Mode, UID: e.UID, GID: e.GID, ModTime: e.ModTime,
		Size: e.Size, Target: text(e.Target), Major: e.Major, Minor: e.Minor,
	}
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		r.Xattrs = append(r.Xattrs, xattrRecord{text(name), e.Xattrs[name]})
	}
	return r
}

func (r *entryRecord) entry() Entry {
	e := Entry{
		Path: string(r.Path), Type: r.Type, Mode: r.Mode, UID: r.UID, GID: r.GID, ModTime: r.ModTime,
		Size: r.Size, Target: string(r.Target), Major: r.Major, Minor: r.Minor,
	}
	if len(r.Xattrs) > 0 {
		e.Xattrs = make(map[string][]byte, len(r.Xattrs))
	}
	for _, x := range r.Xattrs {
		e.Xattrs[string(x.Name)] = x.Value
	}
	return e
}

// check refuses an entry that could not be restored, or not safely.
func (e *Entry) check() error {
	if err := checkPath(e.Path); err != nil {
		return err
	}
	switch e.Type {
	case TypeFile, TypeFifo, TypeSocket, TypeChar, TypeBlock:
	case TypeDir:
	case TypeSymlink:
		if e.Target == "" || strings.ContainsRune(e.Target, 0) {
			return fmt.Errorf("symlink %q has no target", e.Path)
		}
	case TypeHardlink:
		if err := checkPath(e.Target); err != nil || e.Target == "." {
			return fmt.Errorf("hard link %q to %q, which is not in the tree", e.Path, e.Target)
		}
	default:
		return fmt.Errorf("%q has the unknown type %q", e.Path, e.Type)
	}
	if e.Path == "." && e.Type != TypeDir {
		return fmt.Errorf("the root of a tree is a %s", e.Type)
	}
	if e.Mode&^0o7777 != 0 || e.Size < 0 || e.Size != 0 && e.Type != TypeFile {
		return fmt.Errorf("%q has mode %#o and size %d", e.Path, e.Mode, e.Size)
	}
	return nil
}

const pathLimit = 64 << 10

func checkPath(p string) error {
	if p == "" || len(p) > pathLimit || p[0] == '/' || strings.ContainsRune(p, 0) || path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../") {
		return fmt.Errorf("%.200q is not a path inside a tree", p)
	}
	return nil
}

// nesting checks the order of entries: a directory before what is in it, and
// everything that is in it before anything that is not.
type nesting struct {
	dirs    []string // from the root to the present directory
	started bool
}

// enter returns the directories that are complete now, innermost first.
func (n *nesting) enter(e *Entry) (left []string, err error) {
	if !n.started {
		if e.Path != "." {
			return nil, fmt.Errorf("a tree begins with %q instead of its root", e.Path)
		}
		n.started, n.dirs = true, []string{"."}
		return nil, nil
	}
	if e.Path == "." {
		return nil, fmt.Errorf("a tree has two roots")
	}
	parent := path.Dir(e.Path)
	for len(n.dirs) > 0 && n.dirs[len(n.dirs)-1] != parent {
		left = append(left, n.dirs[len(n.dirs)-1])
		n.dirs = n.dirs[:len(n.dirs)-1]
	}
	if len(n.dirs) == 0 {
		return nil, fmt.Errorf("%q comes without its directory before it", e.Path)
	}
	if e.Type == TypeDir {
		n.dirs = append(n.dirs, e.Path)
	}
	return left, nil
}
