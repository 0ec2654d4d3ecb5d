package repository

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"google.golang.org/protobuf/encoding/protowire"
)

// CRIU describes the pages of a process or a shared segment in two images: a
// pagemap image (criu/images/pagemap.proto, criu/pagemap.c) lists address
// ranges, and the pages image it names holds the content of those ranges that
// are present, back to back, without a header.

// pageRange is an address range whose pages lie in the pages image.
type pageRange struct {
	Address uint64 // virtual, or the offset in a shared segment
	Pages   uint64
}

const (
	criuImageMagic   = 0x54564319 // criu/include/magic.h, IMG_COMMON_MAGIC
	criuPagemapMagic = 0x56084025 // PAGEMAP_MAGIC

	pagemapParent  = 1 << 0 // PE_PARENT: the pages are in the parent's images
	pagemapPresent = 1 << 2 // PE_PRESENT: the pages are in the pages image

	pagemapMessageLimit = 1 << 10
	addressLimit        = 1 << 62
)

var errNotPagemap = errors.New("not a pagemap image")

// readPagemap returns the number of the pages image that a pagemap image
// belongs to, and its present ranges, which can be walked once.
func readPagemap(rd io.Reader) (pagesID uint32, ranges iter.Seq2[pageRange, error], err error) {
	in := bufio.NewReaderSize(rd, 64<<10)
	var magic [8]byte
	if _, err := io.ReadFull(in, magic[:]); err != nil {
		return 0, nil, errNotPagemap
	}
	if binary.LittleEndian.Uint32(magic[:]) != criuImageMagic || binary.LittleEndian.Uint32(magic[4:]) != criuPagemapMagic {
		return 0, nil, errNotPagemap
	}
	head, err := readCRIUMessage(in)
	if err != nil {
		return 0, nil, fmt.Errorf("pagemap head: %w", err)
	}
	fields, err := varintFields(head)
	if err != nil {
		return 0, nil, fmt.Errorf("pagemap head: %w", err)
	}
	return uint32(fields[1]), func(yield func(pageRange, error) bool) {
		for {
			r, present, err := readPagemapEntry(in)
			if err == io.EOF {
				return
			}
			if err != nil {
				yield(pageRange{}, fmt.Errorf("pagemap entry: %w", err))
				return
			}
			if present && !yield(r, nil) {
				return
			}
		}
	}, nil
}

func readPagemapEntry(in io.Reader) (r pageRange, present bool, err error) {
	p, err := readCRIUMessage(in)
	if err != nil {
		return r, false, err
	}
	f, err := varintFields(p)
	if err != nil {
		return r, false, err
	}
	// vaddr = 1, nr_pages = 2 until CRIU 4.1, in_parent = 3, flags = 4,
	// nr_pages = 5 since CRIU 4.2, which may write 0 into field 2.
	r = pageRange{Address: f[1], Pages: f[5]}
	if r.Pages == 0 {
		r.Pages = f[2]
	}
	if r.Address%pageSize != 0 || r.Address > addressLimit || r.Pages > (addressLimit-r.Address)/pageSize {
		return r, false, fmt.Errorf("no range of pages: %d pages at %#x", r.Pages, r.Address)
	}
	flags, has := f[4]
	switch { // as in CRIU's init_compat_pagemap_entry
	case f[3] != 0:
		flags |= pagemapParent
	case !has:
		flags = pagemapPresent
	}
	return r, flags&pagemapPresent != 0 && flags&pagemapParent == 0 && r.Pages > 0, nil
}

// readCRIUMessage reads a length (u32) and that many bytes; io.EOF only at a
// message's beginning.
func readCRIUMessage(in io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n > pagemapMessageLimit {
		return nil, fmt.Errorf("a message of %d bytes", n)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(in, p); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	return p, nil
}

// varintFields returns the integer fields of a protobuf message.
func varintFields(p []byte) (map[protowire.Number]uint64, error) {
	fields := make(map[protowire.Number]uint64, 4)
	for len(p) > 0 {
		number, kind, n := protowire.ConsumeTag(p)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		p = p[n:]
		if kind == protowire.VarintType {
			v, n := protowire.ConsumeVarint(p)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			fields[number] = v
		}
		n = protowire.ConsumeFieldValue(number, kind, p)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		p = p[n:]
	}
	return fields, nil
}

// pagemapRanges opens a pagemap image for another walk.
func pagemapRanges(path string) iter.Seq2[pageRange, error] {
	return func(yield func(pageRange, error) bool) {
		f, err := os.Open(path)
		if err != nil {
			yield(pageRange{}, err)
			return
		}
		defer f.Close()
		_, ranges, err := readPagemap(f)
		if err != nil {
			yield(pageRange{}, err)
			return
		}
		ranges(yield)
	}
}

// pagemapOf reports which pages image a pagemap image describes and how many
// bytes that has. Only ranges in ascending order that do not overlap will do
// for chunking by address.
func pagemapOf(path string) (pagesID uint32, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	pagesID, ranges, err := readPagemap(f)
	if err != nil {
		return 0, 0, err
	}
	var next uint64
	for r, err := range ranges {
		if err != nil {
			return 0, 0, err
		}
		if r.Address < next {
			return 0, 0, errors.New("ranges overlap or are not in order")
		}
		next = r.Address + r.Pages*pageSize
		size += int64(r.Pages * pageSize)
	}
	return pagesID, size, nil
}

// addresses gives the address of every page of the ranges.
func addresses(ranges iter.Seq2[pageRange, error]) iter.Seq2[uint64, error] {
	return func(yield func(uint64, error) bool) {
		for r, err := range ranges {
			if err != nil {
				yield(0, err)
				return
			}
			for i := range r.Pages {
				if !yield(r.Address+i*pageSize, nil) {
					return
				}
			}
		}
	}
}
