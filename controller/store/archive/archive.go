// Package archive is the file that a back-up of a controller's store is.
//
// It is a zstd stream of lines of JSON:
//
//	{"format":"dormouse back-up","version":1,"schema":2,"created":"...","dormouse":"..."}
//	{"file":"pki/ca.key","value":"..."}                  a key of the state directory
//	{"table":"events","sequence":17}                     the last number of a table
//	{"table":"jobs","key":"j-...","value":"..."}         a record
//	{"items":3,"sha256":"..."}                           of all lines before this one
//
// Values are base64. A Reader gives items out as it reads them, but its file is
// only known to be whole when it has reached the last line: Check does that first.
package archive

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"

	"dormouse/controller/store"
)

const (
	format = "dormouse back-up"
	// Version is that of the format, which has nothing to do with the store's schema.
	Version = 1
	// longest bounds a line: the largest record, as base64, and then some.
	longest = 256 << 20
)

// Header says what a back-up is of.
type Header struct {
	Format   string    `json:"format"`
	Version  int       `json:"version"`
	Schema   int       `json:"schema"` // of the records
	Created  time.Time `json:"created"`
	Dormouse string    `json:"dormouse"` // the version that wrote it
}

// Item is a line of a back-up: something of the store, or a file of the state
// directory.
type Item struct {
	store.Item
	File string `json:"file,omitempty"`
}

type trailer struct {
	Items  int    `json:"items"`
	SHA256 string `json:"sha256"`
}

// Write writes a back-up of s and of files to w.
func Write(w io.Writer, header Header, files map[string][]byte, items []store.Item) error {
	compressor, err := zstd.NewWriter(w)
	if err != nil {
		return err
	}
	lines := &lines{w: compressor, sum: sha256.New()}
	header.Format, header.Version = format, Version
	if err := lines.write(header); err != nil {
		return err
	}
	count := 0
	for name, content := range files {
		count++
		if err := lines.write(Item{File: name, Item: store.Item{Value: content}}); err != nil {
			return err
		}
	}
	for _, item := range items {
		count++
		if err := lines.write(Item{Item: item}); err != nil {
			return err
		}
	}
	if err := lines.write(trailer{Items: count, SHA256: hex.EncodeToString(lines.sum.Sum(nil))}); err != nil {
		return err
	}
	if err := compressor.Close(); err != nil {
		return fmt.Errorf("write the back-up: %w", err)
	}
	return nil
}

// lines writes lines of JSON and their sum.
type lines struct {
	w   io.Writer
	sum hash.Hash
}

func (l *lines) write(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	l.sum.Write(line)
	if _, err := l.w.Write(line); err != nil {
		return fmt.Errorf("write the back-up: %w", err)
	}
	return nil
}

// DamagedError refuses a file that is no back-up, or not a whole one.
type DamagedError struct {
	File string
	What string
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("%s cannot be restored (%s): take another back-up", e.File, e.What)
}

// Check reads all of a back-up, and fails unless it is whole.
func Check(file string) (Header, error) {
	var header Header
	for _, err := range read(file, &header) {
		if err != nil {
			return header, err
		}
	}
	return header, nil
}

// Items gives out what is in a back-up. When it is not whole, the last one comes
// with an error.
func Items(file string) iter.Seq2[Item, error] { return read(file, &Header{}) }

func read(file string, header *Header) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		f, err := os.Open(file)
		if err != nil {
			yield(Item{}, fmt.Errorf("read the back-up: %w", err))
			return
		}
		defer f.Close()
		stopped := false
		*header, err = readItems(f, func(item Item) bool {
			stopped = !yield(item, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(Item{}, explain(file, err))
		}
	}
}

func explain(file string, err error) error {
	var path *os.PathError
	var newer *newerError
	switch {
	case errors.As(err, &path):
		return fmt.Errorf("read the back-up: %w", err)
	case errors.As(err, &newer):
		return fmt.Errorf("%s has version %d of the format and this dormouse knows %d: use the newer dormouse that wrote it", file, newer.version, Version)
	}
	return &DamagedError{File: file, What: err.Error()}
}

type newerError struct{ version int }

func (e *newerError) Error() string { return fmt.Sprintf("version %d", e.version) }

// readItems reads a whole back-up, until give returns false.
func readItems(r io.Reader, give func(Item) bool) (Header, error) {
	var header Header
	expander, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return header, err
	}
	defer expander.Close()
	scanner := bufio.NewScanner(expander)
	scanner.Buffer(nil, longest)
	sum, count := sha256.New(), 0
	if !scanner.Scan() {
		return header, reason(scanner, "it is no back-up")
	}
	if err := json.Unmarshal(scanner.Bytes(), &header); err != nil || header.Format != format {
		return header, errors.New("it is no back-up")
	}
	if header.Version > Version {
		return header, &newerError{header.Version}
	}
	for {
		sum.Write(append(scanner.Bytes(), '\n'))
		if !scanner.Scan() {
			return header, reason(scanner, "it ends too early")
		}
		var line struct {
			Item
			trailer
		}
		if err := json.Unmarshal(scanner.Bytes(), &line); err != nil {
			return header, errors.New("it has a line that makes no sense")
		}
		if line.SHA256 != "" {
			return header, line.check(scanner, sum, count)
		}
		count++
		if !give(line.Item) {
			return header, nil
		}
	}
}

// check compares the last line with what was read before it.
func (t trailer) check(scanner *bufio.Scanner, sum hash.Hash, count int) error {
	if t.Items != count || t.SHA256 != hex.EncodeToString(sum.Sum(nil)) {
		return errors.New("its check sum is wrong")
	}
	if scanner.Scan() {
		return errors.New("it goes on behind its end")
	}
	return reason(scanner, "")
}

// reason is why a scanner stopped: the error of what it reads, or otherwise.
func reason(scanner *bufio.Scanner, otherwise string) error {
	if err := scanner.Err(); err != nil {
		return err
	}
	if otherwise == "" {
		return nil
	}
	return errors.New(otherwise)
}
