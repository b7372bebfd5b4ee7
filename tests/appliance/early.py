"""Sends to the service from before there is a network, and never stops; what became of it in /run/early-sender.json.

Plaintext in three shapes: a request over TCP, data in the SYN (TCP fast open), and a UDP datagram; IPv4 and IPv6.
"""
import errno
import json
import socket
import time

MARKER = open("/etc/early-marker").read().strip()
REQUEST = ("GET /%s HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n" % MARKER).encode()
TARGETS = [(socket.AF_INET, "192.0.2.2"), (socket.AF_INET6, "2001:db8::2")]
PORT = 8080
NO_NETWORK = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH, errno.ENETDOWN)
sums = {"tries": 0, "before_network": 0, "refused": 0, "served": 0}
written = 0


def tcp(family, addr, fast):
    with socket.socket(family, socket.SOCK_STREAM) as conn:
        conn.settimeout(0.25)
        if fast:
            conn.sendto(REQUEST, socket.MSG_FASTOPEN, (addr, PORT))
        else:
            conn.connect((addr, PORT))
            conn.sendall(REQUEST)
        conn.settimeout(2)
        return b"uri=" in conn.recv(4096)


def udp(family, addr):
    with socket.socket(family, socket.SOCK_DGRAM) as conn:
        conn.sendto(REQUEST, (addr, PORT))
    return False


while True:
    for family, addr in TARGETS:
        for attempt in (lambda: tcp(family, addr, False), lambda: tcp(family, addr, True), lambda: udp(family, addr)):
            sums["tries"] += 1
            try:
                sums["served"] += attempt()
            except OSError as error:
                sums["before_network" if error.errno in NO_NETWORK else "refused"] += 1
    if time.monotonic() - written > 0.2:
        written = time.monotonic()
        # /run is a tmpfs from before the first unit.
        with open("/run/early-sender.json", "w") as out:
            json.dump(sums, out)
    time.sleep(0.005)
