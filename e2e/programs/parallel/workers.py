"""workers.py ITEMS PACE_MS: Python's multiprocessing over sockets. Task 0 serves two queues with a BaseManager on TCP; the processes of the other
tasks, two in each, take items from one and put results into the other. Task 0 prints the results in order.
"""

import hashlib
import itertools
import multiprocessing
import os
import queue
import sys
import threading
import time
from multiprocessing.managers import BaseManager

from steps import steps

PORT, KEY = 6398, b"workers"
PACE = float(sys.argv[2]) / 1000
TASK, TASKS = int(os.environ["DORMOUSE_TASK"]), int(os.environ["DORMOUSE_TASKS"])
HOST = os.environ["DORMOUSE_HOSTS"].split(",")[0]
work, results = queue.Queue(maxsize=16), queue.Queue()


class Manager(BaseManager):
    pass


def remote():
    for name in "work", "results":
        Manager.register(name)
    while True:
        manager = Manager(address=(HOST, PORT), authkey=KEY)
        try:
            manager.connect()
            return manager
        except OSError:
            time.sleep(0.02)


def worker():
    manager = remote()
    todo, done = manager.work(), manager.results()
    while (item := todo.get()) is not None:
        text = b"%d" % item
        for _ in range(200):
            text = hashlib.sha256(text).digest()
        done.put((item, text.hex()))
        time.sleep(PACE)
    done.put(None)


def serve():
    Manager.register("work", callable=lambda: work)
    Manager.register("results", callable=lambda: results)
    server = Manager(address=("", PORT), authkey=KEY).get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    workers = 2 * (TASKS - 1)

    def feed():
        for item in itertools.chain(steps(), [None] * workers):
            work.put(item)

    threading.Thread(target=feed, daemon=True).start()
    early, following = {}, 1
    while workers:
        result = results.get()
        if result is None:
            workers -= 1
            continue
        early[result[0]] = result[1]
        while following in early:
            print("item", following, early.pop(following), flush=True)
            following += 1
    time.sleep(0.2)  # the last answers are on their way to the workers
    os._exit(0)


if TASK == 0:
    serve()
processes = [multiprocessing.Process(target=worker) for _ in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(process.exitcode for process in processes))
