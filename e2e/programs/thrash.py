"""thrash.py FILE: reads 64 MiB at random through its memory, 100,000 pages a second at most, and prints a line for each 20,000. With less memory than the file takes
it waits for the disk instead.
"""

import mmap
import os
import random
import sys
import time

SIZE = 64 << 20
with open(sys.argv[1], "wb") as file:
    while file.tell() < SIZE:
        file.write(os.urandom(1 << 20))
    os.fsync(file.fileno())
with open(sys.argv[1], "rb") as file:
    memory = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
memory.madvise(mmap.MADV_RANDOM)
total = done = 0
while True:
    for _ in range(2000):
        total += memory[random.randrange(SIZE)]
    done += 2000
    if done % 20000 == 0:
        print("read", done, flush=True)
    time.sleep(0.02)
