"""What a program in the data plane's sandbox can do: each attempt with DONE or the error's name, as one line of JSON."""
import ctypes
import errno
import json
import mmap
import os
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)
INIT_MODULE = {"x86_64": 175, "aarch64": 105}[os.uname().machine]
CLONE_NEWUSER = 0x10000000


def call(function, *args):
    if function(*args) == -1:
        raise OSError(ctypes.get_errno(), "failed")


def write(directory):
    path = directory + "/written-by-the-probe"
    with open(path, "w"):
        pass
    os.unlink(path)


ATTEMPTS = {
    "read /etc/shadow": lambda: open("/etc/shadow").read(),
    "read /var/lib/tng": lambda: os.listdir("/var/lib/tng"),
    "read its configuration": lambda: open("/etc/tng/%s.toml" % sys.argv[1]).read(),
    "write /etc/tng": lambda: write("/etc/tng"),
    "write /usr": lambda: write("/usr"),
    "write /run/tng": lambda: write("/run/tng"),
    "write /var/lib/tng": lambda: write("/var/lib/tng"),
    "load a module": lambda: call(libc.syscall, INIT_MODULE, b"", 0, b""),
    "memory write and execute": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "new user namespace": lambda: call(libc.unshare, CLONE_NEWUSER),
    "mount": lambda: call(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
    "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "set uid 0": lambda: os.setuid(0),
    "TCP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
}

outcomes = {}
for what, attempt in ATTEMPTS.items():
    try:
        attempt()
        outcomes[what] = "DONE"
    except OSError as error:
        outcomes[what] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(outcomes))
