// Package pages knows how CRIU's images describe the content of memory
// (criu/pagemap.c, criu/mem.c and images/pagemap.proto of CRIU 4.2), and does two
// things with it. Images in a form that it does not know it leaves alone.
//
// # Zeros
//
// CRIU stores every page that was ever written, also those full of zeros. In
// private anonymous memory a page that is missing in the images reads as zeros
// after a restore, too: without them images are smaller, and CRIU and the task need
// not carry them. [DropZeros] takes them out after a dump.
//
// # Filling
//
// During a restore CRIU reads memory page by page in one thread for each process.
// [Divide] takes what is simple out of the images that CRIU sees: private anonymous
// memory that can be written and is not inherited from a parent or by a child (for
// pages that those share CRIU shares again). [Division.Fill] writes it, once all
// processes are there and before any of them runs, straight from the blocks that
// were fetched and verified, with several processors at once:
//
//	images in the spool        pagemap-7.img      what CRIU fills: the rest
//	                           pagemap-7.img.all  everything, as it was stored
//	pagefs                     pages-3.img        the rest, without gaps
//	Fill                       process_vm_writev(2) into the areas taken
//
// The reader reads ahead while CRIU is still building the processes: by then a
// small task's memory is there already.
package pages
