package criu

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v7/magic"
	"google.golang.org/protobuf/proto"
)

// A CRIU that runs in the tree's network namespace writes images that say: the
// tree has the network of its CRIU. A restore shall find there what a CRIU outside
// of it writes: the tree has one of its own, which comes from outside under a name.
// CRIU tells the two apart by the number that its own network namespace has in the
// inventory (get_clone_mask in criu/namespaces.c).

const (
	inventoryFile = "inventory.img"

	// commonMagic begins an image of a dump (IMG_COMMON_MAGIC in criu/include/magic.h).
	commonMagic = 0x54564319

	// noNetNS is a number that no namespace has: CRIU counts them from 1.
	noNetNS = 1<<32 - 1
)

// declareNetExternal corrects a set of images of such a CRIU.
func declareNetExternal(imagesDir string) error {
	path := filepath.Join(imagesDir, inventoryFile)
	image, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed, id, err := withoutNet(image)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	description, err := externalNet()
	if err != nil {
		return err
	}
	if err := writeImage(filepath.Join(imagesDir, fmt.Sprintf("netns-%d.img", id)), description); err != nil {
		return err
	}
	return writeImage(path, changed)
}

// withoutNet returns an inventory in which CRIU's network namespace is none of the
// tree's, and the number it had.
func withoutNet(image []byte) (changed []byte, id uint32, err error) {
	out := bytes.NewBuffer(bytes.Clone(image[:min(magicSize, len(image))]))
	err = readKind(bytes.NewReader(image), "INVENTORY", func(b []byte) error {
		var entry inventory.InventoryEntry
		if err := proto.Unmarshal(b, &entry); err != nil {
			return fmt.Errorf("%w: %w", errBadImage, err)
		}
		ids := entry.GetRootIds()
		if id = ids.GetNetNsId(); id == 0 {
			return fmt.Errorf("%w: it has no network namespace", errBadImage)
		}
		ids.NetNsId = proto.Uint32(noNetNS)
		b, err := proto.Marshal(&entry) // keeps fields it does not know
		appendEntry(out, b)
		return err
	})
	if err == nil && id == 0 {
		err = fmt.Errorf("%w: it is empty", errBadImage)
	}
	return out.Bytes(), id, err
}

// externalNet is the image of a network namespace that comes from outside.
func externalNet() ([]byte, error) {
	entry, err := proto.Marshal(&netdev.NetnsEntry{ExtKey: proto.String(netNSKey)})
	if err != nil {
		return nil, err
	}
	image := &bytes.Buffer{}
	_ = binary.Write(image, binary.LittleEndian, []uint32{commonMagic, uint32(magic.LoadMagic().ByName["NETNS"])})
	appendEntry(image, entry)
	return image.Bytes(), nil
}
