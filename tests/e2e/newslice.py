"""Removes a slice, makes it anew, becomes its member and asks a web server until it is refused.

Says "many" after that many plain answers, and at the end one line of JSON: milliseconds from the making of the slice to
the last plain answer, whether a connection of the first moment was cut, and how many of the later requests were plain.
"""

import itertools
import json
import os
import socket
import sys
import time

slice_, addr, path, many, port_from = sys.argv[1:6]
host, port = addr.rsplit(":", 1)
host = host.strip("[]")
# Ports that no round before used: a tuple of a captured connection is known for captured for a while.
ports = itertools.count(int(port_from))
request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def join(directory):
    with open(f"{directory}/cgroup.procs", "w") as f:
        f.write(str(os.getpid()))


def ask(conn):
    try:
        conn.sendall(request)
        return conn.recv(4096).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def fresh():
    try:
        return socket.create_connection((host, int(port)), timeout=2, source_address=("", next(ports)))
    except OSError:
        return None


def plain():
    conn = fresh()
    if conn is None:
        return False
    with conn:
        return ask(conn)


directory = f"/sys/fs/cgroup/{slice_}"
if os.path.exists(directory):
    os.rmdir(directory)
began = time.monotonic()
os.mkdir(directory)
join(directory)
held = fresh()
held_was = held is not None and ask(held)
last, count, refused = began, 0, 0
# One refusal is not the end: a source port may be taken.
while refused < 10:
    if not plain():
        refused += 1
        continue
    last, refused = time.monotonic(), 0
    count += 1
    if count == int(many):
        print("many", flush=True)
after = sum(plain() for _ in range(20))
if not held_was:
    fate = "never"
elif ask(held):
    fate = "goes on"
else:
    fate = "cut"
join("/sys/fs/cgroup")
print(json.dumps({"ms": (last - began) * 1000, "plain": count, "held": fate, "after": after}), flush=True)
