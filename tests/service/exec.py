"""Opens listeners as a socket unit does, tells the program of them, and becomes the program.

Arguments: the addresses, comma-separated (ADDR@PORT), then the program and its arguments.
"""

import fcntl
import os
import socket
import sys

IPV6_TRANSPARENT = 75
IP_TRANSPARENT = 19
FIRST = 3

kept = []
for place in sys.argv[1].split(","):
    addr, port = place.split("@")
    v6 = ":" in addr
    sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    sock.bind((addr, int(port)))
    sock.listen(64)
    # Out of the way of the numbers that the protocol prescribes.
    kept.append(fcntl.fcntl(sock.detach(), fcntl.F_DUPFD, 50))
for i, fd in enumerate(kept):
    os.dup2(fd, FIRST + i, inheritable=True)
    os.close(fd)
os.environ["LISTEN_FDS"] = str(len(kept))
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDNAMES"] = ":".join("tng" for _ in kept)
os.execv(sys.argv[2], sys.argv[2:])
