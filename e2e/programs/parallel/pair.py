"""pair.py STEPS PACE_MS: task 0 is a server, every other task a client of it on one connection each.

Client and server of a connection keep the same chain of hashes. Every message carries its number, where the chain stands
and some kilobytes made from it, and the receiver compares all of it with its own: nothing can be lost, repeated or
changed unseen. Each client prints a line per step, the server one at the end for each client. The server says after each
step whether the client is to go on: it looks whether it was asked to end.
"""

import hashlib
import itertools
import os
import socket
import struct
import sys
import threading
import time

from steps import asked_to_end, steps

PORT = 6397
PACE = float(sys.argv[2]) / 1000
END = struct.pack(">I", 0)
TASK, TASKS = int(os.environ["DORMOUSE_TASK"]), int(os.environ["DORMOUSE_TASKS"])
HOST = os.environ["DORMOUSE_HOSTS"].split(",")[0]


def exactly(connection, size):
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError("the other side has closed the connection")
        data += piece
    return data


def message(chain, number):
    return struct.pack(">I", number) + chain + chain * (number % 200)


class Line:
    def __init__(self, connection, client):
        self.connection, self.chain = connection, hashlib.sha256(b"client %d" % client).digest()

    def send(self, number):
        self.chain = hashlib.sha256(self.chain + b"%d" % number).digest()
        self.connection.sendall(message(self.chain, number))

    def receive(self, number, begin=b""):
        self.chain = hashlib.sha256(self.chain + b"%d" % number).digest()
        expected = message(self.chain, number)
        got = begin + exactly(self.connection, len(expected) - len(begin))
        if got != expected:
            raise ValueError(f"message {number} is not what was sent")


def serve(connection, digests):
    client = struct.unpack(">I", exactly(connection, 4))[0]
    line = Line(connection, client)
    for number in itertools.count(1):
        if (begin := exactly(connection, len(END))) == END:
            break
        line.receive(number, begin)
        line.send(-number & 0xFFFF)
        connection.sendall(b"e" if asked_to_end() else b"+")
    digests[client] = line.chain.hex()


def server():
    digests, threads = {}, []
    with socket.create_server(("", PORT)) as listener:
        for _ in range(TASKS - 1):
            threads.append(threading.Thread(target=serve, args=(listener.accept()[0], digests)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    for client in range(1, TASKS):
        print("client", client, digests[client], flush=True)


def connect():
    while True:
        try:
            return socket.create_connection((HOST, PORT))
        except OSError:
            time.sleep(0.02)


def client():
    connection = connect()
    connection.sendall(struct.pack(">I", TASK))
    line = Line(connection, TASK)
    for number in steps():
        line.send(number)
        line.receive(-number & 0xFFFF)
        last = exactly(connection, 1) == b"e"
        print("step", number, line.chain.hex()[:16], flush=True)
        if last:
            break
        time.sleep(PACE)
    connection.sendall(END)


server() if TASK == 0 else client()
