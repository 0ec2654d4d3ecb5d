package archive_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"dormouse/controller/store"
	"dormouse/controller/store/archive"
)

func someItems() []store.Item {
	items := []store.Item{{Table: store.Events, Sequence: 17}}
	for i := range 60 {
		items = append(items, store.Item{Table: store.Jobs, Key: fmt.Sprintf("j-%d", i), Value: []byte(strings.Repeat("\x00é\n", i))})
	}
	return items
}

func written(t *testing.T) string {
	t.Helper()
	var buffer bytes.Buffer
	files := map[string][]byte{"pki/ca.key": []byte("secret")}
	if err := archive.Write(&buffer, archive.Header{Schema: 2, Created: time.Now(), Dormouse: "v1"}, files, someItems()); err != nil {
		t.Fatal(err)
	}
	return save(t, buffer.Bytes())
}

func save(t *testing.T, content []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestWhatWasWrittenIsRead(t *testing.T) {
	file := written(t)
	header, err := archive.Check(file)
	if err != nil || header.Schema != 2 || header.Dormouse != "v1" {
		t.Fatalf("%+v, %v", header, err)
	}
	want := []archive.Item{{File: "pki/ca.key", Item: store.Item{Value: []byte("secret")}}}
	for _, item := range someItems() {
		want = append(want, archive.Item{Item: item})
	}
	if contents(t, file) != fmt.Sprint(want) {
		t.Error("something else was read")
	}
}

func contents(t *testing.T, file string) string {
	t.Helper()
	var read []archive.Item
	for item, err := range archive.Items(file) {
		if err != nil {
			t.Fatal(err)
		}
		read = append(read, item)
	}
	return fmt.Sprint(read)
}

func TestADamagedFileIsRefused(t *testing.T) {
	whole, err := os.ReadFile(written(t))
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, content []byte) {
		t.Helper()
		file := save(t, content)
		_, err := archive.Check(file)
		var damaged *archive.DamagedError
		if !errors.As(err, &damaged) || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: want a sentence that names the file, got %v", what, err)
		}
	}
	for length := 0; length < len(whole); length += 7 {
		refused(fmt.Sprintf("cut to %d bytes", length), whole[:length])
	}
	for at := 0; at < len(whole); at += 3 {
		bad := bytes.Clone(whole)
		bad[at] ^= 0x10
		file := save(t, bad)
		// In what repeats itself there are several encodings of the same.
		if _, err := archive.Check(file); err == nil && contents(t, file) != contents(t, save(t, whole)) {
			t.Errorf("a flipped bit at %d was not noticed", at)
		}
	}
	refused("another file", []byte("#!/bin/sh\n"))
	lines := string(expand(t, whole))
	refused("a changed record", compress(t, strings.Replace(lines, `"j-3"`, `"j-x"`, 1)))
	refused("a missing record", compress(t, strings.Replace(lines, `{"table":"events","sequence":17}`+"\n", "", 1)))
	refused("something behind the end", compress(t, lines+`{"table":"jobs","key":"late"}`+"\n"))
}

func TestANewerFormatIsRefused(t *testing.T) {
	whole, err := os.ReadFile(written(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = archive.Check(save(t, compress(t, strings.Replace(string(expand(t, whole)), `"version":1`, `"version":2`, 1))))
	if err == nil || !strings.Contains(err.Error(), "newer dormouse") {
		t.Errorf("want a sentence about a newer dormouse, got %v", err)
	}
}

func expand(t *testing.T, content []byte) []byte {
	t.Helper()
	reader, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	text, err := reader.DecodeAll(content, nil)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func compress(t *testing.T, text string) []byte {
	t.Helper()
	writer, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	return writer.EncodeAll([]byte(text), nil)
}
