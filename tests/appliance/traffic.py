"""A client that never gives up: opens connections to the service until it made enough of them, or until standard input ends.

Arguments: one JSON object: targets [[address, port]...], marker, count (0: until told), workers, timeout (seconds).
Each connection sends one request whose path holds the marker, and must get the whole answer with the path in it.
A line after every 50 connections, the sums as JSON at the end.
"""
import errno
import json
import socket
import sys
import threading
import time

options = json.loads(sys.argv[1])
targets, marker, count = options["targets"], options["marker"], options["count"]
lock = threading.Lock()
begun = 0
sums = {}
first = {}
stop = threading.Event()
started = time.monotonic()


def one(number):
    host, port = targets[number % len(targets)]
    path = "/%s-%d" % (marker, number)
    request = "GET %s HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n" % path
    try:
        conn = socket.create_connection((host, port), options["timeout"])
    except TimeoutError:
        return "connect-timeout"
    except OSError as error:
        return "connect-" + errno.errorcode.get(error.errno, str(error))
    answer = b""
    with conn:
        try:
            conn.sendall(request.encode())
            while True:
                part = conn.recv(65536)
                if not part:
                    break
                answer += part
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return errno.errorcode.get(error.errno, str(error))
    return "served" if answer.startswith(b"HTTP/1.1 200") and path.encode() in answer else "cut"


def work():
    global begun
    while not stop.is_set():
        with lock:
            if count and begun >= count:
                return
            number = begun
            begun += 1
        outcome = one(number)
        with lock:
            sums[outcome] = sums.get(outcome, 0) + 1
            first.setdefault(outcome, "#%d after %.2f s" % (number, time.monotonic() - started))
            done = sum(sums.values())
            if done % 50 == 0:
                print(json.dumps({"done": done, "sums": sums}), flush=True)
        if outcome != "served":
            # A refusal is quick; do not spend the machine on counting them.
            stop.wait(0.02)


def wait_for_end():
    sys.stdin.read()
    stop.set()


threading.Thread(target=wait_for_end, daemon=True).start()
workers = [threading.Thread(target=work) for _ in range(options["workers"])]
for worker in workers:
    worker.start()
print(json.dumps({"done": 0, "sums": {}}), flush=True)
for worker in workers:
    worker.join()
print(json.dumps({"total": sum(sums.values()), "sums": sums, "first": first}), flush=True)
