//! A host with a service behind an egress, and the ingress that is killed.

use std::time::Duration;

use serde_json::json;

use super::lab::{Lab, PORT, TO_SERVER, egress, ingress};
use super::netns::{Connect, Host, Tng, traces, wait_for};
use super::table::{Fate, Seen};

/// A second service, which a reload adds to the capture.
pub const OTHER_PORT: u16 = 9090;

/// The scene: everything but the ingress.
pub fn lab() -> Lab {
    if !cfg!(feature = "failpoints") {
        panic!("run with --features failpoints (make test does)");
    }
    Lab::new()
}

/// The service's egress, for both ports.
pub fn start_egress(lab: &Lab) -> Tng<'_> {
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), OTHER_PORT, json!({}));
    }
    let both = egress("").replace("{ port = 8080 }", "{ port = 8080 }, { port = 9090 }");
    Tng::start(&lab.world.server, "out", &both)
}

/// The ingress for the first port.
pub fn narrow() -> String {
    ingress(TO_SERVER)
}

/// The ingress for both ports.
pub fn wide() -> String {
    ingress(&format!("{TO_SERVER}, {}", TO_SERVER.replace("8080", "9090")))
}

/// Starts the ingress with a failpoint set.
pub fn spawn<'a>(lab: &'a Lab, point: &str, action: &str) -> Tng<'a> {
    Tng::spawn_with(&lab.world.client, "in", &narrow(), &[], &[("TNG_FAILPOINT", &format!("{point}={action}"))])
}

/// The failpoint for a command that the test runs itself.
pub fn fail(point: &str, action: &str) -> (&'static str, String) {
    ("TNG_FAILPOINT", format!("{point}={action}"))
}

/// New connections to the service, IPv4 and IPv6.
pub fn exchange(lab: &Lab, port: u16) -> [Seen; 2] {
    lab.each(|family| lab.exchange(family, &Connect { port, ..Connect::default() }))
}

/// Served, and nothing of it readable on the wire.
pub fn tunnelled(seen: &[Seen]) -> bool {
    seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none())
}

/// Not served, and nothing of it on the wire.
pub fn closed(seen: &[Seen]) -> bool {
    seen.iter().all(|s| s.fate != Fate::Delivered && s.plaintext.is_none())
}

/// Served in plaintext: the direct path, as without tng.
pub fn direct(seen: &[Seen]) -> bool {
    seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_some())
}

/// Whether the capture table is there.
pub fn has_table(host: &Host) -> bool {
    host.run("nft", &["list", "tables"]).stdout.lines().any(|l| l == "table inet tng_in")
}

/// The guard table belongs to its process and goes with it, a moment after.
pub fn wait_guard_gone(host: &Host) {
    wait_for("the dead guard's table goes", Duration::from_secs(5), || {
        !host.run("nft", &["list", "tables"]).stdout.contains("tngguard_in")
    });
}

/// The next start of the name works from end to end, and its clean stop leaves nothing.
pub fn recovers(lab: &Lab, after: &str) {
    let next = Tng::start(&lab.world.client, "in", &narrow());
    let seen = exchange(lab, PORT);
    assert!(tunnelled(&seen), "the start after {after}: {seen:?}\n{}", next.output());
    stops_clean(lab, next, after);
}

/// A clean stop leaves nothing.
pub fn stops_clean(lab: &Lab, tng: Tng<'_>, after: &str) {
    let status = tng.stop();
    assert!(status.success(), "clean stop after {after}: {status}");
    assert_eq!(traces(&lab.world.client), "", "left by the clean stop after {after}");
}
