package pid1

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestFramesComeThrough(t *testing.T) {
	var wire bytes.Buffer
	for _, payload := range []string{"", "x", "hello"} {
		if err := WriteFrame(&wire, FrameStdout, []byte(payload)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"", "x", "hello"} {
		kind, got, err := ReadFrame(&wire)
		if err != nil || kind != FrameStdout || string(got) != want {
			t.Errorf("got %d %q %v, want %q", kind, got, err, want)
		}
	}
	if _, _, err := ReadFrame(&wire); err != io.EOF {
		t.Errorf("after the last: %v, want io.EOF", err)
	}
}

func TestCutAndOversizedFramesAreErrors(t *testing.T) {
	for _, wire := range []string{"\x01", "\x01\x00\x00\x00\x05ab", "\x01\xff\xff\xff\xff"} {
		if _, _, err := ReadFrame(bytes.NewReader([]byte(wire))); err == nil || errors.Is(err, io.EOF) && err == io.EOF {
			t.Errorf("%q: got %v", wire, err)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x02\x00\x00\x00\x03abc"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		kind, payload, err := ReadFrame(bytes.NewReader(wire))
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := WriteFrame(&again, kind, payload); err != nil || !bytes.HasPrefix(wire, again.Bytes()) {
			t.Errorf("%q was read as %d %q", wire, kind, payload)
		}
	})
}
