"""Application programs of the network tests: servers and clients that do what they are told.

One JSON command a line on standard input, one JSON answer a line on standard output, matched by
"id". A command that fails at the socket answers {"err": "ECONNREFUSED"} and the like; anything
else that goes wrong answers {"bug": ...} and fails the test.

A server answers each request TNGQ<hex> with TNGA<hex> and the client's address as it saw it.
"""

import errno
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback

REQUEST = re.compile(rb"TNGQ([0-9a-f]{16})")
IPPROTO_MPTCP = 262
IPPROTO_SCTP = 132
IPV6_TRANSPARENT = 75
IP_TRANSPARENT = 19
IP_NODEFRAG = 22
ETH = {4: 0x0800, 6: 0x86DD}

lock = threading.Lock()
handles = {}
received = []
out = sys.stdout


def keep(thing):
    with lock:
        handle = len(handles) + 1
        handles[handle] = thing
        return handle


class Conn:
    """A connected socket whose input a thread collects."""

    def __init__(self, sock, on_data=None):
        self.sock = sock
        self.cond = threading.Condition()
        self.data = b""
        self.end = None
        self.on_data = on_data
        sock.settimeout(None)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        end = "EOF"
        try:
            while chunk := self.sock.recv(65536):
                with self.cond:
                    self.data += chunk
                    self.cond.notify_all()
                if self.on_data:
                    self.on_data(self)
        except OSError as e:
            end = name(e)
        with self.cond:
            self.end = end
            self.cond.notify_all()

    def wait(self, token, timeout):
        with self.cond:
            self.cond.wait_for(lambda: token in self.data or self.end, timeout)
            if token in self.data:
                return {"data": self.data[-4096:].decode("latin-1"), "len": len(self.data)}
            return {"err": self.end or "timeout", "len": len(self.data)}


class Listener:
    """A server; `mode` is "answer" (each request at once) or "hold" (requests are only noted)."""

    def __init__(self, sock, mode, wait_eof):
        self.sock = sock
        self.mode = mode
        self.wait_eof = wait_eof
        self.conns = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                sock, peer = self.sock.accept()
            except OSError:
                return
            conn = Conn.__new__(Conn)
            conn.peer = peer
            conn.seen = set()
            conn.local = sock.getsockname()
            with lock:
                self.conns.append(conn)
            conn.__init__(sock, self.note)

    def note(self, conn):
        for hexa in REQUEST.findall(conn.data):
            if hexa in conn.seen:
                continue
            conn.seen.add(hexa)
            with lock:
                received.append({
                    "hex": hexa.decode(), "peer": conn.peer[0], "port": conn.peer[1], "local": conn.local[0],
                    "local_port": conn.local[1],
                })
            if self.mode == "answer":
                try:
                    conn.sock.sendall(b"TNGA" + hexa + b" " + conn.peer[0].encode() + b"\n")
                except OSError:
                    pass


def name(e):
    if isinstance(e, (TimeoutError, socket.timeout)):
        return "timeout"
    return errno.errorcode.get(e.errno, str(e))


def family(addr):
    return socket.AF_INET6 if ":" in addr else socket.AF_INET


def scoped(addr, port, c):
    if ":" in addr:
        dev = c.get("scope")
        return (addr, port, 0, socket.if_nametoindex(dev) if dev else 0)
    return (addr, port)


def options(sock, c):
    if c.get("reuse", True):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if c.get("mark") is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, c["mark"])
    if c.get("device"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, c["device"].encode())
    if c.get("dontroute"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
    if c.get("transparent"):
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)


def tcp(c):
    proto = IPPROTO_MPTCP if c.get("mptcp") else IPPROTO_SCTP if c.get("sctp") else 0
    return socket.socket(family(c["addr"]), socket.SOCK_STREAM, proto)


