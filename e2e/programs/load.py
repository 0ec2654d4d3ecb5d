"""load.py STEPS PACE_MS [SERVER [ARG...]]: load for a redis-server that it starts itself, over its own RESP client.

Each step changes strings, counters, lists and hashes through one connection with pipelining, while a second connection
waits in a blocking pop; what is read back is printed. The end is a digest of every key and value.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time

from steps import steps


class Client:
    """Speaks RESP, the protocol of redis, over one connection."""

    def __init__(self, port, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port))
        self.input = self.socket.makefile("rb")

    def send(self, *commands):
        data = b""
        for command in commands:
            parts = [part if isinstance(part, bytes) else str(part).encode() for part in command]
            data += b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self.socket.sendall(data)

    def answer(self):
        line = self.input.readline()
        if not line:
            raise EOFError("the server has closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.input.read(int(rest) + 2)[:-2]
        return None if rest == b"-1" else [self.answer() for _ in range(int(rest))]

    def ask(self, *commands):
        self.send(*commands)
        return [self.answer() for _ in commands]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start():
    port = free_port()
    command = sys.argv[3:] or ["redis-server"]
    server = subprocess.Popen([*command, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    while True:
        try:
            return server, port, Client(port)
        except ConnectionRefusedError:
            if server.poll() is not None:
                sys.exit(f"{command[0]} has ended with status {server.returncode}")
            time.sleep(0.01)


def value(kind, client, key):
    reads = {b"string": ("GET", key), b"list": ("LRANGE", key, 0, -1), b"hash": ("HGETALL", key)}
    return client.ask(reads[kind])[0]


def digest(client):
    total = hashlib.sha256()
    for key in sorted(client.ask(("KEYS", "*"))[0]):
        kind = client.ask(("TYPE", key))[0]
        total.update(repr((key, value(kind, client, key))).encode())
    return total.hexdigest()


def drive(client, waiting, pace):
    for step in steps():
        text = hashlib.sha256(b"%d" % step).hexdigest()
        waiting.send(("BRPOP", "queue", 0))
        commands = [("SET", f"key:{step}:{i}", text * (i + 1)) for i in range(20)]
        commands += [("INCRBY", "counter", step), ("RPUSH", f"list:{step % 10}", text[:8]), ("HSET", f"hash:{step % 7}", text[:6], step)]
        commands += [("GET", "counter"), ("LLEN", f"list:{step % 10}"), ("GET", f"key:{(step + 1) // 2}:3"), ("LPUSH", "queue", text)]
        answers = client.ask(*commands)
        popped = waiting.answer()
        print("step", step, answers[23].decode(), answers[24], answers[25].decode()[:16], popped[1].decode()[:16], client.ask(("DBSIZE",))[0], flush=True)
        time.sleep(pace)
    print("end", digest(client), flush=True)
    client.send(("SHUTDOWN", "NOSAVE"))


def main():
    server, port, client = start()
    drive(client, Client(port), float(sys.argv[2]) / 1000)
    print("server", server.wait(), flush=True)


if __name__ == "__main__":
    main()
