package criu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"google.golang.org/protobuf/proto"
)

// The kernel arms a periodic timerfd again only when its expiry is read. Until
// then it tells "0 left", which a restore takes for "disarmed": the timer would
// never expire again (timerfd_settime(2): a zero it_value disarms). Such timers
// are given their interval as the time left.

const filesFile = "files.img"

// rearmTimers corrects the periodic timers in a set of images that had expired
// unread.
func rearmTimers(imagesDir string) error {
	path := filepath.Join(imagesDir, filesFile)
	image, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	changed, err := rearmed(image)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if changed == nil {
		return nil
	}
	return writeImage(path, changed)
}

// rearmed returns the corrected image, or nil if nothing is to be corrected.
func rearmed(image []byte) ([]byte, error) {
	var out bytes.Buffer
	found := false
	err := readEntries(bytes.NewReader(image), "FILES", func(entry []byte) error {
		var file fdinfo.FileEntry
		// Partial: a newer CRIU's kind of file is unknown to us, and so its type.
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(entry, &file); err != nil {
			return fmt.Errorf("%w: %w", errBadImage, err)
		}
		t := file.GetTfd()
		if t.GetTicks() > 0 && t.GetVsec() == 0 && t.GetVnsec() == 0 && (t.GetIsec() > 0 || t.GetInsec() > 0) {
			t.Vsec, t.Vnsec = t.Isec, t.Insec
			var err error
			if entry, err = (proto.MarshalOptions{AllowPartial: true}).Marshal(&file); err != nil { // keeps fields it does not know
				return err
			}
			found = true
		}
		appendEntry(&out, entry)
		return nil
	})
	if err != nil || !found {
		return nil, err
	}
	return append(bytes.Clone(image[:2*magicSize]), out.Bytes()...), nil
}