def do_listen(c):
    sock = tcp(c)
    options(sock, c)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if c.get("tfo"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    sock.bind(scoped(c["addr"], c["port"], c))
    sock.listen(c.get("backlog", 64))
    if c.get("accept", True):
        return {"h": keep(Listener(sock, c.get("mode", "answer"), False)), "port": sock.getsockname()[1]}
    return {"h": keep(sock), "port": sock.getsockname()[1]}


def do_listen_udp(c):
    sock = socket.socket(family(c["addr"]), socket.SOCK_DGRAM)
    options(sock, c)
    sock.bind(scoped(c["addr"], c["port"], c))

    def serve():
        while True:
            data, peer = sock.recvfrom(65536)
            for hexa in REQUEST.findall(data):
                with lock:
                    received.append({"hex": hexa.decode(), "peer": peer[0], "port": peer[1], "local": "", "local_port": 0})
                sock.sendto(b"TNGA" + hexa, peer)

    threading.Thread(target=serve, daemon=True).start()
    return {"h": keep(sock)}


def do_connect(c):
    sock = tcp(c)
    options(sock, c)
    if c.get("from_addr") or c.get("from_port"):
        any_addr = "::" if sock.family == socket.AF_INET6 else "0.0.0.0"
        sock.bind(scoped(c.get("from_addr") or any_addr, c.get("from_port", 0), c))
    sock.settimeout(c.get("timeout", 1.0))
    target = scoped(c["addr"], c["port"], c)
    if c.get("tfo"):
        # A data-in-SYN client needs a cookie or TFO_CLIENT_NO_COOKIE (tcp_fastopen bit 0x4).
        # Without an answer to the SYN the handshake goes on while the caller waits for data.
        sock.sendto(c["tfo"].encode(), socket.MSG_FASTOPEN, target)
    else:
        sock.connect(target)
    return {"h": keep(Conn(sock)), "local": sock.getsockname()[:2]}


def do_send(c):
    conn = handles[c["h"]]
    data = c.get("data", "").encode() or b"x" * c["size"]
    if c.get("size") and c.get("data"):
        data = data + b"." * c["size"] + data
    conn.sock.sendall(data)
    if c.get("close"):
        conn.sock.close()
    return {}


def do_recv(c):
    return handles[c["h"]].wait(c["token"].encode(), c.get("timeout", 1.0))


def do_push(c):
    """Sends data over the accepted connection that once carried the request `hex`."""
    with lock:
        listeners = [thing for thing in handles.values() if isinstance(thing, Listener)]
        conns = [conn for thing in listeners for conn in thing.conns if c["hex"].encode() in conn.seen]
    sent = 0
    for conn in conns:
        try:
            conn.sock.sendall(c["data"].encode())
            sent += 1
        except OSError:
            pass
    return {"sent": sent, "conns": len(conns)}


def do_accepted(c):
    with lock:
        return {"n": len(handles[c["h"]].conns), "open": sum(1 for k in handles[c["h"]].conns if not getattr(k, "end", None))}


def do_received(c):
    with lock:
        return {"all": list(received)}


def do_shutdown(c):
    handles[c["h"]].sock.shutdown(socket.SHUT_WR)
    return {}


def do_close(c):
    thing = handles[c["h"]]
    sock = thing if isinstance(thing, socket.socket) else thing.sock
    if c.get("rst"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
    if isinstance(thing, Listener):
        with lock:
            for conn in thing.conns:
                conn.sock.close()
    return {}


def do_udp(c):
    sock = socket.socket(family(c["addr"]), socket.SOCK_DGRAM)
    options(sock, c)
    sock.settimeout(c.get("timeout", 1.0))
    sock.connect(scoped(c["addr"], c["port"], c))
    sock.send(c["data"].encode())
    return {"data": sock.recv(65536).decode("latin-1")}


def do_relay(c):
    """Carries every connection's bytes to another address, as they are."""
    sock = tcp(c)
    options(sock, {})
    sock.bind((c["addr"], c["port"]))
    sock.listen(16)

    def pump(source, sink):
        try:
            while chunk := source.recv(65536):
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()

    def serve():
        while True:
            near, _ = sock.accept()
            far = socket.socket(family(c["to"]), socket.SOCK_STREAM)
            try:
                far.connect(scoped(c["to"], c["to_port"], c))
            except OSError:
                near.close()
                continue
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return {}


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(c, data):
    """A TCP segment with a right checksum."""
    src, dst = (socket.inet_pton(family(a), a) for a in (c["src"], c["dst"]))
    fields = (c["sport"], c["dport"], c.get("seq", 1), c.get("ack", 1), 5 << 4, c.get("flags", 0x18), 65535, 0, 0)
    head = struct.pack("!HHIIBBHHH", *fields)
    length = len(head) + len(data)
    pseudo = src + dst + (struct.pack("!BBH", 0, 6, length) if len(src) == 4 else struct.pack("!II", length, 6))
    check = checksum(pseudo + head + data)
    return head[:16] + struct.pack("!H", check) + head[18:] + data


def ipv4_header(c, length, ident=0, offset=0, more=False):
    frag = (offset // 8) | (0x2000 if more else 0)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, ident, frag, 64, 6, 0, socket.inet_aton(c["src"]),
                       socket.inet_aton(c["dst"]))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]


def ipv6_header(c, length, next_header=6):
    return struct.pack("!IHBB", 6 << 28, length, next_header, 64) + socket.inet_pton(
        socket.AF_INET6, c["src"]) + socket.inet_pton(socket.AF_INET6, c["dst"])


def datagrams(c):
    """The IP packets of one segment: whole, or in fragments of `frag` bytes."""
    payload = segment(c, c.get("data", "").encode())
    v6 = ":" in c["dst"]
    size = c.get("frag")
    if not size:
        return [(ipv6_header(c, len(payload)) if v6 else ipv4_header(c, len(payload))) + payload]
    packets = []
    ident = int.from_bytes(os.urandom(2), "big") | 1
    for at in range(0, len(payload), size):
        part = payload[at:at + size]
        more = at + size < len(payload)
        if v6:
            extension = struct.pack("!BBHI", 6, 0, at | more, ident)
            packets.append(ipv6_header(c, 8 + len(part), 44) + extension + part)
        else:
            packets.append(ipv4_header(c, len(part), ident, at, more) + part)
    return packets


def do_raw(c):
    """Sends a TCP segment past TCP: through a raw IP socket, or on the device itself."""
    v6 = ":" in c["dst"]
    if c.get("packet"):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
        mac = bytes.fromhex(c["mac"].replace(":", ""))
        for packet in datagrams(c):
            sock.sendto(packet, (c["device"], ETH[6 if v6 else 4], 0, 0, mac))
        return {}
    if v6:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if c.get("nodefrag"):
            sock.setsockopt(socket.SOL_IP, IP_NODEFRAG, 1)
    if c.get("mark") is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, c["mark"])
    for packet in datagrams(c):
        sock.sendto(packet, scoped(c["dst"], 0, c))
    return {}


def do_caps(c):
    """Whether this process may set a mark or the transparent option, asked of the kernel."""
    answer = {}
    for what, level, option, value in (("mark", socket.SOL_SOCKET, socket.SO_MARK, c["mark"]),
                                       ("transparent", socket.SOL_IP, IP_TRANSPARENT, 1)):
        sock = socket.socket()
        try:
            sock.setsockopt(level, option, value)
            answer[what] = "ok"
        except OSError as e:
            answer[what] = name(e)
    return answer


def answer_to(command):
    try:
        answer = globals()["do_" + command["do"]](command)
    except OSError as e:
        answer = {"err": name(e)}
    except Exception:
        answer = {"bug": traceback.format_exc()}
    answer["id"] = command["id"]
    with lock:
        out.write(json.dumps(answer) + "\n")
        out.flush()


def main():
    out.write('{"id":0}\n')
    out.flush()
    for line in sys.stdin:
        threading.Thread(target=answer_to, args=(json.loads(line),), daemon=True).start()
    os._exit(0)


main()
