"""Gets sockets from the service manager's stand-in, puts them where the protocol prescribes, becomes the program.

Arguments: the stand-in's unix socket, then the program and its arguments.
"""

import fcntl
import os
import socket
import sys

FIRST = 3

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as manager:
    manager.connect(sys.argv[1])
    names, fds, _, _ = socket.recv_fds(manager, 65536, 253)
# Out of the way of the numbers that the protocol prescribes.
kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]
for fd in fds:
    os.close(fd)
for i, fd in enumerate(kept):
    os.dup2(fd, FIRST + i, inheritable=True)
    os.close(fd)
os.environ["LISTEN_FDS"] = str(len(kept))
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDNAMES"] = names.decode().rstrip("\n")
os.execv(sys.argv[2], sys.argv[2:])
