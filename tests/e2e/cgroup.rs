//! Capture by cgroup: only what runs in a slice is taken.
//!
//! A host may have cgroup v2 elsewhere than at /sys/fs/cgroup (the hybrid layout). Everything here
//! runs in private mount namespaces that have it there; the slice is the test's own.

use std::process::Command;
use std::time::Duration;

use super::netns::{Family, Tng, World, fresh_hex, wait_for, wait_until};
use super::programs::*;

/// Runs the command that follows with cgroup v2 at /sys/fs/cgroup.
const UNIFIED: [&str; 5] = ["unshare", "-m", "sh", "-c", "mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\""];
/// The same as a member of the slice named by the first word.
const MEMBER: [&str; 5] = [
    "unshare",
    "-m",
    "sh",
    "-c",
    "mount -t cgroup2 none /sys/fs/cgroup && echo $$ >/sys/fs/cgroup/$0/cgroup.procs && exec \"$@\"",
];

/// A slice of the test's own, removed with it.
struct Slice(String);

impl Slice {
    fn make() -> Self {
        let name = format!("tngtest{}.slice", fresh_hex());
        assert!(at_the_root(&format!("mkdir /sys/fs/cgroup/{name}")), "cgroup v2 takes a new slice");
        Self(name)
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        // A member that was just killed stays in its cgroup until it is reaped.
        let removed = wait_until(Duration::from_secs(5), || at_the_root(&format!("rmdir /sys/fs/cgroup/{}", self.0)));
        assert!(removed || std::thread::panicking(), "the slice {} cannot be removed", self.0);
    }
}

fn at_the_root(line: &str) -> bool {
    let mut command = Command::new(UNIFIED[0]);
    command.args(&UNIFIED[1..]).args(["sh", "sh", "-c", line]);
    command.output().expect("unshare").status.success()
}

#[test]
fn only_members_of_the_slice_are_captured() {
    let slice = Slice::make();
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let ask = |member: bool, family| {
        let path = format!("/slice-{}", fresh_hex());
        let mut wrapper = MEMBER.to_vec();
        wrapper.push(&slice.0);
        let wrapper = if member { &wrapper[..] } else { &[] };
        let got = curl_through(wrapper, &world.client, &socket_addr(&world.server, family, 8080), &path);
        (got, world.saw(&path))
    };
    for family in Family::BOTH {
        let (got, plain) = ask(true, family);
        got.expect_ok();
        assert!(plain, "{family:?}: without tng a member's traffic is plain");
    }
    let out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let capture = TO_SERVER.replace(" }", &format!(", cgroup = \"{}\" }}", slice.0));
    let mut wrapper = UNIFIED.to_vec();
    wrapper.push("sh");
    let tng = Tng::start_through(&wrapper, &world.client, "in", &ingress(&capture, VERIFY));
    for family in Family::BOTH {
        let (got, plain) = ask(true, family);
        got.expect_ok();
        assert!(!plain, "{family:?}: a member is tunnelled");
    }
    assert!(out.stop().success());
    for family in Family::BOTH {
        let (got, plain) = ask(false, family);
        got.expect_ok();
        assert!(plain, "{family:?}: who is no member goes the direct way");
        let (got, plain) = ask(true, family);
        assert!(!got.ok() && !plain, "{family:?}: a member is refused and nothing leaks");
    }
    assert!(tng.stop().success());
    wait_for("the tables are gone", Duration::from_secs(5), || world.client.sh("nft list tables").trim().is_empty());
}

#[test]
fn a_missing_slice_is_an_error_and_nothing_is_applied() {
    let world = World::new();
    let name = format!("tngtest{}.slice", fresh_hex());
    let capture = TO_SERVER.replace(" }", &format!(", cgroup = \"{name}\" }}"));
    let mut wrapper = UNIFIED.to_vec();
    wrapper.push("sh");
    let mut tng = Tng::spawn_through(&wrapper, &world.client, "in", &ingress(&capture, VERIFY), &[]);
    let status = tng.wait();
    // What it wrote last may still be in the pipe when it has ended.
    wait_until(Duration::from_secs(5), || tng.output().contains("cgroup-missing"));
    let said = tng.output();
    assert!(!status.success(), "{said}");
    assert!(said.contains("cgroup-missing") && said.contains(&name), "{said}");
    let left = world.client.sh("nft list tables; ip rule show pref 565; ip -6 rule show pref 565");
    assert_eq!(left.trim(), "", "nothing is applied");
}
