"""What systemd does for a service with FileDescriptorStoreMax=: starts it, hears its notes, keeps its descriptors.

Arguments: path of the notification socket, then the program and its arguments. Orders come by standard input
(`start [NAME=VALUE ...]`, `drop`), and what happens goes out by standard output, a line each.
"""

import array
import fcntl
import os
import select
import socket
import sys

notify_path, program = sys.argv[1], sys.argv[2:]
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
# A leading @ names an abstract socket (sd_notify(3)).
notify.bind("\0" + notify_path[1:] if notify_path.startswith("@") else notify_path)
store = []  # (name, descriptor)
running = None


def say(text):
    print(text, flush=True)


def start(env):
    # Out of the way of the numbers that the protocol prescribes.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50) for _, fd in store]
    pid = os.fork()
    if pid == 0:
        for i, fd in enumerate(high):
            os.dup2(fd, 3 + i, inheritable=True)
        os.environ.update(env, NOTIFY_SOCKET=notify_path)
        if store:
            names = ":".join(name for name, _ in store)
            os.environ.update(LISTEN_FDS=str(len(store)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=names)
        os.execv(program[0], program)
    for fd in high:
        os.close(fd)
    say(f"pid {pid}")
    return os.pidfd_open(pid), pid


def remove(name):
    for kept, fd in [entry for entry in store if name in (None, entry[0])]:
        store.remove((kept, fd))
        os.close(fd)


def heard():
    fds = array.array("i")
    text, ancillary, _, _ = notify.recvmsg(8192, socket.CMSG_LEN(16 * fds.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    lines = text.decode().splitlines()
    name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
    for fd in fds:
        os.set_inheritable(fd, False)
    if "FDSTORE=1" in lines:
        store.extend((name, fd) for fd in fds)
    if "FDSTOREREMOVE=1" in lines:
        remove(name)
    for line in lines:
        say(f"note {line}")
    say("store " + " ".join(name for name, _ in store))


while True:
    ready, _, _ = select.select([sys.stdin, notify] + ([running[0]] if running else []), [], [])
    if notify in ready:
        heard()
    elif running and running[0] in ready:
        _, status = os.waitpid(running[1], 0)
        os.close(running[0])
        running = None
        say(f"exit {os.waitstatus_to_exitcode(status)}")
    elif sys.stdin in ready:
        order = sys.stdin.buffer.raw.readline().decode().split()
        if not order:
            break
        if order[0] == "start":
            running = start(dict(word.split("=", 1) for word in order[1:]))
        elif order[0] == "drop":
            remove(None)
            say("store ")
