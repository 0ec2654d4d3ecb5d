"""direct.py FILE: writes 64 KiB to FILE twenty times a second, past the page cache: each write waits for the disk (open(2), O_DIRECT)."""

import mmap
import os
import sys
import time

file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
block = mmap.mmap(-1, 64 << 10)  # aligned to pages
while True:
    os.pwrite(file, block, 0)
    time.sleep(0.05)
