//! Streams that end one direction before the other.

use std::time::Duration;

use super::netns::{Family, Tng, World, wait_for};
use super::programs::*;

/// Reads to the end of each connection, then answers with what it read: a service that only works
/// when a half-close arrives as one.
const ANSWERS_AT_THE_END: &str = r#"
import hashlib, socket, sys, threading
def serve(conn):
    digest, n = hashlib.sha256(), 0
    while data := conn.recv(1 << 16):
        digest.update(data); n += len(data)
    conn.sendall(f"{n} {digest.hexdigest()}\n".encode()); conn.close()
def listen(sock):
    while True:
        threading.Thread(target=serve, args=(sock.accept()[0],), daemon=True).start()
for addr in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in addr else socket.AF_INET
    sock = socket.create_server((addr, 8080), family=family)
    thread = threading.Thread(target=listen, args=(sock,)); thread.start()
print("ready", flush=True)
"#;

/// Sends 8 MB, ends its own direction, and reads the answer to the end, as `nc -N` does.
const SENDS_AND_ENDS: &str = r#"
import hashlib, os, socket, sys
data = os.urandom(8 << 20)
sock = socket.create_connection((sys.argv[1], 8080), timeout=20)
sock.sendall(data); sock.shutdown(socket.SHUT_WR)
answer = b""
while part := sock.recv(1 << 16):
    answer += part
assert answer.decode() == f"{len(data)} {hashlib.sha256(data).hexdigest()}\n", answer
"#;

/// Speaks first, ends its direction at once, and prints what it then receives.
const ENDS_FIRST: &str = r#"
import hashlib, socket, sys
sock = socket.create_server((sys.argv[1], 8080), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("ready", flush=True)
conn = sock.accept()[0]
conn.sendall(b"all I have to say\n"); conn.shutdown(socket.SHUT_WR)
digest, n = hashlib.sha256(), 0
while data := conn.recv(1 << 16):
    digest.update(data); n += len(data)
print(n, digest.hexdigest(), flush=True)
"#;

/// Reads to the end first, then sends.
const READS_THEN_SENDS: &str = r#"
import hashlib, os, socket, sys
data = os.urandom(2 << 20)
sock = socket.create_connection((sys.argv[1], 8080), timeout=20)
said = b""
while part := sock.recv(1 << 16):
    said += part
assert said == b"all I have to say\n", said
sock.sendall(data); sock.close()
print(len(data), hashlib.sha256(data).hexdigest())
"#;

#[test]
fn a_half_close_of_either_side_leaves_the_other_direction_open() {
    let world = World::new();
    let _out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    let addrs = Family::BOTH.map(|family| world.server.addr(family).to_string());
    let service = python(&world.server, ANSWERS_AT_THE_END, &[&addrs[0], &addrs[1]]);
    for addr in &addrs {
        world.client.run("/usr/bin/python3", &["-I", "-c", SENDS_AND_ENDS, addr]).expect_ok();
    }
    drop(service);
    for addr in &addrs {
        let service = python(&world.server, ENDS_FIRST, &[addr]);
        let sent = world.client.run("/usr/bin/python3", &["-I", "-c", READS_THEN_SENDS, addr]).expect_ok();
        wait_for("the service received what was sent after its own end", Duration::from_secs(10), || {
            service.output().contains(&sent)
        });
    }
    wait_for("no connection is left", Duration::from_secs(10), || {
        client.ctl(&["status"]).expect_ok().contains("0 open, 4 in all, 0 refused")
    });
}
