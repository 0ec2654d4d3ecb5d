package criu

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"testing"
)

// pstreeImage is a pstree.img of CRIU 4.2.1: two processes, the second with two
// threads.
const pstreeImage = "19435654" + "30302750" + // both magic numbers
	"0a000000" + "0801" + "1000" + "1801" + "2001" + "2801" +
	"0c000000" + "0806" + "1001" + "1801" + "2001" + "2806" + "2807"

func TestReadTree(t *testing.T) {
	data, err := hex.DecodeString(pstreeImage)
	if err != nil {
		t.Fatal(err)
	}
	got, err := readTree(bytes.NewReader(data))
	want := []TreeProcess{
		{PID: 1, PPID: 0, PGID: 1, SID: 1, Threads: []int{1}},
		{PID: 6, PPID: 1, PGID: 1, SID: 1, Threads: []int{6, 7}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	for n := range data {
		tree, err := readTree(bytes.NewReader(data[:n]))
		complete := n == 8 || n == 22 // between entries
		if (err == nil) != complete || err != nil && !errors.Is(err, errBadImage) {
			t.Errorf("cut after %d bytes: got %v, %v", n, tree, err)
		}
	}
}

func FuzzReadTree(f *testing.F) {
	data, _ := hex.DecodeString(pstreeImage)
	f.Add(data)
	f.Add(data[:20])
	f.Fuzz(func(t *testing.T, image []byte) {
		tree, err := readTree(bytes.NewReader(image))
		if err != nil && !errors.Is(err, errBadImage) {
			t.Errorf("unexpected kind of error: %v", err)
		}
		if len(tree) > len(image)/4 {
			t.Errorf("%d processes in %d bytes", len(tree), len(image))
		}
	})
}

func FuzzRearmed(f *testing.F) {
	header := []byte("\x19\x43\x56\x54\x38\x31\x30\x56")
	f.Add(header)
	f.Add(append(header, "\x04\x00\x00\x00\x08\x0a\x10\x01"...))
	f.Fuzz(func(t *testing.T, image []byte) {
		changed, err := rearmed(image)
		if err != nil && !errors.Is(err, errBadImage) {
			t.Errorf("unexpected kind of error: %v", err)
		}
		if changed == nil {
			return
		}
		if again, err := rearmed(changed); again != nil || err != nil {
			t.Errorf("the corrected image needs another correction: %v, %v", again, err)
		}
	})
}

func FuzzParseMountInfo(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n")
	f.Fuzz(func(t *testing.T, text string) { parseMountInfo(text) })
}

func FuzzErrorLines(f *testing.F) {
	f.Add([]byte(sampleLog))
	f.Fuzz(func(t *testing.T, log []byte) {
		if n := len(errorLines(bytes.NewReader(log))); n > maxErrorLines {
			t.Errorf("%d lines", n)
		}
	})
}

func TestParseMountInfo(t *testing.T) {
	got := parseMountInfo("36 35 98:0 /a /mnt\\0402 rw master:1 - ext3 /dev/ro\\134ot rw\nnonsense\n")
	want := []mountEntry{{36, "98:0", "/a", "/mnt 2", "ext3", `/dev/ro\ot`, 0}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}
