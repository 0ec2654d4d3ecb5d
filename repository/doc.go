// Package repository stores checkpoints: the memory images and the files of
// every task, in pieces that checkpoints share, on any backend.
//
// # Objects
//
// A chunk is up to 64 KiB of plaintext, named by its BLAKE3 hash, and stored
// compressed in a pack. Packs of about 16 MiB are the files of a repository;
// index objects say which chunk lies in which pack. A part is one task's share
// of a checkpoint: trees of entries whose content is lists of runs, each a hole
// or a stretch of a chunk. A manifest names the parts of all tasks, is signed,
// and is written last: that write makes the checkpoint durable. Since parts are
// named by hash and name chunks by hash, the signature covers every byte.
// docs/design/repository.md gives the formats byte by byte.
//
// # Upload (NewPart, AddImages, AddTree, Commit)
//
//  1. take a lease; read what garbage collection has condemned; bring the local
//     copy of the index up to date;
//  2. cut every file into batches of up to 4 MiB; pages images by the address of
//     their pages, other files by offset; holes and unchanged files are not read;
//     images in memory are looked at where they are;
//  3. in parallel, for each batch, window by window of 64 KiB: drop zero pages;
//     refer to the parent's chunks for pages whose fingerprint is that of the
//     parent's page at the same address; make chunks of the rest: hash, look
//     up, and if new compress; add those of a batch to the pack in memory;
//  4. in order, join the runs of batches to segments and segments to entries;
//  5. store full packs in the background, and an index object for every four;
//  6. store the part.
//
// An upload that is interrupted leaves chunks that the next one finds by step 3.
//
// # Restore (LoadManifest, OpenPart, RestoreImages, RestoreTree)
//
// Verify the manifest's signature and the part's hash; make the names in order,
// each in a directory opened before, following nothing; fill the files in
// parallel, a segment at a time: look up its chunks, read them in the order they
// lie in packs, check the hash of each, write. On any error remove all of it.
//
// The content of memory can be had without writing it anywhere (OpenMemory): read
// in blocks of 4 MiB, ahead of those who ask for it, in the order of the images.
//
// # Bounds
//
// With w = Options.Workers, by default the number of CPUs, buffers take
//
//	an upload    68 MiB + w × 8.5 MiB     (4 packs, and one batch per worker)
//	a restore    w × 4.2 MiB
//	memory read  96 MiB + w × 8.4 MiB     (24 blocks)
//	verify       w × 17 MiB
//
// however large the job is; the Go heap may be up to twice that between two
// runs of its collector. What does grow does so slowly: 100 bytes per 64 MiB of
// a single file, 100 bytes per 64 KiB of the lists of entries, the names of
// hard-linked files in Walk. The local copy of the index is a file on disk with
// about 120 bytes per chunk; the page cache of a task is 0.5 % of its memory, on
// disk, and is read and written in order.
package repository
