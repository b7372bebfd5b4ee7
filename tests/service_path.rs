//! The daemon's own way to the attestation service, past the captures of its own host.

mod fakes;
mod netns;

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fakes::as_rest::{FakeAs, Mode};
use netns::{Connect, Family, Host, Tng, World, fresh_hex};
use serde_json::json;

/// Port of the service that applications use.
const PORT: u16 = 8080;
/// Port of the attestation service.
const AS_PORT: u16 = 8090;

/// An attestation service on `host`, IPv4 and IPv6; it ends with the sender.
fn attestation_service(host: &Host) -> tokio::sync::oneshot::Sender<()> {
    let (end, ended) = tokio::sync::oneshot::channel();
    let (ready, is_ready) = mpsc::channel();
    let namespace = std::fs::File::open(format!("/run/netns/{}", host.netns())).expect("namespace");
    let listen = Family::BOTH.map(|family| SocketAddr::new(host.addr(family), AS_PORT).to_string());
    thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns needs root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut services = Vec::new();
            for addr in &listen {
                services.push(FakeAs::start(addr, Mode::Status("affirming")).await);
            }
            ready.send(()).expect("the test waits");
            let _ = ended.await;
        });
    });
    is_ready.recv_timeout(Duration::from_secs(10)).expect("the service starts");
    end
}

#[test]
fn a_capture_that_holds_the_attestation_service_does_not_hold_the_daemons_requests_to_it() {
    let world = World::new();
    let (client, server) = (world.client.app(), world.server.app());
    for any in ["0.0.0.0", "::"] {
        server.listen(any.parse().expect("address"), PORT, json!({}));
    }
    let _service = attestation_service(&world.server);
    let anchors = fakes::fixture("as-ca.pem");
    for family in Family::BOTH {
        let addr = world.server.addr(family);
        let to = if addr.is_ipv4() { "203.0.113.0/24" } else { "2001:db8:2::/64" };
        let url = format!("http://{}/", SocketAddr::new(addr, AS_PORT));
        let egress = format!(
            "drain_timeout = \"1s\"\n[[egress]]\nname = \"out\"\n[egress.netfilter]\ncapture = [{{ port = {PORT} }}]\n\
             [egress.attest]\nprovider = \"sample\"\n"
        );
        let ingress = format!(
            "drain_timeout = \"1s\"\n[[ingress]]\nname = \"in\"\n[ingress.netfilter]\ncapture = [{{ to = \"{to}\", port = \"8000-8100\" }}]\n\
             [ingress.verify]\nas_addr = \"{url}\"\nas_insecure = true\nallow_sample = true\n\
             trusted_certs = [\"{}\"]\n",
            anchors.display()
        );
        let egress = Tng::start(&world.server, "out", &egress);
        let ingress = Tng::start(&world.client, "in", &ingress);

        let hex = fresh_hex();
        let conn = client.connect(&addr.to_string(), &Connect { port: PORT, ..Connect::default() }).expect("connect");
        client.send(conn, &format!("TNGQ{hex}\n")).expect("send");
        let answer = client.recv(conn, &format!("TNGA{hex}"), Duration::from_secs(5));
        assert!(answer.is_ok(), "{family:?}: {answer:?}\n{}", ingress.output());
        assert!(!world.saw(&format!("TNGQ{hex}")), "{family:?}: it went through the tunnel");
        let status = ingress.get("/status").expect("status");
        assert!(status.contains(r#""verifier":"as""#), "{family:?}: {status}");

        // The capture does hold that address for everybody else: no egress answers there, so no connection stands.
        let other = client.connect(&addr.to_string(), &Connect { port: AS_PORT, ..Connect::default() });
        let passed = other.is_ok_and(|conn| {
            client.send(conn, "GET /.well-known/jwks.json HTTP/1.1\r\n\r\n").is_ok()
                && client.recv(conn, "\"keys\"", Duration::from_secs(2)).is_ok()
        });
        assert!(!passed, "{family:?}: an application went past the capture");
        client.close(conn);
        assert!(ingress.stop().success() && egress.stop().success());
    }
}
