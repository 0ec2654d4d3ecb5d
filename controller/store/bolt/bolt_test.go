package bolt_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
	"dormouse/controller/store/storetest"
)

type file string

func (f file) Open(t *testing.T) store.Store {
	t.Helper()
	s, err := bolt.Open(string(f))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Opener {
		return file(filepath.Join(t.TempDir(), "controller.db"))
	})
}

// filled returns the path of a store with some records.
func filled(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "controller.db")
	s := file(name).Open(t)
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for i := range 500 {
			if err := tx.Put(store.Jobs, fmt.Sprintf("j-%04d", i), []byte(strings.Repeat("x", 200))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}

func records(t *testing.T, s store.Store) (count int) {
	t.Helper()
	err := s.View(t.Context(), func(tx store.Tx) error {
		return tx.Scan(store.Jobs, "", func(string, []byte) error { count++; return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}

func refused(t *testing.T, name string) {
	t.Helper()
	s, err := bolt.Open(name)
	if err == nil {
		s.Close()
		t.Fatal("the damaged store was opened")
	}
	var damaged *store.DamagedError
	if !errors.As(err, &damaged) {
		t.Fatalf("want a DamagedError, got %v", err)
	}
	if !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("want one sentence naming %s, got %q", name, err)
	}
}

func TestRefusesAFileThatIsNoStore(t *testing.T) {
	name := filepath.Join(t.TempDir(), "controller.db")
	if err := os.WriteFile(name, []byte(strings.Repeat("not a database ", 4000)), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, name)
}

func TestRefusesATruncatedFileAtAnyLength(t *testing.T) {
	whole, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	for length := 1; length < len(whole); length += 1 + length*2 {
		name := filepath.Join(t.TempDir(), "controller.db")
		if err := os.WriteFile(name, whole[:length], 0o600); err != nil {
			t.Fatal(err)
		}
		// bbolt keeps spare room at the end of its file: a cut there loses nothing.
		if s, err := bolt.Open(name); err == nil {
			if count := records(t, s); count != 500 {
				t.Errorf("a store cut to %d bytes was opened with %d of 500 records", length, count)
			}
			s.Close()
			continue
		}
		refused(t, name)
	}
}

func TestRefusesFlippedBitsInRecords(t *testing.T) {
	name := filled(t)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.LastIndex(string(whole), "xxxxxxxx")
	whole[at] ^= 1
	if err := os.WriteFile(name, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, name)
}

func TestRefusesZeroedPagesWithoutPanic(t *testing.T) {
	whole, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	for at := 2 * page; at+page <= len(whole); at += page {
		if bytes.Count(whole[at:at+page], []byte{0}) == page {
			continue
		}
		name := filepath.Join(t.TempDir(), "controller.db")
		bad := append([]byte(nil), whole...)
		clear(bad[at : at+page])
		if err := os.WriteFile(name, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := bolt.Open(name)
		if err != nil {
			refused(t, name)
			continue
		}
		s.Close() // a free page
	}
}

func TestRefusesANewerSchema(t *testing.T) {
	name := filled(t)
	db, err := bbolt.Open(name, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("dormouse")).Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, store.Schema+1))
	})
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	_, err = bolt.Open(name)
	if err == nil || !strings.Contains(err.Error(), "newer dormouse") || !strings.Contains(err.Error(), name) {
		t.Fatalf("want a sentence that names the file and a newer dormouse, got %v", err)
	}
}

func TestRefusesAFileInUse(t *testing.T) {
	name := filled(t)
	s := file(name).Open(t)
	defer s.Close()
	_, err := bolt.Open(name)
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("want a sentence that says it is in use, got %v", err)
	}
}
