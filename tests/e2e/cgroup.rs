//! Capture by cgroup: only what runs in a slice is taken.
//!
//! A host may have cgroup v2 elsewhere than at /sys/fs/cgroup (the hybrid layout). Everything here
//! runs in private mount namespaces that have it there; the slice is the test's own.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::netns::{Family, Host, Proc, Tng, World, fresh_hex, wait_for, wait_until};
use super::programs::*;

/// Puts cgroup v2 at /sys/fs/cgroup unless it is there: mounted over itself it is busy (mount(2), EBUSY).
macro_rules! unified {
    ($then:literal) => {
        concat!(
            "[ \"$(stat -f -c %T /sys/fs/cgroup)\" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup || exit; ",
            $then
        )
    };
}
/// Runs the command that follows with cgroup v2 at /sys/fs/cgroup.
const UNIFIED: [&str; 5] = ["unshare", "-m", "sh", "-c", unified!("exec \"$@\"")];
/// The same as a member of the slice named by the first word.
const MEMBER: [&str; 5] =
    ["unshare", "-m", "sh", "-c", unified!("echo $$ >/sys/fs/cgroup/$0/cgroup.procs && exec \"$@\"")];

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

/// A member of a slice that it makes anew; see its first lines.
const MEMBER_OF_NEW: &str = include_str!("newslice.py");
/// Plain answers that show that nothing would ever end them.
const MANY: usize = 200;
/// How often the slice is made anew under a running guard.
const ROUNDS: usize = 20;
/// From the making of the slice to the last plain answer, on a machine that is busy with other tests; less than the
/// guard's patrol. The manual page gives the usual figures.
const WINDOW_MS: f64 = 4000.0;

/// Makes the slice anew and asks from within until it is refused. `meanwhile` gets its first lines.
fn asks_from_new(
    slice: &Slice,
    host: &Host,
    addr: &str,
    path: &str,
    port: usize,
    meanwhile: impl FnOnce(&Proc),
) -> Value {
    let mut words = UNIFIED[1..].to_vec();
    let (many, port) = (MANY.to_string(), port.to_string());
    words.extend(["sh", "/usr/bin/python3", "-I", "-c", MEMBER_OF_NEW, &slice.0, addr, path, &many, &port]);
    let mut member = host.spawn(UNIFIED[0], &words);
    meanwhile(&member);
    assert!(member.wait(Duration::from_secs(30)).success(), "{}", member.output());
    let said = member.output();
    serde_json::from_str(said.lines().last().unwrap_or_default()).expect("its report")
}

#[test]
fn a_slice_that_is_made_anew_is_captured_again() {
    let slice = Slice::make();
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let capture = TO_SERVER.replace(" }", &format!(", cgroup = \"{}\" }}", slice.0));
    let mut wrapper = UNIFIED.to_vec();
    wrapper.push("sh");
    let tng = Tng::start_through(&wrapper, &world.client, "in", &ingress(&capture, VERIFY));
    let addr = |family| socket_addr(&world.server, family, 8080);

    // No guard to follow it: the rules are for a slice that is no more, and everything goes out in plaintext.
    tng.freeze_guard();
    let path = format!("/anew-{}", fresh_hex());
    let report = asks_from_new(&slice, &world.client, &addr(Family::V4), &path, 10_000, |member| {
        let leaks = wait_until(Duration::from_secs(20), || member.output().contains("many\n"));
        assert!(leaks && world.saw(&path), "the control: {MANY} plain answers without a guard\n{}", member.output());
        tng.thaw_guard();
    });
    assert_eq!(report["after"], 0, "refused, and stays so: {report}");
    assert_eq!(report["held"], "cut", "a connection of before is cut: {report}");

    let mut windows = Vec::new();
    for round in 0..ROUNDS {
        let family = Family::BOTH[round % 2];
        let report = asks_from_new(&slice, &world.client, &addr(family), "/window", 20_000 + 2_000 * round, |_| {});
        assert_eq!(report["after"], 0, "round {round}: refused, and stays so: {report}");
        assert_ne!(report["held"], "goes on", "round {round}: {report}");
        windows.push(report["ms"].as_f64().expect("milliseconds"));
    }
    windows.sort_by(f64::total_cmp);
    println!("from the making of a slice to its first refusal, ms: {windows:.1?}");
    assert!(windows[ROUNDS - 1] < WINDOW_MS, "{windows:?}");
    // That it was gone in between is often over before anybody looks, and two changes may be met by one reload.
    assert!(tng.output().contains("cgroup-recreated"), "{}", tng.output());

    // Captured, not only refused.
    let out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let mut wrapper = MEMBER.to_vec();
    wrapper.push(&slice.0);
    for family in Family::BOTH {
        let path = format!("/tunnel-{}", fresh_hex());
        wait_for("a member is tunnelled", Duration::from_secs(5), || {
            curl_through(&wrapper, &world.client, &addr(family), &path).ok()
        });
        assert!(!world.saw(&path), "{family:?}");
    }
    assert!(out.stop().success());
    assert!(tng.stop().success());
}

#[test]
fn one_slice_that_is_gone_does_not_keep_another_from_being_followed() {
    let (gone, back) = (Slice::make(), Slice::make());
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let of = |slice: &Slice| TO_SERVER.replace(" }", &format!(", cgroup = \"{}\" }}", slice.0));
    let mut wrapper = UNIFIED.to_vec();
    wrapper.push("sh");
    let capture = format!("{}, {}", of(&gone), of(&back));
    let tng = Tng::start_through(&wrapper, &world.client, "in", &ingress(&capture, VERIFY));
    assert!(at_the_root(&format!("rmdir /sys/fs/cgroup/{}", gone.0)));
    wait_for("the guard says so", Duration::from_secs(5), || tng.output().contains("cgroup-gone"));
    let addr = socket_addr(&world.server, Family::V4, 8080);
    for (slice, port) in [(&back, 10_000), (&gone, 20_000)] {
        let report = asks_from_new(slice, &world.client, &addr, "/other", port, |_| {});
        assert_eq!(report["after"], 0, "{report}");
    }
    let said = tng.output();
    assert!(!said.contains("rules-removed"), "a cgroup that is gone is no stranger's work:\n{said}");
    assert!(tng.stop().success());
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
