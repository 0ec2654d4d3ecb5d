"""tree.py STEPS PACE_MS: a parent, three forked workers behind pipes and a `cat` between them.

Each step sends a number through cat to every worker; each worker keeps a hash chain and answers with its newest link.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time

from steps import steps


def worker(number, requests, answers):
    chain = b"worker %d" % number
    for line in requests:
        chain = hashlib.sha256(chain + line).digest()
        answers.write(chain.hex().encode() + b"\n")
        answers.flush()
    os._exit(0)


def start(number):
    request_read, request_write = os.pipe()
    answer_read, answer_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(request_write)
        os.close(answer_read)
        worker(number, os.fdopen(request_read, "rb"), os.fdopen(answer_write, "wb"))
    os.close(request_read)
    os.close(answer_write)
    return pid, os.fdopen(request_write, "wb"), os.fdopen(answer_read, "rb")


def main():
    pace = float(sys.argv[2]) / 1000
    alarms = []
    signal.signal(signal.SIGUSR1, lambda *_: alarms.append(1))
    workers = [start(number) for number in range(3)]
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for step in steps():
        cat.stdin.write(b"%d\n" % step)
        cat.stdin.flush()
        line = cat.stdout.readline()
        for _, requests, _ in workers:
            requests.write(line)
            requests.flush()
        os.kill(os.getpid(), signal.SIGUSR1)
        links = [answers.readline().decode().strip()[:16] for _, _, answers in workers]
        print("step", step, *links, "signals", len(alarms), flush=True)
        time.sleep(pace)
    cat.stdin.close()
    codes = [cat.wait()]
    for pid, requests, _ in reversed(workers):  # a worker also holds the pipes of those before it
        requests.close()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print("end", *codes, flush=True)


main()
