"""redis_pair.py STEPS PACE_MS: task 1 is a redis-server, task 0 loads it over the job's network and verifies all it answers (see load.py)."""

import os
import sys
import time

from load import Client, drive

PORT = 6399


def connect(host):
    while True:
        try:
            return Client(PORT, host)
        except (ConnectionRefusedError, OSError):
            time.sleep(0.02)


if os.environ["DORMOUSE_TASK"] == "1":
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp("redis-server", ["redis-server", "--port", str(PORT), "--protected-mode", "no", "--save", "", "--appendonly", "no"])
host = os.environ["DORMOUSE_HOSTS"].split(",")[1]
drive(connect(host), connect(host), float(sys.argv[2]) / 1000)
