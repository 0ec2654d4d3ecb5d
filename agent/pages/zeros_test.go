package pages

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestZeroPagesOfAnonymousMemoryAreDropped(t *testing.T) {
	for _, wide := range []bool{false, true} {
		dir := t.TempDir()
		const flags = pagePresent | 2
		process(t, dir, wide, []pageRun{
			{0x1e000, 4, flags}, // two pages of a file's area, two anonymous ones
			{0x30000, 3, flags},
			{0x50000, 1, flags}, // in no area
		}, pagesOf("0a0b"+"00c"+"0"))
		saved, err := DropZeros(dir)
		must(t, err)
		if saved != 3*pageSize {
			t.Errorf("saved %d bytes, want those of 3 pages", saved)
		}
		m, err := readPagemap(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		want := []pageRun{{0x1e000, 2, flags}, {0x21000, 1, flags}, {0x32000, 1, flags}, {0x50000, 1, flags}}
		if m.wide != wide || m.id != 7 || !slices.Equal(m.entries, want) {
			t.Errorf("the map is %+v, want the runs %v", m, want)
		}
		content, err := os.ReadFile(filepath.Join(dir, "pages-7.img"))
		must(t, err)
		if !bytes.Equal(content, pagesOf("0abc0")) {
			t.Error("the pages image does not hold the kept pages in their order")
		}
		if again, err := DropZeros(dir); again != 0 || err != nil {
			t.Errorf("a second time saved %d (%v)", again, err)
		}
	}
}

func TestOddImagesAreLeftAlone(t *testing.T) {
	const flags = pagePresent
	for name, runs := range map[string][]pageRun{
		"in a parent":   {{0x20000, 2, flags | pageParent}},
		"not present":   {{0x20000, 2, 0}},
		"too few pages": {{0x20000, 3, flags}},
		"unaligned":     {{0x20001, 2, flags}},
	} {
		dir := t.TempDir()
		process(t, dir, true, runs, pagesOf("00"))
		before, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		saved, err := DropZeros(dir)
		must(t, err)
		after, err := os.ReadFile(filepath.Join(dir, "pagemap-1.img"))
		must(t, err)
		if saved != 0 || !bytes.Equal(before, after) {
			t.Errorf("%s: saved %d bytes", name, saved)
		}
	}
}
