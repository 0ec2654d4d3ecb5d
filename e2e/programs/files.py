"""files.py STEPS PACE_MS: deleted open files, hard links, locks, a sparse file and a growing log, in /var/tmp and in /dev/shm.

A second process keeps asking whether the locks are really held.
"""

import fcntl
import hashlib
import mmap
import os
import shutil
import sys
import tempfile
import time

from steps import steps


def held(path, lock):
    with open(path, "r+b") as other:
        try:
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def asker(questions, answers, directory):
    while os.read(questions, 1):
        both = held(f"{directory}/flock", fcntl.flock) and held(f"{directory}/posix", fcntl.lockf)
        os.write(answers, b"y" if both else b"n")
    os._exit(0)


def digest(file):
    file.seek(0)
    return hashlib.sha256(file.read()).hexdigest()[:16]


def main():
    pace = float(sys.argv[2]) / 1000
    directory = tempfile.mkdtemp(dir="/var/tmp", prefix="files-")
    flocked = open(f"{directory}/flock", "w+b")
    fcntl.flock(flocked, fcntl.LOCK_EX)
    locked = open(f"{directory}/posix", "w+b")
    fcntl.lockf(locked, fcntl.LOCK_EX)
    question_read, question_write = os.pipe()
    answer_read, answer_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(question_write)
        asker(question_read, answer_write, directory)
    deleted = open(f"{directory}/deleted", "w+b")
    os.unlink(f"{directory}/deleted")
    shm = open(f"/dev/shm/files-{os.getpid()}", "w+b")
    shm.truncate(1 << 20)
    memory = mmap.mmap(shm.fileno(), 1 << 20)
    os.unlink(f"/dev/shm/files-{os.getpid()}")
    linked = open(f"{directory}/link-a", "w+b")
    os.link(f"{directory}/link-a", f"{directory}/link-b")
    os.unlink(f"{directory}/link-a")
    sparse = open(f"{directory}/sparse", "w+b")
    sparse.truncate(1 << 30)
    log = open(f"{directory}/log", "ab", buffering=0)
    for step in steps():
        line = b"line %d\n" % step
        for file in (deleted, linked):
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
        memory[step % (1 << 20)] = step % 251
        sparse.seek(step * 65536 % (1 << 30))
        sparse.write(line)
        sparse.flush()
        log.write(line)
        os.write(question_write, b"?")
        locks = os.read(answer_read, 1).decode()
        with open(f"{directory}/link-b", "rb") as second, open(f"{directory}/log", "rb") as whole:
            print("step", step, digest(deleted), digest(second), digest(whole), hashlib.sha256(memory).hexdigest()[:16], "locks", locks,
                  "links", os.fstat(deleted.fileno()).st_nlink, os.fstat(linked.fileno()).st_nlink,
                  "sparse", os.fstat(sparse.fileno()).st_size, os.fstat(sparse.fileno()).st_blocks < 1 << 20, flush=True)
        time.sleep(pace)
    os.close(question_write)
    shutil.rmtree(directory)
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
