"""terminal.py STEPS PACE_MS: a shell on a pseudo-terminal, spoken to as a person would.

The terminal echoes, has a size and a foreground process group; the shell is its session's leader.
"""

import fcntl
import os
import pty
import struct
import sys
import termios
import time

from steps import steps


def read_until(fd, end):
    data = b""
    while not data.endswith(end):
        data += os.read(fd, 4096)
    return data


def main():
    pace = float(sys.argv[2]) / 1000
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PS1"] = ""
        os.execvp("sh", ["sh", "-c", 'stty -echo; echo begin; sum=0; while read n; do sum=$(( (sum * 31 + n) % 1000003 )); echo "$n -> $sum"; done; echo over'])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    read_until(terminal, b"begin\r\n")
    for step in steps():
        os.write(terminal, b"%d\n" % step)
        answer = read_until(terminal, b"\r\n").decode().strip()
        size = struct.unpack("HHHH", fcntl.ioctl(terminal, termios.TIOCGWINSZ, b"\0" * 8))[:2]
        foreground = os.tcgetpgrp(terminal) == pid
        print("step", step, answer, "size", *size, "foreground", foreground, flush=True)
        time.sleep(pace)
    os.write(terminal, b"\x04")
    print(read_until(terminal, b"over\r\n").decode().strip(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


main()
